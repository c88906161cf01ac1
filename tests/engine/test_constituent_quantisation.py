"""A quantised model beside one that is not: each constituent keeps its own quantisation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import constituents as several
from tests.support import quantised, reference, tiny
from vllm_marith import Formula


def methods(llm: Any) -> list[str]:
    """How each constituent's first linear layer computes."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    models = worker.model_runner.get_model().models
    return [type(model.model.layers[0].self_attn.qkv_proj.quant_method).__name__ for model in models]


@pytest.mark.parametrize("which", ["base", "constituent"])
def test_int8_beside_float32(which: str, tmp_path: Path) -> None:
    """compressed-tensors W8A8, which vLLM's CPU build runs, against the same rounding in float32."""
    plain = tiny.make(tmp_path / "plain", seed=1, sharpness=2.0)
    int8 = quantised.make(plain, tmp_path / "int8")
    networks = {"plain": reference.load(str(plain)), "int8": quantised.load(plain)}
    base, other = ("int8", "plain") if which == "base" else ("plain", "int8")
    paths = {"plain": str(plain), "int8": str(int8)}
    formulas = [
        Formula.parse(text, {"e": {"model": other}}) for text in ("base", "e", "2*base - e", "union(base, e)")
    ]
    prompt = tiny.prompt(random.Random(4), 40, 60)
    with several.engine(paths[base], {other: paths[other]}, max_logprobs=tiny.VOCAB) as llm:
        linear = ["CompressedTensorsLinearMethod", "UnquantizedLinearMethod"]
        assert methods(llm) == (linear if base == "int8" else linear[::-1])
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * len(formulas),
            [f.sampling_params(temperature=0, max_tokens=1, logprobs=tiny.VOCAB) for f in formulas],
            use_tqdm=False,
        )
    with torch.inference_mode():
        rows = {name: net(torch.tensor([prompt])).logits[0, -1] for name, net in networks.items()}
    assert float((rows["plain"].log_softmax(-1) - rows["int8"].log_softmax(-1)).abs().max()) > 0.05
    for formula, output in zip(formulas, outputs, strict=True):
        logits = {name: rows[base if name == "base" else other] for name in formula.terms}
        wanted = formula.evaluate(logits, dtype=torch.float64)
        found = torch.tensor([output.outputs[0].logprobs[0][i].logprob for i in range(tiny.VOCAB)])
        # A number that lies between two of int8's may be rounded to either.
        assert float((found - wanted).abs().max()) < 5e-3, formula

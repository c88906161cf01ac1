"""Formulas over several base models in one engine equal a plain Hugging Face float32 loop over each."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import asynchronous, engines, exactness, reference, tiny, workload
from tests.support import constituents as several
from vllm_marith import Formula

LENGTH = 48
SEED = 11
SMALL_STEPS = dict(max_num_batched_tokens=24, max_num_seqs=24)
SMALL_CACHE = dict(num_gpu_blocks_override=28)
CASES: dict[str, dict[str, Any]] = {
    "prefix_cache": {},
    "no_prefix_cache": dict(enable_prefix_caching=False),
    "small_steps": SMALL_STEPS,
    "small_cache": SMALL_CACHE,
    "async_small_cache_small_steps": SMALL_CACHE | SMALL_STEPS,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return several.make(tmp_path_factory.mktemp("constituents"))


@cache
def jobs() -> list[workload.Job]:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    shared = workload.words(rng, 20, 30)
    sizes = [1, 2, 3, 5, 0, 6, 4, 0, 3, 0, 2]
    return [workload.job(rng, size, shared, 20, ["small", "qwen"]) for size in sizes]


@cache
def expected(base: str, constituents: tuple[tuple[str, str], ...]) -> list[reference.Reference]:
    return exactness.references(base, jobs(), LENGTH, dict(constituents))


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_huggingface(
    name: str, models: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, constituents = models
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    if name.startswith("async"):
        asynchronous.force(monkeypatch)
    with several.engine(base, constituents, **CASES[name]) as llm:
        scheduler = engines.scheduler(llm)
        answers = exactness.generate(llm, jobs(), asked)
        again = exactness.generate(llm, jobs(), asked)  # the prefix cache is warm
        assert scheduler.most_groups == 3
        preemptions = scheduler.figures.preempted
    assert (preemptions > 0) == ("small_cache" in name)
    wanted = expected(base, tuple(constituents.items()))
    exactness.assert_greedy(jobs(), answers, wanted)
    exactness.assert_greedy(jobs(), again, wanted)


def test_whole_distributions(tmp_path: Path) -> None:
    """Each constituent alone, and DExperts, over the whole vocabulary at every token."""
    base, constituents = several.make(tmp_path, sharpness=2.0)
    rng = random.Random(5)
    formulas = [
        Formula.parse("e", {"e": {"model": "small"}}),
        Formula.parse("e", {"e": {"model": "qwen"}}),
        Formula.parse("base + 0.5*(e - a)", {"e": {"model": "small"}, "a": {"model": "qwen"}}),
        Formula.parse("base"),
    ]
    prompts = [tiny.prompt(rng, 5, 90) for _ in formulas]
    paths = {"e": constituents["small"], "a": constituents["qwen"]}
    with several.engine(base, constituents, max_logprobs=tiny.VOCAB, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [f.sampling_params(temperature=0, max_tokens=8, logprobs=tiny.VOCAB) for f in formulas],
            use_tqdm=False,
        )
    for j, (formula, prompt, output) in enumerate(zip(formulas, prompts, outputs, strict=True)):
        where = {
            name: constituents["qwen"] if j == 1 else paths[name] for name in formula.terms if name in paths
        }
        tokens = list(output.outputs[0].token_ids)
        for step, logprobs in enumerate(output.outputs[0].logprobs):
            with torch.inference_mode():
                sequence = torch.tensor([prompt + tokens[:step]])
                logits = {
                    name: reference.load(where.get(name, base))(sequence).logits[0, -1]
                    for name in formula.terms
                }
                wanted = formula.evaluate(logits, dtype=torch.float64)
            found = torch.tensor([logprobs[i].logprob for i in range(tiny.VOCAB)])
            assert int(wanted.argmax()) == tokens[step]
            assert float((found - wanted).abs().max()) < 5e-5

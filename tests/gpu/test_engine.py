"""Formulas in an engine on a GPU: the V2 model runner, CUDA graphs, half precision.

Skipped without a CUDA device.  scripts/gpu_check.sh runs it where vLLM can be imported.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engines, exactness, reference, workload
from tests.support.workload import Job

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LENGTH = 48
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.5}
"""Of a token's log-probability.  Formulas amplify the rounding of logits by the sum of their weights; the
tiny model's logits spread over some 30, where bfloat16 has a step of 0.125."""
CASES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no_graphs": dict(enforce_eager=True),
    "small_cache": dict(num_gpu_blocks_override=48),
    "small_steps": dict(max_num_batched_tokens=32, max_num_seqs=32),
}


def jobs() -> list[Job]:
    rng = random.Random(0)
    print("seed 0")
    return [workload.job(rng, size, longest=12) for size in (3, 0, 2, 5, 1, 8, 0)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_every_token_has_the_formulas_probability(tiny_model: Path, name: str, dtype: str) -> None:
    """Along the engine's own greedy path, the reference in float32 agrees to rounding at every step."""
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    options = dict(dtype=dtype, enforce_eager=False, block_size=16) | CASES[name]
    work = jobs()
    with engines.engine(tiny_model, **options) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        answers = exactness.generate(llm, work, asked)
        engines.assert_all_returned(llm)
    for job, (answer,) in zip(work, answers, strict=True):
        path = reference.generate(
            str(tiny_model), job.reference_formula(), exactness.ids_of(job), LENGTH, force=answer.tokens
        )
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        worst = max(abs(a - b) for a, b in zip(found, path.logprobs, strict=True))
        assert worst < TOLERANCE[dtype], f"{job.formula}"

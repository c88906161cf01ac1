"""Greedy formula decoding equals a plain Hugging Face float32 loop, however the engine schedules it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from tests.support import asynchronous, engines, reference, tiny, workload

LENGTH = 64
LOGPROB_TOLERANCE = 1e-4


@dataclass
class Case:
    """An engine configuration, and what it is meant to provoke."""

    options: dict[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    preempts: bool = False


SMALL_CACHE = dict(num_gpu_blocks_override=44)
BY_PRIORITY = dict(scheduling_policy="priority")
# The token budget of a step is as small as vLLM allows: prompts are computed in many chunks.
SMALL_STEPS = dict(max_num_batched_tokens=24, max_num_seqs=24)

CASES = {
    "prefix_cache": Case(),
    "no_prefix_cache": Case(dict(enable_prefix_caching=False)),
    "small_steps": Case(SMALL_STEPS),
    "small_cache": Case(SMALL_CACHE, preempts=True),
    "small_cache_small_steps": Case(SMALL_CACHE | SMALL_STEPS, preempts=True),
    "priority": Case(SMALL_CACHE | BY_PRIORITY, preempts=True),
    "async": Case(asynchronous=True),
    "async_small_cache": Case(
        SMALL_CACHE | dict(max_num_batched_tokens=48), asynchronous=True, preempts=True
    ),
    "async_priority": Case(SMALL_CACHE | BY_PRIORITY, asynchronous=True, preempts=True),
}


@cache
def jobs_of(small: bool) -> list[workload.Job]:
    """Groups of 1 to 8 terms among plain requests.  In the small cache, one of 8 needs nearly all blocks."""
    seed = 3 if small else 0
    print(f"seed {seed}")
    rng = random.Random(seed)
    shared = workload.words(rng, 20, 30)
    sizes = [1, 2, 3, 5, 8, 4, 3, 0, 0, 0, 0, 2]
    rng.shuffle(sizes)
    return [workload.job(rng, size, shared, longest=12 if small else 30) for size in sizes]


@cache
def expected(model: str, small: bool) -> list[reference.Reference]:
    """The reference's continuations; the same for every engine configuration, so computed once."""
    tokenizer = tiny.tokenizer()
    return [
        reference.generate(
            model,
            job.reference_formula(),
            {name: tokenizer(text).input_ids for name, text in job.reference_prompts().items()},
            LENGTH,
        )
        for job in jobs_of(small)
    ]


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_huggingface(name: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    case = CASES[name]
    jobs = jobs_of(case.preempts)
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)

    if case.asynchronous:
        asynchronous.force(monkeypatch)
    with engines.engine(tiny_model, **case.options) as llm:
        scheduler = engines.scheduler(llm)
        assert type(scheduler).__name__ == ("AsyncGroupScheduler" if case.asynchronous else "GroupScheduler")
        outputs = llm.generate(
            [job.text for job in jobs],
            [
                job.formula.sampling_params(**asked) if job.formula else SamplingParams(**asked)
                for job in jobs
            ],
            priority=[job.priority for job in jobs] if "scheduling_policy" in case.options else None,
            use_tqdm=False,
        )
        engines.assert_all_returned(llm)
        preemptions = scheduler.num_group_preemptions

    assert (preemptions > 0) == case.preempts
    tokenizer = tiny.tokenizer()
    references = expected(str(tiny_model), case.preempts)
    for job, output, wanted in zip(jobs, outputs, references, strict=True):
        (completion,) = output.outputs
        assert list(completion.token_ids) == wanted.tokens, f"{job.formula}"
        leader = job.reference_formula().leader
        assert output.prompt_token_ids == tokenizer(job.reference_prompts()[leader]).input_ids
        logprobs = [next(iter(step.values())).logprob for step in completion.logprobs]
        worst = max(abs(a - b) for a, b in zip(logprobs, wanted.logprobs, strict=True))
        assert worst < LOGPROB_TOLERANCE

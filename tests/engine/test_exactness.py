"""Greedy formula decoding equals a plain Hugging Face float32 loop, however the engine schedules it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from tests.support import asynchronous, engines, exactness, reference, workload

LENGTH = 64


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
    """The same for every engine configuration, so computed once."""
    return exactness.references(model, jobs_of(small), LENGTH)


@cache
def operator_jobs() -> list[workload.Job]:
    print("seed 5")
    return workload.operator_jobs(random.Random(5))


@cache
def expected_of_operators(model: str) -> list[reference.Reference]:
    return exactness.references(model, operator_jobs(), LENGTH)


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_huggingface(name: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    jobs = jobs_of(case.preempts)
    check(case, jobs, expected(str(tiny_model), case.preempts), tiny_model, monkeypatch)


@pytest.mark.parametrize("name", ["prefix_cache", "small_cache_small_steps", "async_small_cache"])
def test_every_operator_equals_huggingface(
    name: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(CASES[name], operator_jobs(), expected_of_operators(str(tiny_model)), tiny_model, monkeypatch)


def check(
    case: Case,
    jobs: list[workload.Job],
    wanted: list[reference.Reference],
    tiny_model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serves the jobs together, with their scheduling as the case provokes it, and compares every token."""
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    if case.asynchronous:
        asynchronous.force(monkeypatch)
    with engines.engine(tiny_model, **case.options) as llm:
        scheduler = engines.scheduler(llm)
        assert type(scheduler).__name__ == ("AsyncGroupScheduler" if case.asynchronous else "GroupScheduler")
        answers = exactness.generate(llm, jobs, asked, by_priority="scheduling_policy" in case.options)
        engines.assert_all_returned(llm)
        preemptions = scheduler.figures.preempted

    assert (preemptions > 0) == case.preempts
    exactness.assert_greedy(jobs, answers, wanted)

"""What groups cost the scheduler, in function calls: the same on every machine."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest

from tests.support.fake_engine import FakeEngine, Job
from tests.support.fake_scheduler import Options


def calls(function: Any) -> int:
    """Number of function calls, Python's and C's, that a call makes."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # it has callbacks
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def job(**kwargs: Any) -> Job:
    return Job(tuple(tuple(range(50, 50 + length)) for length in (9, 10, 11)), max_tokens=60, **kwargs)


def decoding(model: Any, num_groups: int, formulas: bool = True) -> FakeEngine:
    """An engine in which `num_groups` groups of three decode, or as many plain requests."""
    options = Options(max_num_seqs=192, max_num_batched_tokens=4096, num_blocks=4000)
    engine = FakeEngine(model, options)
    for _ in range(num_groups):
        if formulas:
            engine.add(job())
        else:
            for prompt in job().prompts:
                engine.add(Job((prompt,), max_tokens=60, formula=False))
    for _ in range(4):
        engine.step()
    return engine


@pytest.mark.parametrize("grammar", [False, True])
def test_waiting_groups_cost_nothing(tiny_model: Any, grammar: bool) -> None:
    counts = []
    for num_waiting in (100, 2000):
        engine = decoding(tiny_model, 64)
        waiting = job(grammar=grammar)
        for _ in range(num_waiting):
            engine.add(waiting)
        engine.step()
        counts.append(calls(engine.scheduler.schedule))
        assert len(engine.scheduler.running) == 192
        assert sum(engine.scheduler.get_request_counts()) == 3 * (64 + num_waiting)
    assert counts[0] == counts[1]


def test_a_step_costs_the_same_for_each_group(tiny_model: Any) -> None:
    counts = [calls(decoding(tiny_model, n).scheduler.schedule) for n in (16, 32, 48)]
    assert counts[2] - counts[1] == counts[1] - counts[0]


@pytest.mark.parametrize("full", [False, True])
def test_groups_cost_little_beside_vllm(tiny_model: Any, full: bool) -> None:
    """A tenth of the calls that vLLM makes for as many plain requests; a quarter when blocks are scarce."""
    counts = []
    for formulas in (True, False):
        scheduler = decoding(tiny_model, 64, formulas).scheduler
        if full:  # no row needs a block in this step, but each of them has to be asked
            pool = scheduler.kv_cache_manager.block_pool
            pool.get_new_blocks(pool.get_num_free_blocks() - 20)
        counts.append(calls(scheduler.schedule))
        assert len(scheduler.running) == 192
    ours, theirs = counts
    assert ours < (1.25 if full else 1.1) * theirs


def test_letting_groups_in_costs_the_same_for_each(tiny_model: Any) -> None:
    """Also when many come at once: what others were promised is counted once."""
    counts = []
    for number in (20, 40, 60):
        engine = decoding(tiny_model, 1)
        for _ in range(number):
            engine.add(job())
        counts.append(calls(engine.scheduler.schedule))
        assert len(engine.scheduler.running) == 3 + 3 * number
    assert counts[2] - counts[1] <= 1.02 * (counts[1] - counts[0])

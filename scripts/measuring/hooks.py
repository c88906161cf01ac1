"""What this package adds to one engine step, by part."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .runs import run
from .work import Work


def step_cost(llm: Any, work: Work) -> dict[str, Any]:
    """Microseconds of a step, averaged over a whole run of the work, letting it in included."""
    with timed(llm.llm_engine.engine_core.engine_core) as spent:
        run(llm, work)
    steps = spent.calls["step"]
    each = {name: seconds / steps * 1e6 for name, seconds in spent.seconds.items()}
    ours = {
        "schedule": each["schedule"] - each["vllm_schedule"],
        "update": each["update"] - each["vllm_update"],
        "plan": each["plan"],
        "fuse": each["fuse"],
        "tie": each["tie"],
    }
    total = sum(ours.values())
    return {
        **{name: round(us, 1) for name, us in ours.items()},
        "total": round(total, 1),
        "step": round(each["step"]),
        "share": round(total / each["step"], 4),
    }


class Spent:
    """Seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def clock(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        return clocked


@contextmanager
def timed(core: Any) -> Iterator[Spent]:
    """Clocks around our functions and the vLLM functions inside them, for the duration.

    core: the engine's ``EngineCore``, which keeps its step as a bound method.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_marith.engine.core.scheduler import GroupScheduler
    from vllm_marith.engine.worker.rows import RowPlan, RowPlans

    spent = Spent()
    places = [
        (core, "step_fn", "step"),
        (GroupScheduler, "schedule", "schedule"),
        (Scheduler, "schedule", "vllm_schedule"),
        (GroupScheduler, "update_from_output", "update"),
        (Scheduler, "update_from_output", "vllm_update"),
        (RowPlans, "plan_step", "plan"),
        (RowPlan, "fuse", "fuse"),
        (RowPlan, "tie", "tie"),
    ]
    own = [(owner, attribute, owner.__dict__.get(attribute)) for owner, attribute, _ in places]
    for owner, attribute, name in places:
        setattr(owner, attribute, spent.clock(name, getattr(owner, attribute)))
    try:
        yield spent
    finally:
        for owner, attribute, original in own:
            if original is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)

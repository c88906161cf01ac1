"""Work in an engine: how long it takes, and how long each answer waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from .work import Work


@dataclass(frozen=True)
class Run:
    """One pass over some work.

    Attributes:
        seconds: from the first request to the last answer.
        first: seconds to the first token of each request.
        later: seconds for each token after it, by request.
    """

    seconds: float
    first: list[float]
    later: list[float]


def run(llm: Any, work: Work, in_flight: int | None = None) -> Run:
    """All of the work, with so many answers in the engine at a time; default: all at once."""
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for params in work.params:
        params.output_kind = RequestOutputKind.FINAL_ONLY
    places = (in_flight or work.answers) * work.requests_an_answer
    waiting = enumerate(zip(work.texts, work.params, strict=True))
    unfinished, finished = 0, []
    start = time.perf_counter()
    while True:
        for i, (text, params) in islice(waiting, places - unfinished):
            engine.add_request(str(i), text, params)
            unfinished += 1
        if not unfinished:
            break
        done = [output for output in engine.step() if output.finished]
        unfinished -= len(done)
        finished += done
    seconds = time.perf_counter() - start
    assert sum(len(o.outputs[0].token_ids) for o in finished) == work.tokens * work.requests_an_answer
    stats = [output.metrics for output in finished]
    return Run(
        seconds,
        [s.first_token_latency for s in stats],
        [(s.last_token_ts - s.first_token_ts) / max(1, s.num_generation_tokens - 1) for s in stats],
    )


def in_turns(sides: Mapping[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """Each side once to warm up, then all of them in turns: they share whatever else the machine does."""
    for side in sides.values():
        side()
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(side())
    return runs


def ratio(of: Sequence[Run], to: Sequence[Run]) -> dict[str, float]:
    """The speed of one side over another's, by neighbouring runs: median and quartiles."""
    each = [b.seconds / a.seconds for a, b in zip(of, to, strict=True)]
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


def speed(runs: Sequence[Run], tokens: int) -> float:
    """Tokens per second, the median."""
    return round(tokens / statistics.median(r.seconds for r in runs), 1)


def latencies(runs: Sequence[Run]) -> dict[str, float]:
    """Milliseconds to the first token and for each later one: median and 99th percentile over requests."""
    found = {}
    for name in ("first", "later"):
        all_of_them = [1e3 * value for r in runs for value in getattr(r, name)]
        middle, worst = np.quantile(all_of_them, [0.5, 0.99])
        found[f"{name}_ms"], found[f"{name}_p99_ms"] = round(middle, 2), round(worst, 2)
    return found

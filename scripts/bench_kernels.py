"""The fusion operation on CPU: the compiled backend against torch eager, in one process.

    python scripts/bench_kernels.py [--threads N] [--seconds S]

Eager is what one would write by hand: log_softmax of the rows, a weighted index_add (and amax for a union)
with -inf kept, then the log-sum-exp and argmax of the result that `fuse` returns too. Repetitions are
interleaved, so that all meet the same noise, each after an untimed one of its own: the logits then lie in the
cache as they do when the model has just written them. Medians are reported: of the thread's CPU time with one
thread (the default; a busy machine does not change it much), of wall time with more. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable

import torch
from marith_kernels import Batch, Fused, Program, fuse, warmup

GROUPS, PER_GROUP = 8, 3
VOCAB_SIZES = (32_000, 151_936)
WEIGHTS = (1.5, -0.25, -0.25)
PROGRAMS = {
    "linear": Program([("push", 0, 1.5), ("add", 1, -0.25), ("add", 2, -0.25)]),
    "union": Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.9)]),
    "union, divided": Program(
        [("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 0.5), ("pop_add", -1, -0.9)], divide=True
    ),
}
GOALS = {"linear": 5.0, "union": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    warmup(dtypes=(torch.float32, torch.bfloat16))

    cases = []
    line = "{vocab:>7} {dtype:>9} {formula:>15} {eager_ms:>9} {torch_ms:>9} {numba_ms:>9} {ratio:>6}"
    print(line.format_map({key: key for key in re.findall(r"{(\w+)", line)}))
    for vocab_size in VOCAB_SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(GROUPS * PER_GROUP, vocab_size).mul_(5).to(dtype)
            for name, program in PROGRAMS.items():
                cases.append(measure(logits, name, program, arguments.seconds, clock))
                print(line.format_map(cases[-1]), flush=True)
    print(
        json.dumps(
            {
                "benchmark": "kernels_cpu",
                "processor": processor(),
                "threads": arguments.threads,
                "clock": "CPU time" if arguments.threads == 1 else "wall time",
                "torch": torch.__version__,
                "rows": GROUPS * PER_GROUP,
                "groups": GROUPS,
                "goals": GOALS,
                "cases": cases,
            }
        )
    )


def measure(
    logits: torch.Tensor, name: str, program: Program, seconds: float, clock: Callable[[], float]
) -> dict[str, object]:
    rows = [[PER_GROUP * g + t for t in range(PER_GROUP)] for g in range(GROUPS)]
    batch = Batch.build([program] * GROUPS, rows)
    out = torch.empty(GROUPS, logits.shape[1])
    candidates: dict[str, Callable[[], object]] = {
        "eager": lambda: EAGER[name](logits),
        "numba": lambda: fuse(logits, batch, out=out, backend="numba"),
        "torch": lambda: fuse(logits, batch, out=out, backend="torch"),
    }
    check(EAGER[name](logits), fuse(logits, batch, backend="numba"))
    times: dict[str, list[float]] = {key: [] for key in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch"]) < 5:
        for key, candidate in candidates.items():
            candidate()
            start = clock()
            candidate()
            times[key].append(clock() - start)
    ms = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    return {
        "vocab": logits.shape[1],
        "dtype": str(logits.dtype).removeprefix("torch."),
        "formula": name,
        "eager_ms": round(ms["eager"], 3),
        "numba_ms": round(ms["numba"], 3),
        "torch_ms": round(ms["torch"], 3),
        "ratio": round(ms["eager"] / ms["numba"], 2),
        "repetitions": len(times["numba"]),
    }


def eager_linear(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_probs = torch.log_softmax(logits.float(), -1)
    weight = torch.tensor(WEIGHTS * GROUPS)[:, None]
    group = torch.arange(GROUPS).repeat_interleave(PER_GROUP)
    terms = torch.where(log_probs == -torch.inf, log_probs, weight * log_probs)
    return _statistics(torch.zeros(GROUPS, logits.shape[1]).index_add_(0, group, terms))


def eager_union(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_probs = torch.log_softmax(logits.float(), -1).view(GROUPS, PER_GROUP, -1)
    best = log_probs[:, 1:].amax(1)
    return _statistics(log_probs[:, 0] + torch.where(best == -torch.inf, best, -0.9 * best))


def eager_divided(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first, second, third = torch.log_softmax(logits.float(), -1).view(GROUPS, PER_GROUP, -1).unbind(1)
    third = 0.5 * third
    wins = third > second
    best, n = torch.where(wins, third, second), torch.where(wins, 0.5, 1.0)
    return _statistics((first + torch.where(best == -torch.inf, best, -0.9 * best)) / (1 - 0.9 * n))


EAGER = {"linear": eager_linear, "union": eager_union, "union, divided": eager_divided}


def _statistics(energies: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return energies, torch.logsumexp(energies, -1), energies.argmax(-1)


def check(eager: tuple[torch.Tensor, ...], fused: Fused) -> None:
    """Both computed the same distribution, but for tokens where rounding decides who wins a divided union."""
    expected, lse, _ = eager
    same = torch.isclose(fused.logits - fused.lse[:, None], expected - lse[:, None], rtol=1e-5, atol=1e-3)
    if same.float().mean() < 1 - 1e-5:
        raise SystemExit("The eager computation and the compiled one disagree.")


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()

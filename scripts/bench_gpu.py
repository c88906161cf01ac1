"""The Triton kernels on a real GPU: first whether they are right, then how fast. See scripts/gpu_check.sh.

Correctness: programs, dtypes and sizes against float64, bans, sampling and verification, and what no
interpreter shows: thousands of repetitions under load, two streams, CUDA graphs, the number of launches.

Speed: bytes moved (terms read, twice where a union needs their log-sum-exp, and the result written) over
time, against the device's copy bandwidth measured at 2 GiB and at the same size, torch eager and
torch.compile. The cache is flushed between repetitions and medians are reported; "hot" repeats in a CUDA
graph, as a decoding loop does.

    python scripts/bench_gpu.py --dry-run      everything once on the CPU, interpreted; no numbers
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from marith_kernels import Batch, Fused, Program, fuse, warmup
from marith_kernels.reference import energies
from marith_kernels.triton_blocks import _zeroed

from tests.kernels.cases import DTYPES, Case, check
from tests.kernels.decoding_laws import Requests, check_residual, check_sample, check_verify

ROOT = Path(__file__).parents[1]
DRY = "--dry-run" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
SIZES = (17, 5003) if DRY else (1, 17, 2047, 2048, 2049, 32_000, 50_257, 128_256, 151_936, 256_000)

TERM = Program([("push", 0, 1.0)])
UNION = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.9)])
DIVIDED = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 0.5), ("pop_add", -1, -0.9)], divide=True)


def linear(n_terms: int) -> Program:
    rest = [("add", t, -0.5 / (n_terms - 1)) for t in range(1, n_terms)]
    return Program([("push", 0, 1.5 if rest else 1.0), *rest])


def union(n_terms: int) -> Program:
    """a - 0.9 * union(b, c, ...)"""
    rest = [("max", t, 1.0) for t in range(2, n_terms)]
    return Program([("push", 0, 1.0), ("push", 1, 1.0), *rest, ("pop_add", -1, -0.9)])


def deep(slots: int, divide: bool) -> Program:
    ops = ("pop_max", "pop_add", "pop_min")
    walk = [("push", i % 3, 1.0 + i / 10) for i in range(slots)] + [("max", 2, 1.1)]
    walk += [(ops[i % 3], -1, 0.7) for i in range(slots - 1)]
    return Program([*walk, ("add", -1, 99.0)], divide=divide)


# ---- is it right? ------------------------------------------------------------------------------------------


def correctness() -> dict[str, int]:
    counts = {}
    for part in (programs_are_right, pipelines_are_right, decoding_is_right, races, graphs):
        if DRY and part is graphs:
            continue
        start = time.time()
        counts[part.__name__] = sum(1 for _ in part())
        print(f"{part.__name__}: {counts[part.__name__]} checks, {time.time() - start:.0f} s", flush=True)
    return counts


def programs_are_right() -> Iterator[None]:
    sets = [
        (linear(3), TERM),
        (linear(8), linear(5)),
        (linear(16), TERM),
        (UNION, linear(3), TERM),
        (DIVIDED, UNION, linear(3)),
        *[(deep(slots, divide), UNION) for slots in (1, 2, 3, 4, 8, 32) for divide in (False, True)],
    ]
    for vocab_size in SIZES:
        for dtype in DTYPES:
            for programs in sets if vocab_size in SIZES[-4:] and not DRY else sets[:5]:
                case = Case(programs, vocab_size, dtype, seed=vocab_size, padding=3, gap=1)
                one_case(case)
                yield
                aligned = Case(programs, vocab_size, dtype, seed=vocab_size + 1, padding=-vocab_size % 16)
                one_case(aligned)
                yield


def pipelines_are_right() -> Iterator[None]:
    """Staged formulas: gates, filters, mixtures, self-debiasing, rows that a classifier makes."""
    try:
        from tests.kernels.pipelines import NAMED, Step, check_step
    except ImportError as error:
        print(f"pipelines_are_right: left out, {error}")
        return
    for vocab_size in (40,) if DRY else (17, 40, 130, 2049):
        for dtype in DTYPES:
            for formula in NAMED.values():
                step = Step((formula, NAMED["sum"]), vocab_size, dtype, seed=vocab_size, masked=0.05)
                assert check_step(step.decided(), "triton", DEVICE)
                yield


def one_case(case: Case) -> None:
    logits, batch = case.logits(), case.batch()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan, device=DEVICE)
    on_device = place(logits)
    fused = fuse(on_device, case.batch(DEVICE), vocab_size=case.vocab_size, out=out, backend="triton")
    check(case, Fused(*(t.cpu() for t in fused)), logits, batch)


def place(logits: torch.Tensor) -> torch.Tensor:
    """On the device with the same strides: `.to` would close the gaps between rows."""
    wide = torch.as_strided(logits, (logits.shape[0], logits.stride(0)), logits.stride()).to(DEVICE)
    return wide[:, : logits.shape[1]]


def decoding_is_right() -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in SIZES:
        for dtype in DTYPES:
            logits = (torch.randn(8, vocab_size, generator=generator) * 3).to(dtype)
            logits[2, : vocab_size // 2] = -math.inf
            logits[3] = -math.inf
            temperature = torch.tensor([1.0, 0.0, 0.3, 2.0] * 2)
            uniform = torch.rand(8, 2, generator=generator)
            check_sample(logits.to(DEVICE), uniform.to(DEVICE), temperature.to(DEVICE), "triton")
            yield
            if vocab_size > 1:
                requests = Requests.draw([3, 0, 5, 1], vocab_size, vocab_size, dtype, device=DEVICE)
                verified = check_verify(requests, "triton")
                check_residual(requests, verified, "triton")
                yield


def races() -> Iterator[None]:
    """The same batch again and again, under a load that shifts the order of blocks; every bit must repeat."""
    rounds = 3 if DRY else 3000
    rows = [[3 * g, 3 * g + 1, 3 * g + 2] for g in range(8)]
    logits = torch.randn(24, 5003 if DRY else 50_304, device=DEVICE).mul_(5)
    noise = torch.randn(64 if DRY else 2048, 64 if DRY else 2048, device=DEVICE)
    for programs in ([linear(3)] * 8, [UNION] * 8, [DIVIDED, linear(3)] * 4):
        batch = Batch.build(programs, rows, DEVICE)
        first = fuse(logits, batch, backend="triton")
        want = energies(logits, batch)
        torch.testing.assert_close(first.logits.double(), want, rtol=1e-5, atol=1e-4)
        streams = [torch.cuda.Stream() for _ in range(2)] if not DRY else []
        different = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for i in range(rounds):
            if i % 3 == 0:
                noise @ noise
            if streams:
                stream = streams[i % 2]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    again = fuse(logits, batch, backend="triton")
                torch.cuda.current_stream().wait_stream(stream)
                for tensor in again:
                    tensor.record_stream(torch.cuda.current_stream())
            else:
                again = fuse(logits, batch, backend="triton")
            for a, b in zip(first, again, strict=True):
                different += (a != b).any()
        if int(different):
            raise AssertionError(f"{int(different)} of {3 * rounds} results differ from the first")
        yield
    for counters in _zeroed.values():
        if int(counters.abs().sum()):
            raise AssertionError("A counter is not back at 0")
    yield


def graphs() -> Iterator[None]:
    """A CUDA graph captures `fuse` and follows new logits; at most two kernels are launched."""
    logits = torch.randn(24, 128_256, device=DEVICE)
    rows = [[3 * g, 3 * g + 1, 3 * g + 2] for g in range(8)]
    for program, most in ((linear(3), 1), (UNION, 2), (DIVIDED, 2)):
        batch = Batch.build([program] * 8, rows, DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fuse(logits, batch, backend="triton")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = fuse(logits, batch, backend="triton")
        for _ in range(20):
            logits.normal_().mul_(5)
            graph.replay()
            want = fuse(logits, batch, backend="triton")
            if not all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)):
                raise AssertionError("A replayed graph computes something else")
        yield
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fuse(logits, batch, backend="triton")
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launched = [event.name for event in profile.events() if event.device_type == on_device]
        if len(launched) > most:
            raise AssertionError(f"{len(launched)} launches instead of {most}: {launched}")
        yield


# ---- is it fast? -------------------------------------------------------------------------------------------

SHAPES = [  # rows, vocabulary, terms of a group
    (24, 128_256, 3),
    (24, 151_936, 3),
    (64, 151_936, 4),
    (512, 151_936, 4),
    (512, 256_000, 4),
    (8, 128_256, 2),
    (24, 32_000, 3),
    (512, 32_000, 4),
    (24, 50_257, 3),
]
KINDS = {"linear": linear, "union": union}


def sweep(seconds: float) -> Iterator[dict[str, Any]]:
    end = time.time() + seconds
    copy_bandwidth = bandwidth_of_copy(1 << 20 if DRY else 1 << 31)
    yield {"copy_gb_per_s": copy_bandwidth / 1e9}
    line = (
        "{rows:>4} {vocab:>7} {terms:>5} {dtype:>8} {kind:>6} {us:>9} {hot_us:>8} "
        "{of_copy:>7} {of_same_copy:>12} {eager_ratio:>11} {compile_ratio:>13}"
    )
    print(line.format_map({key: key for key in re.findall(r"{(\w+)", line)}))
    for n_rows, vocab_size, n_terms in [(8, 3000, 2)] if DRY else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for kind in KINDS:
                if time.time() > end:
                    print("The time is up; the rest of the sweep is left out.")
                    return
                result = time_one(n_rows, vocab_size, n_terms, dtype, kind, copy_bandwidth)
                print(line.format_map(result), flush=True)
                yield result


def time_one(
    n_rows: int, vocab_size: int, n_terms: int, dtype: torch.dtype, kind: str, copy_bandwidth: float
) -> dict[str, Any]:
    n_groups = n_rows // n_terms
    stride = -(-vocab_size // 16) * 16
    logits = (torch.randn(n_rows, stride, device=DEVICE) * 5).to(dtype)[:, :vocab_size]
    rows = [[g * n_terms + t for t in range(n_terms)] for g in range(n_groups)]
    batch = Batch.build([KINDS[kind](n_terms)] * n_groups, rows, DEVICE)
    out = torch.empty(n_groups, stride, device=DEVICE)

    def ours() -> Fused:
        return fuse(logits, batch, vocab_size=vocab_size, out=out, backend="triton")

    def eager() -> tuple[torch.Tensor, ...]:
        return by_hand(logits, n_groups, n_terms, kind)

    ours_log_probs = ours().logits[:, :vocab_size] - ours().lse[:, None]
    expected, lse, _ = eager()
    torch.testing.assert_close(ours_log_probs, expected - lse[:, None], rtol=1e-4, atol=2e-3)
    read = n_groups * n_terms * vocab_size * logits.element_size()
    moved = read * (2 if kind == "union" else 1) + n_groups * vocab_size * 4
    seconds = median(ours)
    eager_seconds = median(eager)
    compiled_seconds = math.nan
    if not DRY and (n_rows in (24, 512)):
        compiled = torch.compile(by_hand, dynamic=False)
        compiled_seconds = median(lambda: compiled(logits, n_groups, n_terms, kind))
    return {
        "rows": n_rows,
        "vocab": vocab_size,
        "terms": n_terms,
        "dtype": str(dtype).removeprefix("torch."),
        "kind": kind,
        "us": round(seconds * 1e6, 2),
        "hot_us": round(hot(ours) * 1e6, 2),
        "eager_us": round(eager_seconds * 1e6, 2),
        "compile_us": round(compiled_seconds * 1e6, 2),
        "moved_bytes": moved,
        "of_copy": round(moved / seconds / copy_bandwidth, 3),
        "of_same_copy": round(moved / seconds / bandwidth_of_copy(moved // 2), 3),
        "eager_ratio": round(eager_seconds / seconds, 2),
        "compile_ratio": round(compiled_seconds / seconds, 2),
    }


def by_hand(logits: torch.Tensor, n_groups: int, n_terms: int, kind: str) -> tuple[torch.Tensor, ...]:
    """The same in torch: log_softmax, weighted sum or amax with -inf kept, and the statistics of the
    result."""
    log_probs = torch.log_softmax(logits[: n_groups * n_terms].float(), -1).view(n_groups, n_terms, -1)
    if kind == "linear":
        weight = torch.full((n_terms, 1), -0.5 / (n_terms - 1), device=logits.device)
        weight[0] = 1.5
        result = torch.where(log_probs == -math.inf, log_probs, weight * log_probs).sum(1)
    else:
        best = log_probs[:, 1:].amax(1)
        result = log_probs[:, 0] + torch.where(best == -math.inf, best, -0.9 * best)
    return result, torch.logsumexp(result, -1), result.argmax(-1)


def bandwidth_of_copy(n_bytes: int) -> float:
    source = torch.empty(max(n_bytes // 16 * 16, 16), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / median(lambda: target.copy_(source))


def median(function: Callable[[], object]) -> float:
    """Seconds, with the L2 cache flushed before every repetition."""
    if DRY:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    return triton.testing.do_bench(function, warmup=15, rep=60, return_mode="median") * 1e-3


def hot(function: Callable[[], object], n: int = 50) -> float:
    """Seconds inside a CUDA graph of n repetitions: nothing flushed, no gaps between launches."""
    if DRY:
        return math.nan
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(n):
            function()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / n


# ---- the report --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300, help="time to spend on the sweep")
    parser.add_argument("--only", choices=["correctness", "speed"])
    parser.add_argument("--dry-run", action="store_true", help="once, on the CPU, interpreted: no numbers")
    arguments = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here; --dry-run interprets the kernels on the CPU.")
    device = "interpreter" if DRY else torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    report: dict[str, Any] = {
        "benchmark": "kernels_gpu",
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    if not DRY:
        start = time.time()
        for stride in (151_936, 50_257):
            warmup("triton", DEVICE, DTYPES, vocab_size=stride, stride=stride)
        report["warmup_seconds"] = round(time.time() - start, 1)
        print(f"warm-up of two shapes: {report['warmup_seconds']} s", flush=True)
    if arguments.only != "speed":
        try:
            report["checks"] = correctness()
        except AssertionError as error:
            raise SystemExit(f"WRONG: {error}") from error
    if arguments.only != "correctness":
        report["sweep"] = list(sweep(arguments.seconds))
    line = json.dumps(report).replace("NaN", "null")
    if not DRY:
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = ROOT / "benchmarks" / "results" / f"{report['date']}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
        print(f"written to {path.relative_to(ROOT)}")
    print(line)


def commit() -> str | None:
    """The commit that was measured, if this is a checkout."""
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or None


if __name__ == "__main__":
    main()

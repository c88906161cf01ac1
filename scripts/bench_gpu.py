"""The Triton kernels on a real GPU: first whether they are right (`check_gpu.py`), then how fast.

Speed: bytes moved (terms read, twice where a union needs their log-sum-exp, and the result written) over
time, against the device's copy bandwidth measured at 2 GiB and at the same size, torch eager and
torch.compile. The cache is flushed between repetitions and medians are reported; "hot" repeats in a CUDA
graph, as a decoding loop does.  See scripts/gpu_check.sh.

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
from check_gpu import DEVICE, DRY, correctness, linear
from marith_kernels import Batch, Fused, Program, fuse, warmup

from tests.kernels.cases import DTYPES

ROOT = Path(__file__).parents[1]
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


def union(n_terms: int) -> Program:
    """a - 0.9 * union(b, c, ...)"""
    rest = [("max", t, 1.0) for t in range(2, n_terms)]
    return Program([("push", 0, 1.0), ("push", 1, 1.0), *rest, ("pop_add", -1, -0.9)])


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

"""Linear formulas before the LM head or after it: when does running the head on fewer rows pay?

    python scripts/bench_head.py [--size N] [--vocab N] [--dtype NAME] [--seconds S]

For groups of three terms, alternating: the head on all rows and then the fusion of logits, against the
fusion of hidden states and then the head on one row per group.  The last line is one JSON object.  Runs on a
GPU where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import marith_kernels
import torch

from vllm_marith.engine.worker.head import HeadPlan

TERMS = 3
GROUPS = (1, 8, 32, 128)
PROGRAM = marith_kernels.Program([("push", 0, 1.6), ("add", 1, -0.9), ("add", 2, 0.3)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048, help="of a hidden state")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on each number of groups")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weight = torch.randn(
        arguments.vocab, arguments.size, dtype=getattr(torch, arguments.dtype), device=device
    )
    cases = [measure(weight, groups, arguments.seconds) for groups in GROUPS]
    print("groups  after_ms  before_ms  ratio")
    for case in cases:
        print("{groups:6}  {after_ms:8.2f}  {before_ms:9.2f}  {ratio:5.2f}".format_map(case))
    print(json.dumps({"benchmark": "head", "device": str(device), **vars(arguments), "cases": cases}))


@torch.inference_mode()
def measure(weight: torch.Tensor, groups: int, seconds: float) -> dict[str, float]:
    device = weight.device
    rows = [[TERMS * g + t for t in range(TERMS)] for g in range(groups)]
    programs = [PROGRAM] * groups
    hidden = torch.randn(groups * TERMS, weight.shape[1], dtype=weight.dtype, device=device)
    batch = marith_kernels.Batch.build(programs, rows, device)
    plan = HeadPlan.build(programs, rows, len(hidden), device)
    leaders = plan.leaders

    def head(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, weight)

    def after() -> None:
        logits = head(hidden)
        logits.float().index_copy_(0, leaders, marith_kernels.fuse(logits, batch).logits)

    def before() -> None:
        plan.run(head, hidden)

    def timed(function) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(after), timed(before)
    pairs = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 3:
        pairs.append((timed(after), timed(before)))
    return {
        "groups": groups,
        "after_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "before_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


if __name__ == "__main__":
    main()

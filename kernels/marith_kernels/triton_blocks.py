"""What the Triton kernels share: a block of a row, its statistics, the merge by the block that arrives last.

A row is cut into blocks, one program each. A program leaves its block's (max, sum of exponentials, first
argmax) in memory and counts itself; the one that finds all others counted merges the row's blocks. That
spares a launch, which below 64 rows costs more than the work. The counter goes back to 0 by itself, so it
has to be zeroed only once.

Blocks that lie inside the row take a path without masks (FULL): a mask `offs < V` with V not divisible by
16 removes every 128-bit load.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803, SIM108 (Triton: compile-time arguments are upper case, and `if` is one branch compiled)

from __future__ import annotations

import torch
import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def times(weight, ban, value):
    """weight * value; `ban` is what -inf counts as: -inf whatever the weight's sign, 0 under the weight 0."""
    return tl.where(value == NEG_INF, ban, weight * value)


@triton.jit
def load_block(row_ptr, offs, n_columns, FULL: tl.constexpr):
    if FULL:
        x = tl.load(row_ptr + offs)
    else:
        x = tl.load(row_ptr + offs, mask=offs < n_columns, other=NEG_INF)
    return x.to(tl.float32)


@triton.jit
def store_block(row_ptr, offs, n_columns, x, FULL: tl.constexpr):
    if FULL:
        tl.store(row_ptr + offs, x)
    else:
        tl.store(row_ptr + offs, x, mask=offs < n_columns)


@triton.jit
def leave_statistics(x, block, BLOCK: tl.constexpr, max_ptr, sum_ptr, argmax_ptr):
    """Store the block's max, its sum of exp(x - max), and the column of its first maximum."""
    high, at = tl.max(x, axis=0, return_indices=True)
    total = tl.sum(tl.exp(x - tl.where(high == NEG_INF, 0.0, high)), axis=0)
    tl.store(max_ptr + block, high)
    tl.store(sum_ptr + block, total)
    tl.store(argmax_ptr + block, block * BLOCK + at.to(tl.int32))


@triton.jit
def arrives_last(counter_ptr, n_blocks):
    """Count this block; true in the last one of the row, which then sees what all others have stored.

    The barrier orders the stores of this block's threads before the one thread's atomic, whose release
    makes them visible to the device; its acquire does the reverse. What is merged is loaded with
    `volatile`, past the L1.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS: tl.constexpr):
    """(max, mass of every block relative to exp(max), their sum); max is 0 for a row of -inf, whose sum is
    0."""
    k = tl.arange(0, BLOCKS)
    high = tl.load(max_ptr + k, mask=k < n_blocks, other=NEG_INF, volatile=True)
    total = tl.load(sum_ptr + k, mask=k < n_blocks, other=0.0, volatile=True)
    peak = tl.max(high, axis=0)
    peak = tl.where(peak == NEG_INF, 0.0, peak)
    mass = total * tl.exp(high - peak)
    return peak, mass, tl.sum(mass, axis=0)


@triton.jit
def log_sum_exp(peak, total):
    return tl.where(total == 0.0, 0.0, peak + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def first_argmax(max_ptr, argmax_ptr, n_blocks, BLOCKS: tl.constexpr):
    k = tl.arange(0, BLOCKS)
    high = tl.load(max_ptr + k, mask=k < n_blocks, other=NEG_INF, volatile=True)
    best = tl.min(tl.where(high == tl.max(high, axis=0), k, BLOCKS), axis=0)
    return tl.load(argmax_ptr + best, volatile=True)


class Blocks:
    """Room for the statistics of n_rows rows of n_blocks blocks, and a counter for each row."""

    def __init__(self, n_rows: int, n_blocks: int, device: torch.device):
        self.n_blocks = n_blocks
        self.max = torch.empty(n_rows, n_blocks, device=device)
        self.sum = torch.empty(n_rows, n_blocks, device=device)
        self.argmax = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=device)
        self.counter = _counters(n_rows, device)

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return self.max, self.sum, self.argmax, self.counter, self.n_blocks


_zeroed: dict[tuple[torch.device, int], torch.Tensor] = {}


def _counters(n: int, device: torch.device) -> torch.Tensor:
    """At least n zeros (int32), the same ones for every launch on a stream: launches there follow one
    another.

    A CUDA graph keeps those of the stream it was captured on, so two graphs captured on one stream must not
    be replayed at the same time.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    zeros = _zeroed.get((device, stream))
    if zeros is None or zeros.numel() < n:
        zeros = torch.zeros(max(1024, triton.next_power_of_2(n)), dtype=torch.int32, device=device)
        _zeroed[device, stream] = zeros
    return zeros

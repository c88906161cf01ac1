"""The fused operation on CPUs, compiled by numba at first use (about ten seconds a dtype) and cached on disk.

Passes over memory: linear groups read each row once and write the result once; rows under a max or min are
read twice, the first time for their log-sum-exp. Both phases cut the vocabulary into chunks that stay in
the L1 cache while a program runs over them, and threads take chunks off a shared counter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray, types

from . import openmp
from .batch import Batch
from .numba_disk import LIKE, compile_function, compile_task, stamp
from .numba_linear import run_linear
from .numba_math import BLOCK, NEG_INF, ZERO, inline, max_and_sum, pointer, shift_max_and_sum, take
from .numba_program import run_stack, run_stack_n
from .program import Program

CHUNK = 2 * BLOCK  # tokens a program runs over at a time; 8 KiB a stack slot
LSE_CHUNK = 16 * BLOCK
SERIAL_BELOW = 1 << 18  # logits, about 50 us of work; less is not worth waking a thread for


# The arguments of a task travel as one int64 array of addresses and sizes; item 0 is the counter that hands
# out its chunks, so that every thread may run the same task on the same array.


@inline
def _lse_task(args, like):
    (_, logits, stride, item, vocab, rows_at, n_rows, max_at, sum_at) = carray(
        pointer(args, np.int64(0)), (9,)
    )
    n_chunks = (vocab + LSE_CHUNK - 1) // LSE_CHUNK
    rows = carray(pointer(rows_at, np.int32(0)), n_rows)
    part_max = carray(pointer(max_at, ZERO), n_rows * n_chunks)
    part_sum = carray(pointer(sum_at, ZERO), n_rows * n_chunks)
    while True:
        k = take(args)
        if k >= n_rows * n_chunks:
            return
        begin = (k % n_chunks) * LSE_CHUNK
        size = min(LSE_CHUNK, vocab - begin)
        x = carray(pointer(logits + (rows[k // n_chunks] * stride + begin) * item, like), size)
        part_max[k], part_sum[k] = max_and_sum(x)


@inline
def _fuse_task(args, like):
    (
        _, logits, stride, item, vocab, extra, extra_stride, first_extra, n_groups, code_at, n_code, lse_at,
        n_lse, out_at, out_stride, width, depth, max_at, sum_at,
    ) = carray(pointer(args, np.int64(0)), (19,))  # fmt: skip
    uniform = np.float32(-math.log(vocab))
    source = (logits, stride, item, extra, extra_stride, first_extra, uniform)
    n_chunks = (vocab + CHUNK - 1) // CHUNK
    code = carray(pointer(code_at, np.int32(0)), 3 * n_groups + 1 + 3 * n_code)
    offset, code = code[: n_groups + 1], code[n_groups + 1 :]
    flags, leader, code = code[:n_groups], code[n_groups : 2 * n_groups], code[2 * n_groups :]
    op, row, weight = code[:n_code], code[n_code : 2 * n_code], code[2 * n_code :].view(np.float32)
    lse = carray(pointer(lse_at, ZERO), n_lse)
    part_max = carray(pointer(max_at, ZERO), n_groups * n_chunks)
    part_sum = carray(pointer(sum_at, ZERO), n_groups * n_chunks)
    slots = np.empty((2 * depth + 2 if depth else 0, CHUNK), np.float32)
    while True:
        k = take(args)
        if k >= n_groups * n_chunks:
            return
        g, begin = k // n_chunks, (k % n_chunks) * CHUNK
        out = carray(pointer(out_at + (g * out_stride + begin) * 4, ZERO), min(CHUNK, vocab - begin))
        lo, hi = offset[g], offset[g + 1]
        if flags[g] & 1:
            run_linear(out, source, begin, row[lo:hi], weight[lo:hi], like)
            part_max[k], part_sum[k] = max_and_sum(out)
        else:
            if flags[g] & 2:
                run_stack_n(out, slots, source, begin, op[lo:hi], row[lo:hi], weight[lo:hi], lse, like)
            else:
                run_stack(out, slots, source, begin, op[lo:hi], row[lo:hi], weight[lo:hi], lse, like)
            part_max[k], part_sum[k] = shift_max_and_sum(out, lse[leader[g]])
        if begin + CHUNK >= vocab:
            padding = carray(pointer(out_at + (g * out_stride + vocab) * 4, ZERO), width - vocab)
            padding[:] = NEG_INF


@inline
def merge_lse(part_max, part_sum):
    """One row's log-sum-exp from its chunks; 0 for a row of -inf."""
    peak = NEG_INF
    for m in part_max:
        peak = max(peak, m)
    if peak == NEG_INF:
        return ZERO
    total = 0.0
    for c in range(part_max.size):
        if part_max[c] > NEG_INF:
            total += part_sum[c] * math.exp(np.float64(part_max[c]) - np.float64(peak))
    return np.float32(peak + math.log(total))


@inline
def _merge_rows(rows, part_max, part_sum, lse):
    for i in range(rows.size):
        lse[rows[i]] = merge_lse(part_max[i], part_sum[i])


@inline
def _merge_groups(energies, part_max, part_sum, lse, argmax):
    for g in range(argmax.size):
        lse[g] = merge_lse(part_max[g], part_sum[g])
        best = 0
        for c in range(1, part_max.shape[1]):
            if part_max[g, c] > part_max[g, best]:
                best = c
        peak = part_max[g, best]
        argmax[g] = 0
        if peak > NEG_INF:
            token = best * CHUNK
            while token + 1 < energies.shape[1] and energies[g, token] != peak:
                token += 1
            argmax[g] = token


@functools.cache
def tasks(dtype: torch.dtype) -> tuple[Any, Any]:
    """(lse, fuse) for logits of this dtype, see `numba_disk.compile_task`."""
    source, like = stamp(), LIKE[dtype]

    def lse(args):
        if source:
            _lse_task(args, like)

    def fuse(args):
        if source:
            _fuse_task(args, like)

    return compile_task(lse), compile_task(fuse)


@functools.cache
def _merges() -> tuple[Any, Any]:
    """(merge_rows, merge_groups), compiled."""
    source = stamp()
    row, matrix, rows = types.float32[::1], types.float32[:, ::1], types.int32[::1]

    def merge_rows(rows, part_max, part_sum, lse):
        if source:
            _merge_rows(rows, part_max, part_sum, lse)

    def merge_groups(energies, part_max, part_sum, lse, argmax):
        if source:
            _merge_groups(energies, part_max, part_sum, lse, argmax)

    return (
        compile_function(types.void(rows, matrix, matrix, row), merge_rows),
        compile_function(
            types.void(types.float32[:, :], matrix, matrix, row, types.int64[::1]), merge_groups
        ),
    )


def fill_lse(logits: torch.Tensor, batch: Batch, vocab_size: int, lse: np.ndarray) -> None:
    """Writes the log-sum-exps of the batch's `lse_row` into lse, float32 by row."""
    lse_task, _ = tasks(logits.dtype)
    merge_rows, _ = _merges()
    rows = batch.lse_row.numpy()
    part = np.empty((2, rows.size, -(-vocab_size // LSE_CHUNK)), np.float32)
    args = np.array(
        [
            0, logits.data_ptr(), logits.stride(0), logits.element_size(), vocab_size,
            rows.ctypes.data, rows.size, part[0].ctypes.data, part[1].ctypes.data,
        ],
        np.int64,
    )  # fmt: skip
    openmp.run(lse_task, args.ctypes.data, parallel=rows.size * vocab_size > SERIAL_BELOW)
    merge_rows(rows, part[0], part[1], lse)


def fuse(
    logits: torch.Tensor,
    batch: Batch,
    vocab_size: int,
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
    row_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `marith_kernels.fusion.run`; `out` is [G, at least vocab_size]. Returns (lse, argmax)."""
    _, fuse_task = tasks(logits.dtype)
    _, merge_groups = _merges()
    n_groups = batch.n_groups
    shape = (logits.data_ptr(), logits.stride(0), logits.element_size(), vocab_size)
    beside = (0, 0) if extra is None else (extra.data_ptr(), extra.stride(0))
    lse_of = np.zeros(logits.shape[0], np.float32) if row_lse is None else row_lse.numpy()
    if batch.n_lse_rows:
        fill_lse(logits, batch, vocab_size, lse_of)
    part = np.empty((2, n_groups, -(-vocab_size // CHUNK)), np.float32)
    args = np.array(
        [
            0, *shape, *beside, batch.first_extra, n_groups, batch.code.data_ptr(), batch.op.numel(),
            lse_of.ctypes.data, lse_of.size, out.data_ptr(), out.stride(0), out.shape[1], batch.depth,
            part[0].ctypes.data, part[1].ctypes.data,
        ],
        np.int64,
    )  # fmt: skip
    openmp.run(fuse_task, args.ctypes.data, parallel=batch.op.numel() * vocab_size > SERIAL_BELOW)
    lse, argmax = torch.empty(n_groups), torch.empty(n_groups, dtype=torch.int64)
    merge_groups(out.numpy(), part[0], part[1], lse.numpy(), argmax.numpy())
    return lse, argmax


def warmup(dtypes: Sequence[torch.dtype]) -> None:
    """Compile, or load from numba's cache, everything that `fuse` needs for logits of these dtypes."""
    batch = Batch.build([Program([("push", 0, 1.0), ("max", 0, 1.0)])], [[0]])
    for dtype in dtypes:
        fuse(torch.zeros(1, 8, dtype=dtype), batch, 8, torch.empty(1, 8))

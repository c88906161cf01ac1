"""`StagedBatch.replace` on CPUs: every group's formula over its leader's row, and its peak, in one task.

A thread takes a whole group where there are enough of them: the log-sum-exps of its rows and the program
over them then read memory once, and the threads of the pool wake once a step. Else the log-sum-exps are a
task of their own, and threads take parts of a group's vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray

from . import openmp
from .batch import NO_EXTRA, Batch
from .numba_cpu import CHUNK, LSE_CHUNK, SERIAL_BELOW, fill_lse, merge_lse
from .numba_disk import LIKE, compile_task, stamp
from .numba_linear import MINUS_ZERO, run_linear
from .numba_math import NEG_INF, ZERO, inline, max_and_sum, maximum, pointer, take, widen
from .numba_program import run_stack, run_stack_n
from .numba_rows import logits_row
from .program import WEIGHTLESS

INF = np.float32(np.inf)
NAN = np.float32(np.nan)
UNKNOWN = np.float32(-np.inf)  # which no row has for its log-sum-exp
_ARGUMENTS = 19
ENOUGH = 4  # groups a thread that keep all threads about equally busy


@inline
def _unbounded(x):
    """Whether any of these numbers is NaN or +inf."""
    found = np.int32(0)
    for i in range(x.size):
        found |= np.int32(0) if widen(x[i]) < INF else np.int32(1)
    return found != 0


@inline
def _lse(source, row, vocab, like):
    """As `numba_cpu.fill_lse` computes it, to the last bit."""
    n_chunks = (vocab + LSE_CHUNK - 1) // LSE_CHUNK
    part_max, part_sum = np.empty(n_chunks, np.float32), np.empty(n_chunks, np.float32)
    for k in range(n_chunks):
        begin = k * LSE_CHUNK
        x = logits_row(source, begin, row, min(LSE_CHUNK, vocab - begin), like)
        part_max[k], part_sum[k] = max_and_sum(x)
    return merge_lse(part_max, part_sum)


@inline
def _put(out, energies, shift):
    """out := energies + shift; returns their maximum, +inf where any of them is NaN or +inf."""
    high, found = NEG_INF, np.int32(0)
    for i in range(out.size):
        value = energies[i] + shift
        high = maximum(high, value)
        found |= np.int32(0) if value < INF else np.int32(1)
        out[i] = value
    return high if found == 0 else INF


@inline
def _replace_task(args, like):
    arguments = carray(pointer(args, np.int64(0)), (_ARGUMENTS,))
    (
        _, _, logits, stride, item, vocab, n_groups, code_at, n_code, lse_at, n_lse, rows_at, n_terms,
        into_at, into_stride, depth, n_parts, part_size, peaks_at,
    ) = arguments  # fmt: skip
    uniform = np.float32(-math.log(vocab))
    source = (logits, stride, item, np.int64(0), np.int64(0), np.int64(NO_EXTRA), uniform)
    code = carray(pointer(code_at, np.int32(0)), 3 * n_groups + 1 + 3 * n_code)
    offset, code = code[: n_groups + 1], code[n_groups + 1 :]
    flags, leader, code = code[:n_groups], code[n_groups : 2 * n_groups], code[2 * n_groups :]
    op, row, weight = code[:n_code], code[n_code : 2 * n_code], code[2 * n_code :].view(np.float32)
    lse = carray(pointer(lse_at, ZERO), n_lse)
    rows = carray(pointer(rows_at, np.int64(0)), (n_groups, n_terms))
    peaks = carray(pointer(peaks_at, ZERO), n_groups * n_parts)
    slots = np.empty((2 * depth + 2 if depth else 0, CHUNK), np.float32)
    energies = np.empty(CHUNK, np.float32)
    while True:
        k = take(args)
        if k >= n_groups * n_parts:
            return
        g, first = k // n_parts, (k % n_parts) * part_size
        lo, hi = offset[g], offset[g + 1]
        linear = flags[g] & 1 != 0
        if n_parts == 1 and not linear:
            for t in range(n_terms):
                lse[rows[g, t]] = UNKNOWN
            lse[leader[g]] = _lse(source, leader[g], vocab, like)
            for i in range(lo, hi):
                r = row[i]
                if r >= 0 and lse[r] == UNKNOWN and op[i] & WEIGHTLESS == 0:
                    lse[r] = _lse(source, r, vocab, like)
        peak, unsound = NEG_INF, False
        for begin in range(first, min(vocab, first + part_size), CHUNK):
            n = min(CHUNK, vocab - begin)
            out = energies[:n]
            for t in range(n_terms):
                if t > 0 and rows[g, t] == rows[g, 0]:
                    break  # the rest is padding
                if _unbounded(logits_row(source, begin, rows[g, t], n, like)):
                    unsound = True
            if linear:
                run_linear(out, source, begin, row[lo:hi], weight[lo:hi], like)
                shift = MINUS_ZERO
            else:
                if flags[g] & 2:
                    run_stack_n(out, slots, source, begin, op[lo:hi], row[lo:hi], weight[lo:hi], lse, like)
                else:
                    run_stack(out, slots, source, begin, op[lo:hi], row[lo:hi], weight[lo:hi], lse, like)
                shift = lse[leader[g]]
            # Only now: the leader's logits may be what is written over.
            target = carray(pointer(into_at + (rows[g, 0] * into_stride + begin) * 4, ZERO), n)
            peak = max(peak, _put(target, out, shift))
        peaks[k] = NAN if unsound else peak
        if unsound or peak == INF:
            arguments[1] = 0  # not all sound; whoever writes it writes the same


@functools.cache
def _task(dtype: torch.dtype) -> Any:
    source, like = stamp(), LIKE[dtype]

    def replace(args):
        if source:
            _replace_task(args, like)

    return compile_task(replace)


class Replacement:
    """`StagedBatch.replace` of a batch without extra rows, as often as its rows stay the same.

    A step calls it once, with cold caches: what does not change from call to call is found out beforehand.

    Args:
        rows: int64 [G, n], the rows of each group's terms, filled up with its first.
    """

    def __init__(self, batch: Batch, rows: torch.Tensor) -> None:
        self.batch = batch
        self.rows = rows
        self.n_code = batch.op.numel()
        self.lse = torch.empty(batch.n_rows)
        self.places = (
            *(batch.code.data_ptr(), self.n_code),
            *(self.lse.data_ptr(), batch.n_rows),
            *(rows.data_ptr(), rows.shape[1]),
        )

    def __call__(self, logits: torch.Tensor, into: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The peaks, and whether all of them are below +inf."""
        n_groups, vocab_size = self.batch.n_groups, logits.shape[1]
        parallel = self.n_code * vocab_size > SERIAL_BELOW
        whole = not parallel or n_groups >= ENOUGH * openmp.available_threads()
        part_size = vocab_size if whole else CHUNK
        n_parts = -(-vocab_size // part_size)
        peaks = torch.empty(n_groups, n_parts)
        if self.batch.n_lse_rows and not whole:
            fill_lse(logits, self.batch, vocab_size, self.lse.numpy())
        args = np.array(
            [
                0, 1, logits.data_ptr(), logits.stride(0), logits.element_size(), vocab_size, n_groups,
                *self.places, into.data_ptr(), into.stride(0), self.batch.depth, n_parts, part_size,
                peaks.data_ptr(),
            ],
            np.int64,
        )  # fmt: skip
        openmp.run(_task(logits.dtype), args.ctypes.data, parallel=parallel)
        return (peaks.view(n_groups) if whole else peaks.amax(1)), bool(args[1])


def warmup(dtypes: Sequence[torch.dtype]) -> None:
    """Compile, or load from numba's cache, what `replace` needs for logits of these dtypes."""
    for dtype in dtypes:
        _task(dtype)

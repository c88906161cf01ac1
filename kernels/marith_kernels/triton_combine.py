"""Rows of terms in, one row of energies a group out: one pass, with the statistics of the new row on the way.

`combine_linear` is for batches of weighted sums of up to 8 terms: all loads are issued up front.
`combine_program` runs any program with its stack in registers; the number of slots is the only thing it is
compiled for. Nothing is compiled for a formula: a formula is data.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803, RUF005 (Triton: compile-time arguments are upper case, and tuples know no unpacking)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .batch import Batch
from .program import ADD, MAX, MIN, POP_ADD, POP_MAX, PUSH, SCALE
from .triton_blocks import (
    NEG_INF,
    Blocks,
    arrives_last,
    first_argmax,
    leave_statistics,
    log_sum_exp,
    merge_statistics,
    store_block,
    times,
)

MAX_TERMS = 8  # of combine_linear
SLOTS = (1, 2, 3, 4, 8, 32)  # of combine_program

_ADD, _MAX, _MIN, _PUSH = (tl.constexpr(op) for op in (ADD, MAX, MIN, PUSH))
_POP_ADD, _POP_MAX, _SCALE = (tl.constexpr(op) for op in (POP_ADD, POP_MAX, SCALE))


@triton.jit
def _load_leaf(x_ptr, x_stride, row, offs, V, FULL: tl.constexpr):
    """A block of a row of logits; 1 for row -1, the number one."""
    is_row = tl.broadcast_to(row, offs.shape) >= 0  # as a tensor: the interpreter has no `tensor & scalar`
    if not FULL:
        is_row = is_row & (offs < V)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + offs, mask=is_row, other=1.0)  # int64: see lse_kernel
    return x.to(tl.float32)


@triton.jit
def _finish_block(
    energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    if not FULL:
        energy = tl.where(offs < V, energy, NEG_INF)
    store_block(out_row, offs, V, energy, FULL)
    leave_statistics(energy, b, BLOCK, max_ptr, sum_ptr, argmax_ptr)


@triton.jit
def _finish_row(
    g, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, counter_ptr, n_blocks, lse_ptr, best_ptr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The last block pads the row with -inf; the block that arrives last merges the row's statistics."""
    if b == n_blocks - 1:
        for start in range(V, width, BLOCK):
            padding = start + tl.arange(0, BLOCK)
            tl.store(out_row + padding, tl.full([BLOCK], NEG_INF, tl.float32), mask=padding < width)
    if arrives_last(counter_ptr + g, n_blocks):
        peak, _, total = merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS)
        tl.store(lse_ptr + g, log_sum_exp(peak, total))
        tl.store(best_ptr + g, first_argmax(max_ptr, argmax_ptr, n_blocks, BLOCKS).to(tl.int64))


@triton.jit
def _sum_block(x_ptr, x_stride, row_ptr, weight_ptr, n, offs, V, TERMS: tl.constexpr, FULL: tl.constexpr):
    energy = tl.zeros([1], tl.float32)
    for t in tl.static_range(TERMS):
        # a term beyond the formula is the number one times -0.0, which changes no other number, not even -0.0
        row = tl.load(row_ptr + t, mask=t < n, other=-1)
        weight = tl.load(weight_ptr + t, mask=t < n, other=-(2**31)).to(tl.float32, bitcast=True)
        x = _load_leaf(x_ptr, x_stride, row, offs, V, FULL)
        term = times(weight, NEG_INF, x)
        energy = term if t == 0 else energy + term
    return energy


@triton.jit(do_not_specialize=["n_groups", "n_code", "width", "n_blocks"])
def combine_linear(
    x_ptr,
    x_stride,
    code_ptr,  # int32: `Batch.code`
    n_groups,
    n_code,
    out_ptr,  # float32 [G, width]
    out_stride,
    width,
    lse_ptr,  # float32 [G]
    best_ptr,  # int64 [G]
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TERMS: tl.constexpr,
):
    b = tl.program_id(0)
    g = tl.program_id(1)
    first = tl.load(code_ptr + g)
    n = tl.load(code_ptr + g + 1) - first
    row_ptr = code_ptr + 3 * n_groups + 1 + n_code + first
    offs = b * BLOCK + tl.arange(0, BLOCK)
    out_row = out_ptr + g.to(tl.int64) * out_stride
    max_ptr += g * n_blocks
    sum_ptr += g * n_blocks
    argmax_ptr += g * n_blocks
    if (b + 1) * BLOCK <= V:
        energy = _sum_block(x_ptr, x_stride, row_ptr, row_ptr + n_code, n, offs, V, TERMS, FULL=True)
        _finish_block(energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK, FULL=True)
    else:
        energy = _sum_block(x_ptr, x_stride, row_ptr, row_ptr + n_code, n, offs, V, TERMS, FULL=False)
        _finish_block(energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK, FULL=False)
    _finish_row(
        g, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, counter_ptr, n_blocks, lse_ptr, best_ptr,
        BLOCK, BLOCKS,
    )  # fmt: skip


@triton.jit
def _run_program(
    x_ptr, x_stride, lse_ptr, op_ptr, n_code, n, linear, offs, V,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, DIVIDE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The top slot at the end: its E and, with DIVIDE, its N.

    The slots below the top are `saved`, the newest first. Each is a tensor of its own from the start: a
    slot that is only another name for one (`s0 = acc`) is not carried through the loop by the compiler,
    though the interpreter carries it. tests/kernels/compile_only.py counts the carried tensors.
    """
    energy = tl.zeros([BLOCK], tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    saved = ()
    saved_n = ()
    for _ in tl.static_range(SLOTS - 1):
        saved = saved + (tl.zeros([BLOCK], tl.float32),)
        if DIVIDE:
            saved_n = saved_n + (tl.zeros([BLOCK], tl.float32),)
    for pc in range(n):
        op = tl.load(op_ptr + pc)
        row = tl.load(op_ptr + n_code + pc)
        weight = tl.load(op_ptr + 2 * n_code + pc).to(tl.float32, bitcast=True)
        ban = tl.where(weight == 0.0, 0.0, NEG_INF)
        if op <= _PUSH:
            x = _load_leaf(x_ptr, x_stride, row, offs, V, FULL)
            x = x - tl.load(lse_ptr + row, mask=(row >= 0) & (linear == 0), other=0.0)
            value = times(weight, ban, x)
            if op == _PUSH:
                if SLOTS > 1:
                    saved = (energy,) + saved[:-1]
                energy = value
                if DIVIDE:
                    if SLOTS > 1:
                        saved_n = (weight_sum,) + saved_n[:-1]
                    weight_sum = tl.full([BLOCK], 0.0, tl.float32) + weight
            elif op == _ADD:
                energy = energy + value
                if DIVIDE:
                    weight_sum = weight_sum + weight
            elif op == _MAX:
                if DIVIDE:
                    weight_sum = tl.where(value > energy, weight, weight_sum)
                energy = tl.maximum(energy, value)
            else:
                if DIVIDE:
                    weight_sum = tl.where(value < energy, weight, weight_sum)
                energy = tl.minimum(energy, value)
        elif op == _SCALE:
            energy = times(weight, ban, energy)
            if DIVIDE:
                weight_sum = weight * weight_sum
        else:
            if SLOTS > 1:
                value = times(weight, ban, energy)
                below = saved[0]
                if DIVIDE:
                    value_n = weight * weight_sum
                    below_n = saved_n[0]
                if op == _POP_ADD:
                    energy = below + value
                    if DIVIDE:
                        weight_sum = below_n + value_n
                elif op == _POP_MAX:
                    if DIVIDE:
                        weight_sum = tl.where(value > below, value_n, below_n)
                    energy = tl.maximum(below, value)
                else:
                    if DIVIDE:
                        weight_sum = tl.where(value < below, value_n, below_n)
                    energy = tl.minimum(below, value)
                saved = saved[1:] + (saved[SLOTS - 2],)
                if DIVIDE:
                    saved_n = saved_n[1:] + (saved_n[SLOTS - 2],)
    return energy, weight_sum


@triton.jit(do_not_specialize=["n_groups", "n_code", "width", "n_blocks"])
def combine_program(
    x_ptr,
    x_stride,
    row_lse_ptr,  # float32 [R]
    code_ptr,  # int32: `Batch.code`
    n_groups,
    n_code,
    out_ptr,  # float32 [G, width]
    out_stride,
    width,
    lse_ptr,  # float32 [G]
    best_ptr,  # int64 [G]
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    b = tl.program_id(0)
    g = tl.program_id(1)
    first = tl.load(code_ptr + g)
    n = tl.load(code_ptr + g + 1) - first
    flags = tl.load(code_ptr + n_groups + 1 + g)
    leader = tl.load(code_ptr + 2 * n_groups + 1 + g)
    op_ptr = code_ptr + 3 * n_groups + 1 + first
    linear = flags & 1
    shift = tl.load(row_lse_ptr + leader, mask=leader >= 0, other=0.0)
    offs = b * BLOCK + tl.arange(0, BLOCK)
    out_row = out_ptr + g.to(tl.int64) * out_stride
    max_ptr += g * n_blocks
    sum_ptr += g * n_blocks
    argmax_ptr += g * n_blocks
    if (b + 1) * BLOCK <= V:
        energy, weight_sum = _run_program(
            x_ptr, x_stride, row_lse_ptr, op_ptr, n_code, n, linear, offs, V, BLOCK, SLOTS, DIVIDE, FULL=True
        )
        if DIVIDE:
            energy = tl.where(tl.broadcast_to(flags, offs.shape) >= 2, energy / weight_sum, energy)
        # not + 0.0, which would turn -0.0 into 0.0
        energy = tl.where(tl.broadcast_to(linear, offs.shape) != 0, energy, energy + shift)
        _finish_block(energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK, FULL=True)
    else:
        energy, weight_sum = _run_program(
            x_ptr, x_stride, row_lse_ptr, op_ptr, n_code, n, linear, offs, V, BLOCK, SLOTS, DIVIDE, FULL=False
        )
        if DIVIDE:
            energy = tl.where(tl.broadcast_to(flags, offs.shape) >= 2, energy / weight_sum, energy)
        # not + 0.0, which would turn -0.0 into 0.0
        energy = tl.where(tl.broadcast_to(linear, offs.shape) != 0, energy, energy + shift)
        _finish_block(energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK, FULL=False)
    _finish_row(
        g, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, counter_ptr, n_blocks, lse_ptr, best_ptr,
        BLOCK, BLOCKS,
    )  # fmt: skip


def block_size(slots: int, divide: bool) -> int:
    """Tokens a program of 4 warps holds so that its stack stays in registers."""
    tensors = slots * (2 if divide else 1)
    return 2048 if tensors <= 3 else 1024 if tensors <= 6 else 512 if tensors <= 16 else 128


def combine(
    logits: torch.Tensor, row_lse: torch.Tensor | None, batch: Batch, vocab_size: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `out`, one launch; returns (lse, argmax). `row_lse` may be None for a batch of linear programs."""
    device = logits.device
    plain = batch.linear and batch.n_longest <= MAX_TERMS
    slots = next(s for s in SLOTS if s >= max(batch.depth, 1))
    block = 2048 if plain else block_size(slots, batch.any_divide)
    blocks = Blocks(batch.n_groups, triton.cdiv(vocab_size, block), device)
    lse = torch.empty(batch.n_groups, device=device)
    argmax = torch.empty(batch.n_groups, dtype=torch.int64, device=device)
    grid = (blocks.n_blocks, batch.n_groups)
    code = (batch.code, batch.n_groups, batch.op.numel())
    result = (out, out.stride(0), out.shape[1], lse, argmax)
    n_blocks = triton.next_power_of_2(blocks.n_blocks)
    if plain:
        combine_linear[grid](
            logits, logits.stride(0), *code, *result, *blocks.arguments, vocab_size,
            BLOCK=block, BLOCKS=n_blocks, TERMS=triton.next_power_of_2(max(batch.n_longest, 1)), num_warps=4,
        )  # fmt: skip
    else:
        row_lse = lse if row_lse is None else row_lse  # never read for linear programs
        combine_program[grid](
            logits, logits.stride(0), row_lse, *code, *result, *blocks.arguments, vocab_size,
            BLOCK=block, BLOCKS=n_blocks, SLOTS=slots, DIVIDE=batch.any_divide, num_warps=4,
        )  # fmt: skip
    return lse, argmax

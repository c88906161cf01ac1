"""Rows of terms in, one row of energies a group out: one pass, with the statistics of the new row on the way.

`combine_linear` is for batches of weighted sums of up to 8 terms: all loads are issued up front.
`combine_program` runs any program with its stack in registers; the number of slots is the only thing it is
compiled for, and whether a batch is `extended`. Nothing is compiled for a formula: a formula is data.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803 (Triton: compile-time arguments are upper case)

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .batch import Batch
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
from .triton_program import load_leaf, run_program

MAX_TERMS = 8  # of combine_linear
SLOTS = (1, 2, 3, 4, 8, 32)  # of combine_program
EXTENDED_SLOTS = (2, 4, 8, 32)  # of combine_program with EXTENDED


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
        x = load_leaf(x_ptr, x_stride, row, offs, V, FULL)
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


@triton.jit(do_not_specialize=["first_extra", "n_groups", "n_code", "width", "n_blocks"])
def combine_program(
    x_ptr,
    x_stride,
    extra_ptr,  # float32: extra rows, read with EXTENDED only
    extra_stride,
    first_extra,  # number of the first of them
    uniform,  # energy of UNIFORM
    row_lse_ptr,  # float32 [R], or [first_extra + S] with extra rows
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
    EXTENDED: tl.constexpr,
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
        energy, weight_sum = run_program(
            x_ptr, x_stride, extra_ptr, extra_stride, first_extra, uniform, row_lse_ptr, op_ptr, n_code, n,
            linear, offs, V, BLOCK, SLOTS, DIVIDE, EXTENDED, FULL=True,
        )  # fmt: skip
        if DIVIDE:
            energy = tl.where(tl.broadcast_to(flags, offs.shape) >= 2, energy / weight_sum, energy)
        # not + 0.0, which would turn -0.0 into 0.0
        energy = tl.where(tl.broadcast_to(linear, offs.shape) != 0, energy, energy + shift)
        _finish_block(energy, offs, b, V, width, out_row, max_ptr, sum_ptr, argmax_ptr, BLOCK, FULL=True)
    else:
        energy, weight_sum = run_program(
            x_ptr, x_stride, extra_ptr, extra_stride, first_extra, uniform, row_lse_ptr, op_ptr, n_code, n,
            linear, offs, V, BLOCK, SLOTS, DIVIDE, EXTENDED, FULL=False,
        )  # fmt: skip
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
    logits: torch.Tensor,
    row_lse: torch.Tensor | None,
    batch: Batch,
    vocab_size: int,
    out: torch.Tensor,
    extra: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `out`, one launch; returns (lse, argmax). `row_lse` may be None for a batch of linear programs."""
    device = logits.device
    plain = batch.linear and not batch.extended and batch.n_longest <= MAX_TERMS
    slots = next(s for s in (EXTENDED_SLOTS if batch.extended else SLOTS) if s >= max(batch.depth, 1))
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
        extra = out if extra is None else extra  # never read either
        beside = (extra, extra.stride(0), batch.first_extra, -math.log(vocab_size))
        combine_program[grid](
            logits, logits.stride(0), *beside, row_lse, *code, *result, *blocks.arguments, vocab_size,
            BLOCK=block, BLOCKS=n_blocks, SLOTS=slots, DIVIDE=batch.any_divide, EXTENDED=batch.extended,
            num_warps=4,
        )  # fmt: skip
    return lse, argmax

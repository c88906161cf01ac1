"""Log-sum-exp of the rows that stand under a max or a min: one read of each, one exp an element."""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803 (compile-time arguments of a Triton kernel are upper case)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .batch import Batch
from .triton_blocks import (
    Blocks,
    arrives_last,
    leave_statistics,
    load_block,
    log_sum_exp,
    merge_statistics,
)

BLOCK = 4096


@triton.jit(do_not_specialize=["first_row", "n_blocks"])
def lse_kernel(
    x_ptr,
    x_stride,
    code_ptr,  # int32: `Batch.code`; a view of it would be aligned now and then, and compiled for twice
    first_row,  # where the rows to read begin in it
    lse_ptr,  # float32 [R] out, at the rows read
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    b = tl.program_id(0)
    i = tl.program_id(1)
    row = tl.load(code_ptr + first_row + i)
    x_row = x_ptr + row.to(tl.int64) * x_stride  # int64: rows * vocabulary overflows int32
    offs = b * BLOCK + tl.arange(0, BLOCK)
    max_ptr += i * n_blocks
    sum_ptr += i * n_blocks
    if (b + 1) * BLOCK <= V:
        x = load_block(x_row, offs, V, FULL=True)
        leave_statistics(x, b, BLOCK, max_ptr, sum_ptr, argmax_ptr + i * n_blocks)
    else:
        x = load_block(x_row, offs, V, FULL=False)
        leave_statistics(x, b, BLOCK, max_ptr, sum_ptr, argmax_ptr + i * n_blocks)
    if arrives_last(counter_ptr + i, n_blocks):
        peak, _, total = merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS)
        tl.store(lse_ptr + row, log_sum_exp(peak, total))


def fill(row_lse: torch.Tensor, logits: torch.Tensor, batch: Batch, vocab_size: int) -> None:
    """Fill in row_lse, float32 [>= R], at `batch.lse_row`; 0 for a row of -inf."""
    blocks = Blocks(batch.n_lse_rows, triton.cdiv(vocab_size, BLOCK), logits.device)
    lse_kernel[(blocks.n_blocks, batch.n_lse_rows)](
        logits,
        logits.stride(0),
        batch.code,
        batch.code.numel() - batch.n_lse_rows,
        row_lse,
        *blocks.arguments,
        vocab_size,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks.n_blocks),
        num_warps=4,
    )

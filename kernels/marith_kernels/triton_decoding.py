"""Sampling and speculative decoding on GPUs. `sample` is 1 launch, `verify` 3, `residual` 1."""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803 (compile-time arguments of a Triton kernel are upper case)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import decoding
from .triton_blocks import (
    NEG_INF,
    Blocks,
    arrives_last,
    first_argmax,
    leave_statistics,
    load_block,
    log_sum_exp,
    merge_statistics,
    store_block,
)

BLOCK = decoding.SAMPLE_BLOCK

# Small arrays that callers bring, perhaps as slices: their alignment must not have a kernel compiled anew.
_ANY_ALIGNMENT = (
    "uniform_ptr",
    "temperature_ptr",
    "token_ptr",
    "start_ptr",
    "accepted_ptr",
    "target_lse_ptr",
    "best_ptr",
    "draft_lse_ptr",
)


@triton.jit
def _inverse(temperature_ptr, n, TEMPERED: tl.constexpr):
    """(1 / T of request n, whether T is 0); 1 for T = 0, whose rows are used as they are."""
    inverse = 1.0
    greedy = False
    if TEMPERED:
        temperature = tl.load(temperature_ptr + n)
        greedy = temperature == 0.0
        inverse = 1.0 / tl.where(greedy, 1.0, temperature)
    return inverse, greedy


@triton.jit
def _first_above(mass, u, N: tl.constexpr):
    """The first position of positive mass where the cumulated mass exceeds u * its sum; the last such at
    least.

    Asking for positive mass is no formality: sums of a parallel scan need not be monotone in the last bit,
    and a forbidden token could else be drawn.
    """
    k = tl.arange(0, N)
    above = (tl.cumsum(mass, axis=0) > u * tl.sum(mass, axis=0)) & (mass > 0.0)
    first = tl.min(tl.where(above, k, N), axis=0)
    last = tl.max(tl.where(mass > 0.0, k, 0), axis=0)
    return tl.minimum(first, last)


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def sample_kernel(
    x_ptr,
    x_stride,
    uniform_ptr,  # float32 [N, 2]
    temperature_ptr,  # float32 [N]
    token_ptr,  # int64 [N] out
    logprob_ptr,  # float32 [N] out
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    b = tl.program_id(0)
    n = tl.program_id(1)
    inverse, greedy = _inverse(temperature_ptr, n, TEMPERED)
    x_row = x_ptr + n.to(tl.int64) * x_stride
    max_ptr += n * n_blocks
    sum_ptr += n * n_blocks
    argmax_ptr += n * n_blocks
    offs = b * BLOCK + tl.arange(0, BLOCK)
    if (b + 1) * BLOCK <= V:
        leave_statistics(
            load_block(x_row, offs, V, FULL=True) * inverse, b, BLOCK, max_ptr, sum_ptr, argmax_ptr
        )
    else:
        leave_statistics(
            load_block(x_row, offs, V, FULL=False) * inverse, b, BLOCK, max_ptr, sum_ptr, argmax_ptr
        )
    if arrives_last(counter_ptr + n, n_blocks):
        peak, mass, total = merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS)
        block = _first_above(mass, tl.load(uniform_ptr + 2 * n), BLOCKS)
        offs = block * BLOCK + tl.arange(0, BLOCK)
        z = load_block(x_row, offs, V, FULL=False) * inverse
        high = tl.max(z, axis=0)
        p = tl.exp(z - tl.where(high == NEG_INF, 0.0, high))
        at = _first_above(p, tl.load(uniform_ptr + 2 * n + 1), BLOCK)
        chosen = tl.max(tl.where(tl.arange(0, BLOCK) == at, z, NEG_INF), axis=0)
        token = block * BLOCK + at
        logprob = chosen - log_sum_exp(peak, total)
        if TEMPERED:
            token = tl.where(greedy, first_argmax(max_ptr, argmax_ptr, n_blocks, BLOCKS), token)
            logprob = tl.where(greedy & (total > 0.0), 0.0, logprob)
        tl.store(token_ptr + n, token.to(tl.int64))
        tl.store(logprob_ptr + n, logprob)


def sample(logits, uniform, temperature, vocab_size):
    blocks = Blocks(logits.shape[0], triton.cdiv(vocab_size, BLOCK), logits.device)
    token = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    logprob = torch.empty(logits.shape[0], device=logits.device)
    sample_kernel[(blocks.n_blocks, logits.shape[0])](
        logits, logits.stride(0), uniform.contiguous(), _tensor(temperature, logprob), token, logprob,
        *blocks.arguments, vocab_size,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks.n_blocks), TEMPERED=temperature is not None,
        num_warps=8,
    )  # fmt: skip
    return token, logprob


def _tensor(temperature: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """A kernel that is compiled without temperatures still takes a pointer."""
    return unused if temperature is None else temperature


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def statistics_kernel(
    x_ptr,
    x_stride,
    start_ptr,  # int32 [N + 1]
    temperature_ptr,  # float32 [N]
    lse_ptr,  # float32 [rows] out
    best_ptr,  # int64 [rows] out
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TEMPERED: tl.constexpr,
    MISSING: tl.constexpr,  # 0 for the target's rows, 1 for the draft's, which are one fewer a request
):
    b = tl.program_id(0)
    t = tl.program_id(1)
    n = tl.program_id(2)
    first = tl.load(start_ptr + n)
    if t < tl.load(start_ptr + n + 1) - first - MISSING:
        row = first - MISSING * n + t
        inverse, _greedy = _inverse(temperature_ptr, n, TEMPERED)
        x_row = x_ptr + row.to(tl.int64) * x_stride
        max_ptr += row * n_blocks
        sum_ptr += row * n_blocks
        argmax_ptr += row * n_blocks
        offs = b * BLOCK + tl.arange(0, BLOCK)
        if (b + 1) * BLOCK <= V:
            x = load_block(x_row, offs, V, FULL=True)
            leave_statistics(x * inverse, b, BLOCK, max_ptr, sum_ptr, argmax_ptr)
        else:
            x = load_block(x_row, offs, V, FULL=False)
            leave_statistics(x * inverse, b, BLOCK, max_ptr, sum_ptr, argmax_ptr)
        if arrives_last(counter_ptr + row, n_blocks):
            peak, _mass, total = merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS)
            tl.store(lse_ptr + row, log_sum_exp(peak, total))
            tl.store(best_ptr + row, first_argmax(max_ptr, argmax_ptr, n_blocks, BLOCKS).to(tl.int64))


def _statistics(x, start, temperature, vocab_size, positions, missing):
    blocks = Blocks(x.shape[0], triton.cdiv(vocab_size, BLOCK), x.device)
    lse = torch.empty(x.shape[0], device=x.device)
    best = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    if positions and x.shape[0]:
        statistics_kernel[(blocks.n_blocks, positions, start.numel() - 1)](
            x, x.stride(0), start, _tensor(temperature, lse), lse, best, *blocks.arguments, vocab_size,
            BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks.n_blocks), TEMPERED=temperature is not None,
            MISSING=missing, num_warps=4,
        )  # fmt: skip
    return lse, best


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def accept_kernel(
    target_ptr,
    target_stride,
    draft_ptr,
    draft_stride,
    token_ptr,  # int64 [drafted]
    uniform_ptr,  # float32 [drafted]
    start_ptr,
    temperature_ptr,
    target_lse_ptr,
    best_ptr,
    draft_lse_ptr,
    accepted_ptr,  # int64 [N] out
    POSITIONS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    n = tl.program_id(0)
    first = tl.load(start_ptr + n)
    k = tl.load(start_ptr + n + 1) - first - 1
    inverse, greedy = _inverse(temperature_ptr, n, TEMPERED)
    t = tl.arange(0, POSITIONS)
    drafted = t < k
    row = first + t
    draft_row = first - n + t
    x = tl.load(token_ptr + draft_row, mask=drafted, other=0)
    p = tl.load(target_ptr + row.to(tl.int64) * target_stride + x, mask=drafted, other=NEG_INF).to(tl.float32)
    q = tl.load(draft_ptr + draft_row.to(tl.int64) * draft_stride + x, mask=drafted, other=0.0).to(tl.float32)
    p = p * inverse - tl.load(target_lse_ptr + row, mask=drafted, other=0.0)
    q = q * inverse - tl.load(draft_lse_ptr + draft_row, mask=drafted, other=0.0)
    u = tl.load(uniform_ptr + draft_row, mask=drafted, other=0.0)
    possible = p != NEG_INF
    ok = (u < tl.exp(tl.where(possible, p, 0.0) - q)) & possible
    if TEMPERED:
        ok = tl.where(greedy, x == tl.load(best_ptr + row, mask=drafted, other=-1), ok)
    rejected = tl.min(tl.where(ok & drafted, POSITIONS, t), axis=0)
    tl.store(accepted_ptr + n, tl.minimum(rejected, k).to(tl.int64))


def verify(target, draft, tokens, start, uniform, max_drafted, temperature, vocab_size):
    target_lse, best = _statistics(target, start, temperature, vocab_size, max_drafted + 1, 0)
    draft_lse, _ = _statistics(draft, start, temperature, vocab_size, max_drafted, 1)
    accepted = torch.empty(start.numel() - 1, dtype=torch.int64, device=target.device)
    accept_kernel[(start.numel() - 1,)](
        target, target.stride(0), draft, draft.stride(0), tokens.contiguous(), uniform.contiguous(), start,
        _tensor(temperature, target_lse), target_lse, best, draft_lse, accepted,
        POSITIONS=triton.next_power_of_2(max(max_drafted, 1)), TEMPERED=temperature is not None, num_warps=1,
    )  # fmt: skip
    return accepted, target_lse, best, draft_lse


@triton.jit
def _log_p(row_ptr, offs, V, inverse, lse, FULL: tl.constexpr):
    return load_block(row_ptr, offs, V, FULL) * inverse - lse


@triton.jit
def _residual_block(
    target_row, draft_row, out_row, target_lse, draft_lse, inverse, rejected, b, V, max_ptr, sum_ptr,
    argmax_ptr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offs = b * BLOCK + tl.arange(0, BLOCK)
    p = _log_p(target_row, offs, V, inverse, target_lse, FULL)
    if rejected:
        q = _log_p(draft_row, offs, V, inverse, draft_lse, FULL)
        more = p > q  # false also where both are -inf
        ratio = tl.exp(tl.where(more & (q != NEG_INF), q - p, NEG_INF))
        p = tl.where(more, p + tl.log(1.0 - ratio), NEG_INF)
    store_block(out_row, offs, V, p, FULL)
    leave_statistics(p, b, BLOCK, max_ptr, sum_ptr, argmax_ptr)


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def residual_kernel(
    target_ptr,
    target_stride,
    draft_ptr,
    draft_stride,
    start_ptr,
    temperature_ptr,
    target_lse_ptr,
    best_ptr,
    draft_lse_ptr,
    accepted_ptr,
    out_ptr,  # float32 [N, V]
    out_stride,
    max_ptr,
    sum_ptr,
    argmax_ptr,
    counter_ptr,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    b = tl.program_id(0)
    n = tl.program_id(1)
    first = tl.load(start_ptr + n)
    row = first + tl.load(accepted_ptr + n)
    rejected = row + 1 < tl.load(start_ptr + n + 1)
    inverse, greedy = _inverse(temperature_ptr, n, TEMPERED)
    target_lse = tl.load(target_lse_ptr + row)
    draft_lse = tl.load(draft_lse_ptr + row - n, mask=rejected, other=0.0)
    target_row = target_ptr + row.to(tl.int64) * target_stride
    draft_row = draft_ptr + (row - n).to(tl.int64) * draft_stride
    out_row = out_ptr + n.to(tl.int64) * out_stride
    if greedy:
        best = tl.load(best_ptr + row)
        offs = b * BLOCK + tl.arange(0, BLOCK)
        store_block(out_row, offs, V, tl.where(offs == best, 0.0, NEG_INF), FULL=False)
    else:
        max_ptr += n * n_blocks
        sum_ptr += n * n_blocks
        argmax_ptr += n * n_blocks
        if (b + 1) * BLOCK <= V:
            _residual_block(
                target_row, draft_row, out_row, target_lse, draft_lse, inverse, rejected, b, V, max_ptr,
                sum_ptr, argmax_ptr, BLOCK, FULL=True,
            )  # fmt: skip
        else:
            _residual_block(
                target_row, draft_row, out_row, target_lse, draft_lse, inverse, rejected, b, V, max_ptr,
                sum_ptr, argmax_ptr, BLOCK, FULL=False,
            )  # fmt: skip
        if arrives_last(counter_ptr + n, n_blocks):
            _peak, _mass, total = merge_statistics(max_ptr, sum_ptr, n_blocks, BLOCKS)
            if (total == 0.0) & rejected:
                # nothing is left of p - q: log p instead, which this program then writes alone
                for block in range(n_blocks):
                    offs = block * BLOCK + tl.arange(0, BLOCK)
                    p = _log_p(target_row, offs, V, inverse, target_lse, FULL=False)
                    store_block(out_row, offs, V, p, FULL=False)


def residual(target, draft, start, verified, temperature, vocab_size):
    n_requests = start.numel() - 1
    blocks = Blocks(n_requests, triton.cdiv(vocab_size, BLOCK), target.device)
    stride = triton.cdiv(vocab_size, 16) * 16  # keeps the stores wide
    out = torch.empty(n_requests, stride, device=target.device)[:, :vocab_size]
    residual_kernel[(blocks.n_blocks, n_requests)](
        target, target.stride(0), draft, draft.stride(0), start, _tensor(temperature, out),
        verified.target_lse, verified.target_argmax, verified.draft_lse, verified.accepted,
        out, out.stride(0), *blocks.arguments, vocab_size,
        BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks.n_blocks), TEMPERED=temperature is not None,
        num_warps=8,
    )  # fmt: skip
    return out


def warmup(device: torch.device, vocab_size: int, stride: int) -> None:
    """Compile every variant for float32 logits of this shape and up to 8 drafted tokens."""
    for k in (1, 2, 4, 8):
        for temperature in (None, torch.ones(1, device=device)):
            target, draft = (torch.zeros(n, stride, device=device) for n in (k + 1, k))
            start = torch.tensor([0, k + 1], dtype=torch.int32, device=device)
            tokens = torch.zeros(k, dtype=torch.int64, device=device)
            verified = decoding.Verified(
                *verify(
                    target, draft, tokens, start, torch.zeros(k, device=device), k, temperature, vocab_size
                )
            )
            logits = residual(target, draft, start, verified, temperature, vocab_size)
            sample(logits, torch.zeros(1, 2, device=device), temperature, vocab_size)

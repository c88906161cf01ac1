"""A program over one block of the vocabulary, its stack in registers.

With EXTENDED it knows everything that `marith_kernels.program` says, and extra rows; without, it lacks
logadd, debias, pop_gate, the uniform distribution, weightless leaves and extra rows, and holds less.
"""

# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: N803, RUF005 (Triton: compile-time arguments are upper case, and tuples know no unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from .program import (
    ADD,
    LOGADD,
    MAX,
    MIN,
    OP_BITS,
    POP_ADD,
    POP_MAX,
    POP_MIN,
    PUSH,
    SCALE,
    UNIFORM,
    WEIGHTLESS,
)
from .triton_blocks import NEG_INF, times

_ADD, _MAX, _MIN, _LOGADD, _PUSH = (tl.constexpr(op) for op in (ADD, MAX, MIN, LOGADD, PUSH))
_POP_ADD, _POP_MAX, _POP_MIN, _SCALE = (tl.constexpr(op) for op in (POP_ADD, POP_MAX, POP_MIN, SCALE))
_OP_BITS, _WEIGHTLESS, _UNIFORM = (tl.constexpr(n) for n in (OP_BITS, WEIGHTLESS, UNIFORM))


@triton.jit
def load_leaf(x_ptr, x_stride, row, offs, V, FULL: tl.constexpr):
    """A block of a row of logits; 1 for row -1, the number one."""
    is_row = tl.broadcast_to(row, offs.shape) >= 0  # as a tensor: the interpreter has no `tensor & scalar`
    if not FULL:
        is_row = is_row & (offs < V)
    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + offs, mask=is_row, other=1.0)  # int64: see lse_kernel
    return x.to(tl.float32)


@triton.jit
def _load_either(
    x_ptr, x_stride, extra_ptr, extra_stride, first_extra, uniform, row, offs, V, FULL: tl.constexpr
):
    """`load_leaf` that knows extra rows and the uniform distribution: two loads, one masked out."""
    x = load_leaf(x_ptr, x_stride, tl.where(row < first_extra, row, -1), offs, V, FULL)
    of_extra = tl.broadcast_to(row, offs.shape) >= first_extra
    from_extra = of_extra
    if not FULL:
        from_extra = from_extra & (offs < V)
    start = (row.to(tl.int64) - first_extra) * extra_stride
    beside = tl.load(extra_ptr + start + offs, mask=from_extra, other=1.0)
    x = tl.where(of_extra, beside, x)
    return tl.where(tl.broadcast_to(row, offs.shape) == _UNIFORM, uniform, x)


@triton.jit
def _smaller(energy, weight_sum, value, value_n, DIVIDE: tl.constexpr):
    if DIVIDE:
        weight_sum = tl.where(value < energy, value_n, weight_sum)
    return tl.minimum(energy, value), weight_sum


@triton.jit
def _blend(op, energy, log_q, weight):
    """logadd and debias."""
    if op == _LOGADD:
        log_q = log_q + tl.log(weight)
        high = tl.maximum(energy, log_q)
        low = tl.minimum(energy, log_q)
        energy = high + tl.log(1.0 + tl.exp(low - tl.where(high == NEG_INF, 0.0, high)))
    else:
        gap = tl.exp(tl.minimum(energy, 88.0)) - tl.exp(tl.minimum(log_q, 88.0))  # exp(88) is finite
        energy = tl.where(energy < log_q, energy + weight * gap, energy)
    return energy


@triton.jit
def run_program(
    x_ptr, x_stride, extra_ptr, extra_stride, first_extra, uniform, lse_ptr, op_ptr, n_code, n, linear, offs,
    V, BLOCK: tl.constexpr, SLOTS: tl.constexpr, DIVIDE: tl.constexpr, EXTENDED: tl.constexpr,
    FULL: tl.constexpr,
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
        weight_n = weight
        weightless = 0
        if EXTENDED:
            weightless = op & _WEIGHTLESS
            weight_n = tl.where(weightless != 0, 0.0, weight)
            op = op & _OP_BITS
        if op <= _PUSH:
            if EXTENDED:
                x = _load_either(
                    x_ptr, x_stride, extra_ptr, extra_stride, first_extra, uniform, row, offs, V, FULL
                )
                normalised = (row >= 0) & (linear == 0) & (weightless == 0)
            else:
                x = load_leaf(x_ptr, x_stride, row, offs, V, FULL)
                normalised = (row >= 0) & (linear == 0)
            x = x - tl.load(lse_ptr + row, mask=normalised, other=0.0)
            value = times(weight, ban, x)
            if op == _PUSH:
                if SLOTS > 1:
                    saved = (energy,) + saved[:-1]
                energy = value
                if DIVIDE:
                    if SLOTS > 1:
                        saved_n = (weight_sum,) + saved_n[:-1]
                    weight_sum = tl.full([BLOCK], 0.0, tl.float32) + weight_n
            elif op == _ADD:
                energy = energy + value
                if DIVIDE:
                    weight_sum = weight_sum + weight_n
            elif op == _MAX:
                if DIVIDE:
                    weight_sum = tl.where(value > energy, weight_n, weight_sum)
                energy = tl.maximum(energy, value)
            else:
                if EXTENDED:
                    if op == _MIN:
                        energy, weight_sum = _smaller(energy, weight_sum, value, weight_n, DIVIDE)
                    else:
                        energy = _blend(op, energy, x, weight)
                else:
                    energy, weight_sum = _smaller(energy, weight_sum, value, weight_n, DIVIDE)
        elif op == _SCALE:
            energy = times(weight, ban, energy)
            if DIVIDE:
                weight_sum = weight * weight_sum
        else:
            if SLOTS > 1:
                value = times(weight, ban, energy)
                below = saved[0]
                value_n, below_n = weight_sum, weight_sum
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
                    if EXTENDED:
                        if op == _POP_MIN:
                            energy, weight_sum = _smaller(below, below_n, value, value_n, DIVIDE)
                        else:
                            if DIVIDE:
                                weight_sum = tl.where(below >= 0.0, value_n, 0.0)
                            energy = tl.where(below >= 0.0, value, 0.0)
                    else:
                        energy, weight_sum = _smaller(below, below_n, value, value_n, DIVIDE)
                saved = saved[1:] + (saved[SLOTS - 2],)
                if DIVIDE:
                    saved_n = saved_n[1:] + (saved_n[SLOTS - 2],)
    return energy, weight_sum

"""A program over one chunk of the vocabulary, compiled by numba.

`ban` is what weight * -inf counts as: -inf whatever the sign of the weight, and 0 for the weight 0.
`source` says where rows lie, see `numba_rows`.
"""

from __future__ import annotations

import math

import numpy as np

from .numba_math import NEG_INF, ONE, ZERO, exp, inline, log1p, maximum, times, widen
from .numba_rows import extra_row, is_extra, logits_row, uniform
from .program import (
    ADD,
    DEBIAS,
    LOGADD,
    MAX,
    MIN,
    NUMBER,
    OP_BITS,
    POP_ADD,
    POP_GATE,
    POP_MAX,
    PUSH,
    SCALE,
    WEIGHTLESS,
)

LARGEST_EXP = np.float32(88)  # exp of it is finite


@inline
def _leaf(slot, op, x, weight, ban, shift):
    """Combine weight * (x - shift) into the slot's energies."""
    n = slot.size
    if op == PUSH:
        for i in range(n):
            slot[i] = times(weight, ban, widen(x[i]) - shift)
    elif op == ADD:
        for i in range(n):
            slot[i] += times(weight, ban, widen(x[i]) - shift)
    elif op == MAX:
        for i in range(n):
            slot[i] = maximum(slot[i], times(weight, ban, widen(x[i]) - shift))
    else:
        for i in range(n):
            value = times(weight, ban, widen(x[i]) - shift)
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _pair(slot, op, x, weight_x, ban_x, shift_x, y, weight_y, ban_y, shift_y):
    """A push of x and the combination with y in one pass: every union and intersection begins so."""
    n = slot.size
    if op == ADD:
        for i in range(n):
            slot[i] = times(weight_x, ban_x, widen(x[i]) - shift_x) + times(
                weight_y, ban_y, widen(y[i]) - shift_y
            )
    elif op == MAX:
        for i in range(n):
            slot[i] = maximum(
                times(weight_x, ban_x, widen(x[i]) - shift_x), times(weight_y, ban_y, widen(y[i]) - shift_y)
            )
    else:
        for i in range(n):
            a = times(weight_x, ban_x, widen(x[i]) - shift_x)
            b = times(weight_y, ban_y, widen(y[i]) - shift_y)
            slot[i] = b if b < a else a


@inline
def _pop(slot, op, popped, weight, ban):
    """Combine weight * popped into the slot's energies."""
    n = slot.size
    if op == POP_ADD:
        for i in range(n):
            slot[i] += times(weight, ban, popped[i])
    elif op == POP_MAX:
        for i in range(n):
            slot[i] = maximum(slot[i], times(weight, ban, popped[i]))
    elif op == POP_GATE:
        for i in range(n):
            slot[i] = times(weight, ban, popped[i]) if slot[i] >= ZERO else ZERO
    else:
        for i in range(n):
            value = times(weight, ban, popped[i])
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _leaf_n(slot, slot_n, op, x, weight, weight_n, ban, shift):
    """`_leaf` with the N plane: the winner of a max or min brings its N, `weight_n` for a leaf."""
    n = slot.size
    if op == PUSH:
        for i in range(n):
            slot[i] = times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight_n
    elif op == ADD:
        for i in range(n):
            slot[i] += times(weight, ban, widen(x[i]) - shift)
            slot_n[i] += weight_n
    elif op == MAX:
        for i in range(n):
            value = times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight_n if value > slot[i] else slot_n[i]
            slot[i] = value if value > slot[i] else slot[i]
    else:
        for i in range(n):
            value = times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight_n if value < slot[i] else slot_n[i]
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _pop_n(slot, slot_n, op, popped, popped_n, weight, ban):
    """`_pop` with the N plane."""
    n = slot.size
    if op == POP_ADD:
        for i in range(n):
            slot[i] += times(weight, ban, popped[i])
            slot_n[i] += weight * popped_n[i]
    elif op == POP_MAX:
        for i in range(n):
            value = times(weight, ban, popped[i])
            slot_n[i] = weight * popped_n[i] if value > slot[i] else slot_n[i]
            slot[i] = value if value > slot[i] else slot[i]
    elif op == POP_GATE:
        for i in range(n):
            slot_n[i] = weight * popped_n[i] if slot[i] >= ZERO else ZERO
            slot[i] = times(weight, ban, popped[i]) if slot[i] >= ZERO else ZERO
    else:
        for i in range(n):
            value = times(weight, ban, popped[i])
            slot_n[i] = weight * popped_n[i] if value < slot[i] else slot_n[i]
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _ban(weight):
    return ZERO if weight == ZERO else NEG_INF


@inline
def _either_leaf(slot, op, source, begin, row, weight, ban, shift, like):
    if is_extra(source, row):
        _leaf(slot, op, extra_row(source, begin, row, slot.size), weight, ban, shift)
    else:
        _leaf(slot, op, logits_row(source, begin, row, slot.size, like), weight, ban, shift)


@inline
def _blend(slot, op, source, begin, row, weight, shift, log_q, like):
    """logadd and debias of the slot's energies with a leaf, whose log-probabilities are left in `log_q`."""
    n = slot.size
    if row < 0:
        log_q[:] = uniform(source)
    else:
        _either_leaf(log_q, PUSH, source, begin, row, ONE, NEG_INF, shift, like)
    if op == LOGADD:
        log_weight = np.float32(math.log(weight))
        for i in range(n):
            q = log_q[i] + log_weight
            high = maximum(slot[i], q)
            low = min(slot[i], q)
            slot[i] = high + log1p(exp(low - high)) if high > NEG_INF else high
    else:
        for i in range(n):
            e, q = slot[i], log_q[i]
            slot[i] = e + weight * (exp(min(e, LARGEST_EXP)) - exp(min(q, LARGEST_EXP))) if e < q else e


@inline
def run_stack(out, slots, source, begin, op, row, weight, lse, like):
    """The program on log-probabilities without the N plane. Slot 0 is `out`, slot k is `slots[k - 1]`."""
    n = out.size
    top = 0
    slot = out
    pc = 0
    while pc < op.size:
        o, w, r = op[pc] & OP_BITS, weight[pc], row[pc]
        shift = lse[r] if r >= 0 and op[pc] & WEIGHTLESS == 0 else ZERO
        if o == PUSH and pc > 0:
            top += 1
            slot = slots[top - 1, :n]
        if o in (LOGADD, DEBIAS):
            _blend(slot, o, source, begin, r, w, shift, slots[slots.shape[0] - 1, :n], like)
        elif o <= PUSH and r < 0:
            _number(slot, o, w if r == NUMBER else w * uniform(source))
        elif o <= PUSH:
            after = pc + 1
            if (
                o == PUSH
                and not is_extra(source, r)
                and after < op.size
                and op[after] & OP_BITS <= MIN
                and row[after] >= 0
                and not is_extra(source, row[after])
            ):
                x = logits_row(source, begin, r, n, like)
                y = logits_row(source, begin, row[after], n, like)
                v = weight[after]
                shift_y = lse[row[after]] if op[after] & WEIGHTLESS == 0 else ZERO
                _pair(slot, op[after] & OP_BITS, x, w, _ban(w), shift, y, v, _ban(v), shift_y)
                pc = after
            else:
                _either_leaf(slot, o, source, begin, r, w, _ban(w), shift, like)
        elif o == SCALE:
            ban = _ban(w)
            for i in range(n):
                slot[i] = times(w, ban, slot[i])
        else:
            popped = slot
            top -= 1
            slot = slots[top - 1, :n] if top > 0 else out
            _pop(slot, o, popped, w, _ban(w))
        pc += 1


@inline
def _number(slot, op, value):
    """Combine the same value for every token into the slot's energies."""
    n = slot.size
    if op == PUSH:
        slot[:] = value
    elif op == ADD:
        for i in range(n):
            slot[i] += value
    elif op == MAX:
        for i in range(n):
            slot[i] = maximum(slot[i], value)
    else:
        for i in range(n):
            slot[i] = value if value < slot[i] else slot[i]


@inline
def run_stack_n(out, slots, source, begin, op, row, weight, lse, like):
    """The program with the N plane; out := E / N.

    Rows 0 to depth - 1 of `slots` hold energies, the next `depth` hold weights, then come the number one and
    a row of scratch.
    """
    n = out.size
    depth = (slots.shape[0] - 2) // 2
    ones, scratch = slots[2 * depth, :n], slots[2 * depth + 1, :n]
    ones[:] = ONE
    top = -1
    for pc in range(op.size):
        o, w, r = op[pc] & OP_BITS, weight[pc], row[pc]
        if o == PUSH:
            top += 1
        elif POP_ADD <= o <= POP_GATE:
            top -= 1
        slot, slot_n = slots[top, :n], slots[depth + top, :n]
        shift = lse[r] if r >= 0 and op[pc] & WEIGHTLESS == 0 else ZERO
        if o == SCALE:
            ban = _ban(w)
            for i in range(n):
                slot[i] = times(w, ban, slot[i])
                slot_n[i] *= w
        elif o > PUSH:
            _pop_n(slot, slot_n, o, slots[top + 1, :n], slots[depth + top + 1, :n], w, _ban(w))
        elif o in (LOGADD, DEBIAS):
            _blend(slot, o, source, begin, r, w, shift, scratch, like)
        elif r >= 0:
            w_n = w if op[pc] & WEIGHTLESS == 0 else ZERO
            if is_extra(source, r):
                _leaf_n(slot, slot_n, o, extra_row(source, begin, r, n), w, w_n, _ban(w), shift)
            else:
                _leaf_n(slot, slot_n, o, logits_row(source, begin, r, n, like), w, w_n, _ban(w), shift)
        else:
            scratch[:] = ONE if r == NUMBER else uniform(source)
            if o == PUSH:
                for i in range(n):
                    slot[i] = w * scratch[i]
                slot_n[:] = w
            else:
                _pop_n(slot, slot_n, o + POP_ADD, scratch, ones, w, _ban(w))
    slot, slot_n = slots[0, :n], slots[depth, :n]
    for i in range(n):
        out[i] = slot[i] / slot_n[i]

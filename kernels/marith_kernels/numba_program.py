"""A program over one chunk of the vocabulary, compiled by numba.

`ban` is what weight * -inf counts as: -inf whatever the sign of the weight, and 0 for the weight 0.
A leaf's address is that of its row in the logits plus the chunk's beginning; `item` is the size of a logit.
"""

from __future__ import annotations

from numba import carray

from .numba_math import NEG_INF, ONE, ZERO, inline, maximum, pointer, widen
from .program import ADD, MAX, POP_ADD, POP_MAX, POP_MIN, PUSH, SCALE


@inline
def _times(weight, ban, value):
    return ban if value == NEG_INF else weight * value


@inline
def _sum_terms(out, x, y, z, a, b, c, n):
    """out := a * x + b * y + c * z over the first n of the three."""
    if n == 1:
        for i in range(out.size):
            out[i] = _times(a, NEG_INF, widen(x[i]))
    elif n == 2:
        for i in range(out.size):
            out[i] = _times(a, NEG_INF, widen(x[i])) + _times(b, NEG_INF, widen(y[i]))
    else:
        for i in range(out.size):
            out[i] = (
                _times(a, NEG_INF, widen(x[i]))
                + _times(b, NEG_INF, widen(y[i]))
                + _times(c, NEG_INF, widen(z[i]))
            )


@inline
def _add_terms(out, x, y, z, a, b, c, n):
    """out := out + a * x + b * y + c * z over the first n of the three."""
    if n == 1:
        for i in range(out.size):
            out[i] += _times(a, NEG_INF, widen(x[i]))
    elif n == 2:
        for i in range(out.size):
            out[i] += _times(a, NEG_INF, widen(x[i])) + _times(b, NEG_INF, widen(y[i]))
    else:
        for i in range(out.size):
            out[i] += (
                _times(a, NEG_INF, widen(x[i]))
                + _times(b, NEG_INF, widen(y[i]))
                + _times(c, NEG_INF, widen(z[i]))
            )


@inline
def run_linear(out, logits, stride, item, begin, row, weight, like):
    """out := sum of weight * leaf on raw logits, three rows a pass; the number one comes last if at all."""
    n = row.size
    constant = ZERO
    if row[n - 1] < 0:
        n -= 1
        constant = weight[n]
    for lo in range(0, n, 3):
        k = min(3, n - lo)
        mid, hi = lo + min(1, k - 1), lo + k - 1
        x = carray(pointer(logits + (row[lo] * stride + begin) * item, like), out.size)
        y = carray(pointer(logits + (row[mid] * stride + begin) * item, like), out.size)
        z = carray(pointer(logits + (row[hi] * stride + begin) * item, like), out.size)
        if lo == 0:
            _sum_terms(out, x, y, z, weight[lo], weight[mid], weight[hi], k)
        else:
            _add_terms(out, x, y, z, weight[lo], weight[mid], weight[hi], k)
    if n == 0:
        out[:] = constant
    elif constant != ZERO:
        for i in range(out.size):
            out[i] += constant


@inline
def _leaf(slot, op, x, weight, ban, shift):
    """Combine weight * (x - shift) into the slot's energies."""
    n = slot.size
    if op == PUSH:
        for i in range(n):
            slot[i] = _times(weight, ban, widen(x[i]) - shift)
    elif op == ADD:
        for i in range(n):
            slot[i] += _times(weight, ban, widen(x[i]) - shift)
    elif op == MAX:
        for i in range(n):
            slot[i] = maximum(slot[i], _times(weight, ban, widen(x[i]) - shift))
    else:
        for i in range(n):
            value = _times(weight, ban, widen(x[i]) - shift)
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _pair(slot, op, x, weight_x, ban_x, shift_x, y, weight_y, ban_y, shift_y):
    """A push of x and the combination with y in one pass: every union and intersection begins so."""
    n = slot.size
    if op == ADD:
        for i in range(n):
            slot[i] = _times(weight_x, ban_x, widen(x[i]) - shift_x) + _times(
                weight_y, ban_y, widen(y[i]) - shift_y
            )
    elif op == MAX:
        for i in range(n):
            slot[i] = maximum(
                _times(weight_x, ban_x, widen(x[i]) - shift_x), _times(weight_y, ban_y, widen(y[i]) - shift_y)
            )
    else:
        for i in range(n):
            a = _times(weight_x, ban_x, widen(x[i]) - shift_x)
            b = _times(weight_y, ban_y, widen(y[i]) - shift_y)
            slot[i] = b if b < a else a


@inline
def _pop(slot, op, popped, weight, ban):
    """Combine weight * popped into the slot's energies."""
    n = slot.size
    if op == POP_ADD:
        for i in range(n):
            slot[i] += _times(weight, ban, popped[i])
    elif op == POP_MAX:
        for i in range(n):
            slot[i] = maximum(slot[i], _times(weight, ban, popped[i]))
    else:
        for i in range(n):
            value = _times(weight, ban, popped[i])
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _leaf_n(slot, slot_n, op, x, weight, ban, shift):
    """`_leaf` with the N plane: the winner of a max or min brings its N, which is `weight` for a leaf."""
    n = slot.size
    if op == PUSH:
        for i in range(n):
            slot[i] = _times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight
    elif op == ADD:
        for i in range(n):
            slot[i] += _times(weight, ban, widen(x[i]) - shift)
            slot_n[i] += weight
    elif op == MAX:
        for i in range(n):
            value = _times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight if value > slot[i] else slot_n[i]
            slot[i] = value if value > slot[i] else slot[i]
    else:
        for i in range(n):
            value = _times(weight, ban, widen(x[i]) - shift)
            slot_n[i] = weight if value < slot[i] else slot_n[i]
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _pop_n(slot, slot_n, op, popped, popped_n, weight, ban):
    """`_pop` with the N plane."""
    n = slot.size
    if op == POP_ADD:
        for i in range(n):
            slot[i] += _times(weight, ban, popped[i])
            slot_n[i] += weight * popped_n[i]
    elif op == POP_MAX:
        for i in range(n):
            value = _times(weight, ban, popped[i])
            slot_n[i] = weight * popped_n[i] if value > slot[i] else slot_n[i]
            slot[i] = value if value > slot[i] else slot[i]
    else:
        for i in range(n):
            value = _times(weight, ban, popped[i])
            slot_n[i] = weight * popped_n[i] if value < slot[i] else slot_n[i]
            slot[i] = value if value < slot[i] else slot[i]


@inline
def _ban(weight):
    return ZERO if weight == ZERO else NEG_INF


@inline
def run_stack(out, slots, logits, stride, item, begin, op, row, weight, lse, like):
    """The program on log-probabilities without the N plane. Slot 0 is `out`, slot k is `slots[k - 1]`."""
    n = out.size
    top = 0
    slot = out
    pc = 0
    while pc < op.size:
        o, w = op[pc], weight[pc]
        if o == PUSH and pc > 0:
            top += 1
            slot = slots[top - 1, :n]
        if o <= PUSH and row[pc] < 0:
            _number(slot, o, w)
        elif o <= PUSH:
            x = carray(pointer(logits + (row[pc] * stride + begin) * item, like), n)
            after = pc + 1
            if o == PUSH and after < op.size and op[after] < PUSH and row[after] >= 0:
                y = carray(pointer(logits + (row[after] * stride + begin) * item, like), n)
                v = weight[after]
                _pair(slot, op[after], x, w, _ban(w), lse[row[pc]], y, v, _ban(v), lse[row[after]])
                pc = after
            else:
                _leaf(slot, o, x, w, _ban(w), lse[row[pc]])
        elif o == SCALE:
            ban = _ban(w)
            for i in range(n):
                slot[i] = _times(w, ban, slot[i])
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
def run_stack_n(out, slots, logits, stride, item, begin, op, row, weight, lse, like):
    """The program with the N plane; out := E / N.

    Rows 0 to depth - 1 of `slots` hold energies, the next `depth` hold weights, and the last one is the
    number one.
    """
    n = out.size
    depth = slots.shape[0] // 2
    ones = slots[2 * depth, :n]
    ones[:] = ONE
    top = -1
    for pc in range(op.size):
        o, w = op[pc], weight[pc]
        if o == PUSH:
            top += 1
        elif o in (POP_ADD, POP_MAX, POP_MIN):
            top -= 1
        slot, slot_n = slots[top, :n], slots[depth + top, :n]
        if o == SCALE:
            ban = _ban(w)
            for i in range(n):
                slot[i] = _times(w, ban, slot[i])
                slot_n[i] *= w
        elif o > PUSH:
            _pop_n(slot, slot_n, o, slots[top + 1, :n], slots[depth + top + 1, :n], w, _ban(w))
        elif row[pc] >= 0:
            x = carray(pointer(logits + (row[pc] * stride + begin) * item, like), n)
            _leaf_n(slot, slot_n, o, x, w, _ban(w), lse[row[pc]])
        elif o == PUSH:
            slot[:] = w
            slot_n[:] = w
        else:
            _pop_n(slot, slot_n, o + POP_ADD, ones, ones, w, _ban(w))
    slot, slot_n = slots[0, :n], slots[depth, :n]
    for i in range(n):
        out[i] = slot[i] / slot_n[i]

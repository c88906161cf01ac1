"""A weighted sum over one chunk of the vocabulary, compiled by numba. -inf bans whatever the weight's sign.

`source` says where rows lie: see `numba_rows`.
"""

from __future__ import annotations

import numpy as np

from .numba_math import NEG_INF, ZERO, inline, times, widen
from .numba_rows import extra_row, is_extra, logits_row

MINUS_ZERO = np.float32(-0.0)  # adding it changes no number, not even -0.0


@inline
def _sum_terms(out, x, y, z, a, b, c, n):
    """out := a * x + b * y + c * z over the first n of the three."""
    if n == 1:
        for i in range(out.size):
            out[i] = times(a, NEG_INF, widen(x[i]))
    elif n == 2:
        for i in range(out.size):
            out[i] = times(a, NEG_INF, widen(x[i])) + times(b, NEG_INF, widen(y[i]))
    else:
        for i in range(out.size):
            out[i] = (
                times(a, NEG_INF, widen(x[i]))
                + times(b, NEG_INF, widen(y[i]))
                + times(c, NEG_INF, widen(z[i]))
            )


@inline
def _add_terms(out, x, y, z, a, b, c, n):
    """out := out + a * x + b * y + c * z over the first n of the three."""
    if n == 1:
        for i in range(out.size):
            out[i] += times(a, NEG_INF, widen(x[i]))
    elif n == 2:
        for i in range(out.size):
            out[i] += times(a, NEG_INF, widen(x[i])) + times(b, NEG_INF, widen(y[i]))
    else:
        for i in range(out.size):
            out[i] += (
                times(a, NEG_INF, widen(x[i]))
                + times(b, NEG_INF, widen(y[i]))
                + times(c, NEG_INF, widen(z[i]))
            )


@inline
def _any_extra(source, row):
    for r in row:  # noqa: SIM110 (numba knows no any() of a generator)
        if is_extra(source, r):
            return True
    return False


@inline
def _sum_either(out, source, begin, row, weight, like):
    """out := sum of weight * leaf over logits rows and extra rows, a row a pass."""
    out[:] = MINUS_ZERO
    for t in range(row.size):
        w = weight[t]
        if is_extra(source, row[t]):
            x = extra_row(source, begin, row[t], out.size)
            _add_terms(out, x, x, x, w, w, w, 1)
        else:
            x = logits_row(source, begin, row[t], out.size, like)
            _add_terms(out, x, x, x, w, w, w, 1)


@inline
def run_linear(out, source, begin, row, weight, like):
    """out := sum of weight * leaf on raw logits, three rows a pass; the number one comes last if at all."""
    n = row.size
    constant = ZERO
    if row[n - 1] < 0:
        n -= 1
        constant = weight[n]
    if _any_extra(source, row[:n]):
        _sum_either(out, source, begin, row[:n], weight, like)
        if constant != ZERO:
            for i in range(out.size):
                out[i] += constant
        return
    for lo in range(0, n, 3):
        k = min(3, n - lo)
        mid, hi = lo + min(1, k - 1), lo + k - 1
        x = logits_row(source, begin, row[lo], out.size, like)
        y = logits_row(source, begin, row[mid], out.size, like)
        z = logits_row(source, begin, row[hi], out.size, like)
        if lo == 0:
            _sum_terms(out, x, y, z, weight[lo], weight[mid], weight[hi], k)
        else:
            _add_terms(out, x, y, z, weight[lo], weight[mid], weight[hi], k)
    if n == 0:
        out[:] = constant
    elif constant != ZERO:
        for i in range(out.size):
            out[i] += constant

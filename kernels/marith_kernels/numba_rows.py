"""Where the rows of a call lie in memory, for the compiled CPU backend.

`source` is the tuple (address of the logits, their row stride, bytes of a logit, address of the extra rows,
their row stride, number of the first of them, energy of UNIFORM). Extra rows are float32.
"""

from __future__ import annotations

from numba import carray

from .numba_math import ZERO, inline, pointer


@inline
def is_extra(source, row):
    return row >= source[5]


@inline
def uniform(source):
    return source[6]


@inline
def logits_row(source, begin, row, n, like):
    """n tokens of a row of the logits, whose elements are of `like`'s type."""
    return carray(pointer(source[0] + (row * source[1] + begin) * source[2], like), n)


@inline
def extra_row(source, begin, row, n):
    """n tokens of an extra row."""
    return carray(pointer(source[3] + ((row - source[5]) * source[4] + begin) * 4, ZERO), n)

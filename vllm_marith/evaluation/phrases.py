"""Sentences out of intervals.  What is claimed is what the intervals allow: clear of each other, or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .statistics import Interval


def listing(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def percent(share: float) -> str:
    """A share as `12%`, small ones with a digit more."""
    return f"{share:.1%}" if 0 < share < 0.095 else f"{share:.0%}"


def rate(interval: Interval) -> str:
    """`12% [9, 16]`."""
    return f"{percent(interval.value)} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def number(interval: Interval) -> str:
    """`1.24 [1.19, 1.30]`, with as many digits as say something."""
    digits = 2 if interval.value < 10 else 0
    return f"{interval.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def change(before: Interval, after: Interval) -> str:
    """How a rate went from one interval to another: `rises from 3% [1, 6] to 40% [33, 47]`."""
    told = f"{rate(before)} to {rate(after)}"
    if after.above(before):
        return f"rises from {told}"
    if after.below(before):
        return f"falls from {told}"
    return f"does not move beyond what chance does ({told})"


def ranking(rates: Mapping[str, Interval], *, least: str) -> str:
    """Which of several rates is smallest, and which others are clear of it.

    least: a verb for having the smallest, such as "leaves least".
    """
    ordered = sorted(rates, key=lambda name: (rates[name].value, rates[name].high))
    best, others = ordered[0], ordered[1:]
    tied = [name for name in others if rates[name].overlaps(rates[best])]
    clear = [name for name in others if name not in tied]
    if not others:
        return f"{best} is the only one: {rate(rates[best])}."
    if not tied:
        return f"{best} {least}, {rate(rates[best])}, and is clear of every other: {_told(clear, rates)}."
    if not clear:
        return (
            f"{best} {least}, {rate(rates[best])}, but the intervals of all others overlap with its own "
            f"({_told(tied, rates)}): these texts rank none of them above another."
        )
    return (
        f"{best} {least}, {rate(rates[best])}. Not to be told from it, because the intervals overlap: "
        f"{_told(tied, rates)}. It is clear of {_told(clear, rates)}."
    )


def monotone(intervals: Sequence[Interval]) -> tuple[bool, bool]:
    """(whether any step goes clearly up, whether any goes clearly down)."""
    pairs = list(pairwise(intervals))
    return any(b.above(a) for a, b in pairs), any(b.below(a) for a, b in pairs)


def seeds(spread: Interval) -> str:
    """Whether the seeds of an evaluation are more than further draws."""
    if math.isnan(spread.value):
        return "No rate lies between 0 and 1, so that the seeds cannot be compared."
    chance = f"{spread.low:.2f} to {spread.high:.2f}"
    told = f"chi-squared over degrees of freedom is {spread.value:.2f}, and {chance} would be chance"
    if spread.value > spread.high:
        return (
            f"The seeds differ by more than draws of texts do ({told}): "
            "the intervals, which take every text for an independent one, are too narrow."
        )
    return f"The seeds differ by no more than draws of texts do ({told})."


def _told(names: Sequence[str], rates: Mapping[str, Interval]) -> str:
    return listing([f"{name} ({rate(rates[name])})" for name in names])

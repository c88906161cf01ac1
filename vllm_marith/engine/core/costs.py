"""What a step takes, learnt from the steps that were taken.

    seconds = a + d [drafts] + sum over constituents j of  r_j [j ran] + b_j tokens_j + c_j passes_j

A constituent's forward pass has a cost of its own (r_j: its weights are read once, however many tokens there
are), one for every token, and one for each pass that drafting terms take before the step (c_j).  That there
are drafts at all costs something, too, however many (d).  The coefficients are found by least squares with
fading weights, and none is negative.  What the steps of late say nothing about stays as it was found before:
a model that nobody ran has not become free.

Nothing here looks at a clock or draws at random: the same observations give the same costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

_MEMORY: Final = 0.995
_FIRST: Final = 3  # of each kind of step before costs are believed
_FIT_EVERY: Final = 8  # steps
_HELD: Final = 0.5  # how many steps that need a coefficient its last value counts for
_HICCUP: Final = 4.0  # times the time expected, and no more, a step counts
_DEAREST: Final = 2.0  # plain steps that drafts, and each pass for them, are thought to take at first
_DRIFT: Final = 0.1
_CHANGED: Final = 1.5  # steps so many times slower or faster than expected: costs are learnt anew ...
_KEPT: Final = 0.05  # ... from so much of what was known


@dataclass(frozen=True, eq=False)
class Work:
    """What a step computes.

    Attributes:
        tokens: float64 ``[constituents]``, positions that each is run on.
        passes: float64 ``[constituents]``, forward passes of drafting terms before that.
        drafts: whether some of the tokens are drafts, or drafts are made.
    """

    tokens: np.ndarray
    passes: np.ndarray
    drafts: bool = False

    def features(self) -> np.ndarray:
        """float64 ``[2 + 3 constituents]``: 1, any drafts, which constituents run, tokens, passes."""
        return np.concatenate(([1.0, self.drafts], self.tokens > 0, self.tokens, self.passes))

    def drafting(self, length: int, rates: np.ndarray) -> Work:
        """The same rows when each of them also checks so many drafts; rates: passes for each draft."""
        return Work(self.tokens * (length + 1), length * rates, length > 0)


class StepCosts:
    """The costs of one engine's steps."""

    def __init__(self, constituents: int = 1) -> None:
        size = 2 + 3 * constituents
        self._products = np.zeros((size, size))
        self._sums = np.zeros(size)
        self._found = np.zeros(size)
        self._usual = np.zeros(size)  # mean square of each feature in steps that have it
        self._drift = 0.0  # fading mean of log(seconds / expected)
        self._plain = self._drafted = 0  # steps without drafts, and with
        # Steps in which each constituent rested, and in which it ran passes for drafts.
        self._rested, self._passed = np.zeros(constituents), np.zeros(constituents)

    @property
    def known(self) -> bool:
        """Whether enough steps without drafts and with them were seen."""
        return min(self._plain, self._drafted) >= _FIRST

    def knows(self, work: Work) -> bool:
        """Whether steps like this one can be told apart from others: who rests and who drafts was seen."""
        resting, passing = work.tokens == 0, work.passes > 0
        return bool((self._rested[resting] >= _FIRST).all() and (self._passed[passing] >= _FIRST).all())

    def observe(self, seconds: float, work: Work) -> None:
        """A step's duration."""
        step = work.features()
        seen = self._drafted if work.drafts else self._plain
        if seen >= _FIRST and self.knows(work):
            expected = self.of(work)
            seconds = min(seconds, _HICCUP * expected)
            self._drift += _DRIFT * (math.log(max(seconds, 1e-9) / max(expected, 1e-9)) - self._drift)
            if abs(self._drift) > math.log(_CHANGED):
                # Another machine: a mean of what was and what is would fit neither.
                self._products *= _KEPT
                self._sums *= _KEPT
                self._drift = 0.0
        elif work.drafts and self._plain >= _FIRST:
            # The first that drafts may be the one that compiles.
            seconds = min(seconds, _DEAREST * (1 + work.passes.sum()) * self.of(work))
        square = step * step
        usual = self._usual + (step > 0) * (1 - _MEMORY) * (square - self._usual)
        self._usual = np.where(self._usual > 0, usual, square)
        self._products = _MEMORY * self._products + np.outer(step, step)
        self._sums = _MEMORY * self._sums + seconds * step
        self._plain += not work.drafts
        self._drafted += work.drafts
        self._rested += work.tokens == 0
        self._passed += work.passes > 0
        if seen < _FIRST or (self._plain + self._drafted) % _FIT_EVERY == 0:
            self._found = self._fit()

    def of(self, work: Work) -> float:
        """Seconds expected."""
        return float(self._found @ work.features())

    def _fit(self) -> np.ndarray:
        """The best coefficients of which none is negative, by an active set."""
        held = _HELD * self._usual
        products = self._products + np.diag(held)
        scale = np.sqrt(np.maximum(np.diag(products), 1e-30))
        products = products / np.outer(scale, scale) + 1e-9 * np.eye(len(scale))
        sums = (self._sums + held * self._found) / scale
        active = self._found > 0
        best, least = np.zeros_like(sums), 0.0
        for _ in range(3 * len(scale)):
            found = np.zeros_like(sums)
            found[active] = np.linalg.solve(products[np.ix_(active, active)], sums[active])
            if found.min() < 0:
                active[found.argmin()] = False
                continue
            error = found @ products @ found - 2 * sums @ found
            if error < least:
                best, least = found, error
            gain = np.where(active, 0.0, sums - products @ found)
            if gain.max() <= 1e-9 * abs(sums).max():
                break
            active[gain.argmax()] = True
        return best / scale

"""How many tokens are worth drafting, from what steps have taken and how many drafts were kept.

Two things are estimated, both with exponentially fading memory:

- the time of a step, seconds = a + b tokens + c passes, over all steps: `tokens` that all terms were run on,
  and `passes` of drafting terms before;
- for each formula the share of drafted tokens that are kept, among those that were tested at all: what comes
  after a rejected token was not.

From these `vllm_marith.plan.best_length` gives the length that makes a token cheapest.  It is kept until
another promises `_GAIN` less, so that noise does not move it.  What is not tried cannot be known, so a
formula that drafts goes without once in a while, and one that does not tries one token: so rarely that it
costs `_EXPLORATION` of the time at most.

Nothing here looks at a clock or draws at random: the same observations give the same lengths.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np

from vllm_marith.plan import best_length, cost_of_a_token

_STEP_MEMORY: Final = 0.995
_ROUND_MEMORY: Final = 0.985
_GAIN: Final = 0.03
_EXPLORATION: Final = 0.02
_EXPLORE_EVERY: Final = 64  # rounds, at the least ...
_EXPLORE_LATEST: Final = 4096  # ... and at the most
_DECIDE_EVERY: Final = 8  # rounds
_FIRST_ROUNDS: Final = 32  # before a formula's requests come without their drafter
_DRAFTER_EVERY: Final = 16  # requests, one of which has it all the same
_FIRST_STEPS: Final = 3  # of either kind, with drafts and without, before costs are believed
_HICCUP: Final = 4.0  # times the time expected, and no more, a step counts
_DRIFT: Final = 0.1
_CHANGED: Final = 1.5  # steps so many times slower or faster than expected: costs are learnt anew ...
_KEPT: Final = 0.05  # ... from so much of what was known
_FORMULAS: Final = 1024
# What a formula is thought to keep before anything is known of it, and how many tests that is worth.
_PRIOR, _PRIOR_TESTS = 0.7, 4.0
_MOST_TESTS: Final = 64.0  # that are remembered


@dataclass
class _Formula:
    """What is known of one formula.

    Attributes:
        kept, tested: drafted tokens, fading.
        length: as last decided.
        patience: rounds without drafts, as last decided.
        rounds: since the beginning.
        same: rounds since the other was tried, drafts or none.
        observed: the round of the last observation.
        passed_over: requests that came without their drafter since one came with it.
    """

    kept: float = _PRIOR * _PRIOR_TESTS
    tested: float = _PRIOR_TESTS
    length: int = 0
    patience: int = 0
    rounds: int = 0
    same: int = 0
    observed: int = 0
    passed_over: int = 0

    @property
    def acceptance(self) -> float:
        return self.kept / self.tested


class StepCosts:
    """seconds = a + b tokens + c passes, by least squares with fading weights; no coefficient is negative."""

    def __init__(self) -> None:
        self._products = np.zeros((3, 3))
        self._sums = np.zeros(3)
        self._found = np.zeros(3)
        self._drift = 0.0  # fading mean of log(seconds / expected)
        self._seen = [0, 0]  # steps without passes, and with

    @property
    def known(self) -> bool:
        """Whether enough steps of both kinds were seen."""
        return min(self._seen) >= _FIRST_STEPS

    def observe(self, seconds: float, num_tokens: int, num_passes: int) -> None:
        kind = num_passes > 0
        step = np.array([1.0, num_tokens, num_passes])
        if self._seen[kind] >= _FIRST_STEPS:
            expected = float(self._found @ step)
            seconds = min(seconds, _HICCUP * expected)
            self._drift += _DRIFT * (math.log(max(seconds, 1e-9) / max(expected, 1e-9)) - self._drift)
            if abs(self._drift) > math.log(_CHANGED):
                # Another machine: a mean of what was and what is would fit neither.
                self._products *= _KEPT
                self._sums *= _KEPT
                self._drift = 0.0
        self._products = _STEP_MEMORY * self._products + np.outer(step, step)
        self._sums = _STEP_MEMORY * self._sums + seconds * step
        self._seen[kind] += 1
        if self._seen[kind] <= _FIRST_STEPS or sum(self._seen) % _DECIDE_EVERY == 0:
            self._found = self._fit()

    def of(self, num_tokens: float, num_passes: float) -> float:
        """Seconds expected."""
        return float(self._found @ (1.0, num_tokens, num_passes))

    def _fit(self) -> np.ndarray:
        """(a, b, c): the best of all choices of coefficients to leave out, without any that is negative."""
        scale = np.sqrt(np.maximum(np.diag(self._products), 1e-30))
        products = self._products / np.outer(scale, scale) + 1e-9 * np.eye(3)
        sums = self._sums / scale
        best, least = np.zeros(3), 0.0
        for size in (3, 2, 1):
            for chosen in map(list, combinations(range(3), size)):
                found = np.zeros(3)
                found[chosen] = np.linalg.lstsq(products[np.ix_(chosen, chosen)], sums[chosen])[0]
                error = found @ products @ found - 2 * sums @ found
                if found.min() >= 0 and error < least:
                    best, least = found, error
            if size == 3 and least < 0:
                break
        return best / scale


class Pacing:
    """The lengths of adaptive drafts."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self._formulas: OrderedDict[str, _Formula] = OrderedDict()

    def observe_step(self, seconds: float, num_tokens: int, num_passes: int) -> None:
        """A step's duration.

        Args:
            num_tokens: positions that all terms together were run on.
            num_passes: forward passes of drafting terms before that; 0 for a step without drafts.
        """
        self.costs.observe(seconds, num_tokens, num_passes)

    def observe_round(self, key: str, drafted: int, accepted: int) -> None:
        """What became of a formula's drafts.

        Args:
            key: the formula's.
            drafted: tokens, at least 1.
            accepted: how many of them were kept.
        """
        formula = self._formula(key)
        fade = _ROUND_MEMORY ** max(1, formula.rounds - formula.observed)
        tested = min(accepted + 1, drafted)
        # A good time has many tests a round and a bad one has one: it must not take as many to notice it.
        fade = min(fade, max(0.0, 1 - tested / _MOST_TESTS))
        formula.kept = fade * formula.kept + accepted
        formula.tested = fade * formula.tested + tested
        formula.observed = formula.rounds

    def length(self, key: str, members: int, longest: int, passes: float = 1.0) -> int:
        """How many tokens a formula should draft in its next round, 0 for none.

        Args:
            key: the formula's.
            members: rows that step together; each has one more position for every drafted token.
            longest: the most.
            passes: of drafting terms, that a drafted token takes; 0 where n-grams draft.
        """
        formula = self._formula(key)
        if formula.rounds % _DECIDE_EVERY == 0:
            formula.length = self._decided(formula, members, longest, passes)
            formula.patience = self._patience(members, passes)
        formula.rounds += 1
        length = min(formula.length, longest)
        formula.same += 1
        if formula.same >= (_EXPLORE_EVERY if length else formula.patience):
            length, formula.same = 0 if length else min(1, longest), 0
        return length

    def is_worth_a_drafter(self, key: str) -> bool:
        """Whether a formula's next request should come with the members that only draft.

        Not where drafting has been found not to pay, but for one request in so many: that may change.
        """
        formula = self._formulas.get(key)
        if formula is None or formula.length or not self.costs.known or formula.rounds < _FIRST_ROUNDS:
            return True
        formula.passed_over = (formula.passed_over + 1) % _DRAFTER_EVERY
        return formula.passed_over == 0

    def _decided(self, formula: _Formula, members: int, longest: int, passes: float) -> int:
        if not self.costs.known:
            return 0
        plain = self.costs.of(members, 0)
        draft = self.costs.of(members, passes) - plain

        def check(length: int) -> float:
            return self.costs.of(members * (length + 1), 0)

        def per_token(length: int) -> float:
            return cost_of_a_token(formula.acceptance, draft, check, length)

        best = best_length(formula.acceptance, draft, check, longest)
        now = min(formula.length, longest)
        keep = per_token(now) <= min(plain, per_token(best) / (1 - _GAIN))
        return now if keep else best

    def _patience(self, members: int, passes: float) -> int:
        """After how many rounds without drafts one token is tried."""
        if not self.costs.known:
            return _DECIDE_EVERY
        plain = self.costs.of(members, 0)
        extra = self.costs.of(2 * members, passes) - plain
        if plain <= 0:
            return _EXPLORE_EVERY
        return min(max(_EXPLORE_EVERY, math.ceil(extra / (_EXPLORATION * plain))), _EXPLORE_LATEST)

    def _formula(self, key: str) -> _Formula:
        found = self._formulas.setdefault(key, _Formula())
        self._formulas.move_to_end(key)
        if len(self._formulas) > _FORMULAS:
            self._formulas.popitem(last=False)
        return found

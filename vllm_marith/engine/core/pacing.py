"""How many tokens are worth drafting, from what steps have taken and how many drafts were kept.

Two things are estimated: what a step takes (`StepCosts`), and for each formula the share of drafted tokens
that are kept, among those that were tested at all: what comes after a rejected token was not.

From these `vllm_marith.plan.best_length` gives the length that makes a token cheapest.  It is kept until
another promises `_GAIN` less, so that noise does not move it.  A term that only drafts costs a row, and
perhaps a model's pass, in every step: where a token is cheaper without it, the formula's next requests come
without.

What is not tried cannot be known.  So a formula that drafts goes without once in a while, and one that does
not tries a few tokens; and a few requests come with their drafters where the others come without them, or the
other way about.  Each of the two costs `_EXPLORATION` of the time at most.

Nothing here looks at a clock or draws at random: the same observations give the same lengths.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np

from vllm_marith.plan import best_length, cost_of_a_token

from .costs import StepCosts, Work

_ROUND_MEMORY: Final = 0.985
_GAIN: Final = 0.05
_EXPLORATION: Final = 0.01
_EXPLORE_EVERY: Final = 64  # rounds, at the least ...
_EXPLORE_LATEST: Final = 4096  # ... and at the most
_DECIDE_EVERY: Final = 8  # rounds
_TRIED: Final = (1, 3)  # tokens, in turns: what drafts cost at all and what each costs are two things
_FIRST_ROUNDS: Final = 32  # before a formula's requests come without their drafters
_OTHERWISE_EVERY: Final = 32  # requests, at the least ...
_OTHERWISE_LATEST: Final = 1024  # ... and at the most
_FORMULAS: Final = 1024
# What a formula is thought to keep before anything is known of it, and how many tests that is worth.
_PRIOR, _PRIOR_TESTS = 0.7, 4.0
_LEAST_TESTS, _MOST_TESTS = 2.0, 64.0  # that are remembered


@dataclass(frozen=True, eq=False)
class Rows:
    """Who runs beside each other; all arrays are float64 ``[constituents]``.

    Attributes:
        running: rows of each constituent.
        drafters: those of them that only draft.
        rates: passes that a formula takes for each drafted token; 0 where text is copied.
    """

    running: np.ndarray
    drafters: np.ndarray
    rates: np.ndarray

    def step(self, length: int) -> Work:
        """A step of them all when each checks so many drafts: groups beside each other draft alike."""
        return Work(self.running, 0 * self.rates).drafting(length, self.rates)

    def without_drafters(self) -> Work:
        return Work(self.running - self.drafters, 0 * self.rates)


@dataclass
class _Formula:
    """What is known of one formula.

    Attributes:
        kept, tested: drafted tokens, fading.
        length: as last decided.
        patience: rounds without drafts, as last decided.
        rounds: since the beginning.
        same: rounds since the other was tried, drafts or none.
        trials: how often drafts were tried.
        observed: the round of the last observation.
        optional: whether requests can come without what is there for drafts alone.
        drafters_pay: whether a token is cheaper with drafts than without them and the terms that only draft;
            None while that is not known.
        alike: requests since one came otherwise, with drafters or without them.
        otherwise: after how many that is to happen.
    """

    kept: float = _PRIOR * _PRIOR_TESTS
    tested: float = _PRIOR_TESTS
    length: int = 0
    patience: int = 0
    rounds: int = 0
    same: int = 0
    trials: int = 0
    observed: int = 0
    optional: bool = False
    drafters_pay: bool | None = None
    alike: int = 0
    otherwise: int = _OTHERWISE_EVERY

    @property
    def acceptance(self) -> float:
        return self.kept / self.tested

    def next_length(self, longest: int) -> int:
        """What was decided, or the other once in a while."""
        length = min(self.length, longest)
        self.same += 1
        if self.same < (_EXPLORE_EVERY if length else self.patience):
            return length
        self.same = 0
        if length:
            return 0
        self.trials += 1
        return min(_TRIED[self.trials % len(_TRIED)], longest)


class Pacing:
    """The lengths of adaptive drafts.

    Args:
        constituents: number of base models.
    """

    def __init__(self, constituents: int = 1) -> None:
        self.costs = StepCosts(constituents)
        self._formulas: OrderedDict[str, _Formula] = OrderedDict()

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
        # Nor is one draft that stood, long after the last one, all there is to know.
        fade = max(fade, min(1.0, _LEAST_TESTS / formula.tested))
        formula.kept = fade * formula.kept + accepted
        formula.tested = fade * formula.tested + tested
        formula.observed = formula.rounds

    def length(self, key: str, rows: Rows, longest: int) -> int:
        """How many tokens a formula should draft in its next round, 0 for none.

        Args:
            key: the formula's.
            longest: the most.
        """
        formula = self._formula(key)
        if formula.rounds % _DECIDE_EVERY == 0:
            self._decide(formula, rows, longest)
        formula.rounds += 1
        return formula.next_length(longest)

    def wants_drafters(self, key: str) -> bool:
        """Whether a formula's next request should come with the members that only draft."""
        formula = self._formulas.get(key)
        if formula is None or formula.rounds < _FIRST_ROUNDS or not self.costs.known:
            return True
        formula.optional = True
        formula.alike = (formula.alike + 1) % formula.otherwise
        if formula.drafters_pay is None:  # what it is like without them has to be seen first
            return formula.alike % 2 == 0
        return formula.drafters_pay if formula.alike else not formula.drafters_pay

    def _decide(self, formula: _Formula, rows: Rows, longest: int) -> None:
        one = rows.step(1)
        if not (self.costs.known and self.costs.knows(one)):
            formula.length, formula.patience = 0, _DECIDE_EVERY
            return
        plain = self.costs.of(rows.step(0))

        def per_token(length: int) -> float:
            return cost_of_a_token(formula.acceptance, 0.0, lambda n: self.costs.of(rows.step(n)), length)

        best = best_length(formula.acceptance, 0.0, lambda n: self.costs.of(rows.step(n)), longest)
        now = min(formula.length, longest)
        if per_token(now) > min(plain, per_token(best) / (1 - _GAIN)):
            now = best
        formula.length = now
        trial = self.costs.of(rows.step(max(_TRIED))) - plain
        formula.patience = min(max(_EXPLORE_EVERY, _rarely(trial, plain)), _EXPLORE_LATEST)
        bare = rows.without_drafters()
        if not self.costs.knows(bare):
            return
        here, there = per_token(now), self.costs.of(bare)
        formula.drafters_pay = here < there
        if formula.optional and not formula.drafters_pay:
            # The few requests that come with drafters come to try them.
            formula.patience = _DECIDE_EVERY
            here += trial / _DECIDE_EVERY
        otherwise = _rarely(abs(here - there), min(here, there))
        formula.otherwise = min(max(_OTHERWISE_EVERY, otherwise), _OTHERWISE_LATEST)

    def _formula(self, key: str) -> _Formula:
        found = self._formulas.setdefault(key, _Formula())
        self._formulas.move_to_end(key)
        if len(self._formulas) > _FORMULAS:
            self._formulas.popitem(last=False)
        return found


def _rarely(extra: float, usual: float) -> int:
    """Once in how many times something dearer costs `_EXPLORATION` of the time."""
    return math.ceil(extra / (_EXPLORATION * usual)) if usual > 0 else 0

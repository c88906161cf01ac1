"""The exact law of a randomised algorithm: every random decision is taken every way.

The algorithm asks a *chooser* instead of a generator, `chooser.choice(probs) -> int`, which returns an index
of non-zero probability, and is run once for every sequence of answers.  Its runs may ask different
questions, and differently many; given the same answers it must always ask the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import numpy as np

Outcome = TypeVar("Outcome", bound=Hashable)


class Chooser(Protocol):
    def choice(self, probs: Any) -> int:
        """An index, drawn with the probability that stands there; the probabilities sum to 1."""
        ...


class Path:
    """Answers as a script says, then with the first index possible.

    Attributes:
        probability: of all answers so far.
        asked: (answer, probabilities) of each question.
    """

    def __init__(self, script: list[int]) -> None:
        self.probability = 1.0
        self.asked: list[tuple[int, np.ndarray]] = []
        self._script = script

    def choice(self, probs: Any) -> int:
        probs = np.asarray(probs, dtype=float)
        assert probs.ndim == 1, probs.shape
        assert probs.min() >= 0, probs
        assert abs(probs.sum() - 1) < 1e-9, probs
        place = len(self.asked)
        chosen = self._script[place] if place < len(self._script) else int(np.flatnonzero(probs)[0])
        self.asked.append((chosen, probs))
        self.probability *= float(probs[chosen])
        return chosen

    def following(self) -> list[int] | None:
        """The script of the next path in order, None after the last."""
        asked = list(self.asked)
        while asked:
            chosen, probs = asked.pop()
            others = np.flatnonzero(probs[chosen + 1 :])
            if len(others):
                return [answer for answer, _ in asked] + [chosen + 1 + int(others[0])]
        return None


def enumerate_paths(algorithm: Callable[[Chooser], Outcome], limit: int = 300_000) -> dict[Outcome, float]:
    """Outcome -> its exact probability.

    Args:
        algorithm: returns an outcome of one run; deterministic but for the chooser.
        limit: paths after which it is an error to go on.
    """
    law: dict[Outcome, float] = defaultdict(float)
    script: list[int] | None = []
    for _ in range(limit):
        path = Path(script)
        law[algorithm(path)] += path.probability
        script = path.following()
        if script is None:
            return dict(law)
    raise AssertionError(f"more than {limit} paths")


class Dice:
    """A chooser that draws; `seed` repeats it."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def choice(self, probs: Any) -> int:
        return int(self._random.choice(len(probs), p=probs))

"""The process behind hard constraints, one answer at a time: accept, take back, give up.

The process.  Let P(x | x_1..x_{p-1}) be what is sampled from, and B_p the tokens *banned* at position p, none
at first.  At each position a token is drawn from P restricted to the complement of B_p.  When the text of the
tokens drawn so far contains a match, and the first character of the leftmost one became text with token x_p,
the tokens from x_p on are taken back, x_p joins B_p, B_q is emptied for all q > p, and drawing goes on at p
with new randomness.

Nothing that may be taken back is shown.  Tokens are *released* up to the last place between two of them at
which no match can have begun: whatever is drawn, and taken back, after such a place, no match reaches across
it.  (That no match can begin in a token's text any more is not enough: the tokens that rule it out may
themselves be taken back.)  Held back are `window` characters at most; where a match reaches across what had
to be released for that, x_p is the first of its tokens that has not been.

This module knows text and tokens only; `vllm_marith.engine.core.constraints` makes a scheduler follow it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import Protocol

from vllm_marith.language.search import Place, Search


class TextStream(Protocol):
    """Tokens to text, as the client sees it."""

    def push(self, token: int) -> str:
        """The text that the token adds; empty where characters are still incomplete."""

    def reset(self, tokens: Sequence[int]) -> None:
        """Starts again with these tokens."""


class Verdict(Enum):
    """What becomes of a token."""

    ACCEPTED = auto()
    TAKEN_BACK = auto()
    """`Backoff.tokens` is shorter than before, or as long, and `Backoff.banned` has one more token."""
    GAVE_UP = auto()
    """The answer ends with `Backoff.tokens`, all of them released."""


class Backoff:
    """The process for one answer.

    Args:
        searches: at the beginning of a text.
        text: of no tokens yet.
        max_backoffs: takings back after which the next one gives up.
        window: characters that are held back at most.
        allowed: the only tokens that can be drawn, None for all.

    Attributes:
        tokens: drawn and not taken back.
        num_released: how many of them may be shown.
        num_backoffs: how often tokens were taken back.
    """

    def __init__(
        self,
        searches: Sequence[Search],
        text: TextStream,
        *,
        max_backoffs: int,
        window: int,
        allowed: Collection[int] | None = None,
    ) -> None:
        self._searches = searches
        self._text = text
        self._max_backoffs = max_backoffs
        self._window = window
        self._allowed = allowed
        self.tokens: list[int] = []
        self.num_released = 0
        self.num_backoffs = 0
        self._ends: list[int] = []  # length of the text with each token
        # Where the searches stood before each of the tokens that are not released.
        self._held: list[tuple[Place, ...]] = []
        self._bans: dict[int, set[int]] = {}

    def banned(self, position: int) -> list[int]:
        """B_p, of the token with this index."""
        return sorted(self._bans.get(position, ()))

    def offer(self, token: int, *, ends: bool = False, shown: bool = True) -> Verdict:
        """Judges the next token.

        Args:
            ends: whether the answer ends with it.
            shown: whether its text is a part of the answer's; that of a stop token is not.
        """
        position = len(self.tokens)
        drawable = self._allowed is None or token in self._allowed
        if not drawable or token in self._bans.get(position, ()):
            return self._give_up()  # all that could be drawn is banned
        self._held.append(tuple(search.place for search in self._searches))
        start = self._read(self._text.push(token) if shown else "")
        self.tokens.append(token)
        if start is None and ends:
            start = self._leftmost([search.end() for search in self._searches])
        if start is not None:
            return self._take_back(max(bisect_right(self._ends, start), self.num_released))
        self._release(len(self.tokens) if ends else self._num_certain())
        return Verdict.ACCEPTED

    def _read(self, text: str) -> int | None:
        """Reads on; where the leftmost match begins, if one is certain now."""
        index = self._ends[-1] if self._ends else 0
        self._ends.append(index + len(text))
        for i, character in enumerate(text, index):
            start = self._leftmost([search.read(character, i) for search in self._searches])
            if start is not None:
                return start
        return None

    @staticmethod
    def _leftmost(starts: Sequence[int | None]) -> int | None:
        return min((start for start in starts if start is not None), default=None)

    def _take_back(self, position: int) -> Verdict:
        if self.num_backoffs >= self._max_backoffs:
            return self._give_up()
        self.num_backoffs += 1
        self._bans = {p: banned for p, banned in self._bans.items() if p <= position}
        self._bans.setdefault(position, set()).add(self.tokens[position])
        self._cut(position)
        return Verdict.TAKEN_BACK

    def _give_up(self) -> Verdict:
        self._cut(self.num_released)
        self._bans.clear()
        return Verdict.GAVE_UP

    def _cut(self, position: int) -> None:
        """Forgets the tokens from `position` on."""
        kept = position - self.num_released
        if kept < len(self._held):
            for search, place in zip(self._searches, self._held[kept], strict=True):
                search.place = place
        del self.tokens[position:], self._ends[position:], self._held[kept:]
        self._text.reset(self.tokens)

    def _num_certain(self) -> int:
        """Tokens that nothing can take back any more, or that are too old to wait for that."""
        places = [*self._held, tuple(search.place for search in self._searches)]
        uncrossed = next(
            (i for i in reversed(range(len(places))) if not any(place.threads for place in places[i])), 0
        )
        return max(self.num_released + uncrossed, bisect_right(self._ends, self._ends[-1] - self._window))

    def _release(self, number: int) -> None:
        if number > self.num_released:
            del self._held[: number - self.num_released]
            self.num_released = number
            self._bans = {p: banned for p, banned in self._bans.items() if p >= number}

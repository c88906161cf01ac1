"""The process behind constraints, without an engine: its law by exact enumeration, and what it promises."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_marith.engine.core.backoff import Backoff, Verdict
from vllm_marith.language import Constraints

Law = dict[tuple[int, ...], float]
PIECES = ("a", "b", "ab", "c", "B", "")
"""Texts of the tokens of a small vocabulary; the last is half a character, say."""
LENGTH = 3


class Pieces:
    """Text of tokens by table."""

    def __init__(self, pieces: Sequence[str] = PIECES) -> None:
        self.pieces = pieces
        self.tokens: list[int] = []

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return self.pieces[token]

    def reset(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)


def process(window: int = 256, max_backoffs: int = 10**9, **constraints: object) -> Backoff:
    searches = Constraints.from_json(constraints).searches()
    return Backoff(searches, Pieces(), max_backoffs=max_backoffs, window=window)


def chance(prefix: Sequence[int]) -> list[float]:
    """A distribution over the vocabulary that depends on what came before."""
    weights = [1.0 + (7 * token + 3 * sum(prefix, len(prefix))) % 5 for token in range(len(PIECES))]
    return [weight / sum(weights) for weight in weights]


def enumerated(make: Callable[[], Backoff]) -> tuple[Law, float]:
    """The law of `Backoff`, every draw of every path; and the probability of giving up."""
    answers: Law = defaultdict(float)
    gave_up = 0.0
    # Paths that meet in the same state go on alike: (tokens, bans) -> (probability, one such path).
    states: dict[object, tuple[float, tuple[int, ...]]] = {(): (1.0, ())}
    while states:
        reached: dict[object, tuple[float, tuple[int, ...]]] = {}
        for probability, path in states.values():
            before = make()
            for token in path:
                before.offer(token, ends=len(before.tokens) == LENGTH - 1)
            position = len(before.tokens)
            banned = set(before.banned(position))
            chances = chance(before.tokens)
            left = 1 - sum(chances[token] for token in banned)
            possible = [token for token in range(len(PIECES)) if token not in banned]
            for token in possible or [min(banned)]:
                backoff = make()
                for drawn in (*path, token):
                    verdict = backoff.offer(drawn, ends=len(backoff.tokens) == LENGTH - 1)
                mass = probability * (chances[token] / left if possible else 1)
                if verdict == Verdict.GAVE_UP:
                    gave_up += mass
                elif len(backoff.tokens) == LENGTH:
                    answers[tuple(backoff.tokens)] += mass
                else:
                    bans = tuple((p, tuple(backoff.banned(p))) for p in range(LENGTH))
                    key = tuple(backoff.tokens), bans, backoff.num_released
                    reached[key] = (reached.get(key, (0.0,))[0] + mass, (*path, token))
        states = reached
    return answers, gave_up


def defined(pattern: re.Pattern[str]) -> Law:
    """The law as docs/semantics.md defines it, by recursion over prefixes: no searches, no state."""

    def text(tokens: Sequence[int]) -> str:
        return "".join(PIECES[token] for token in tokens)

    def beginning(tokens: tuple[int, ...]) -> int | None:
        """The token with which the first character of the earliest-ending leftmost match became text."""
        whole = text(tokens)
        for end in range(len(whole) + 1):
            for start in range(end):
                if pattern.fullmatch(whole, start, end):
                    return next(i for i in range(len(tokens)) if len(text(tokens[: i + 1])) > start)
        return None

    def go_on(prefix: tuple[int, ...], banned: frozenset[int]) -> tuple[Law, dict[int, float]]:
        """Answers that begin with the prefix; and the ways back to earlier positions, by position."""
        if len(prefix) == LENGTH:
            return {prefix: 1.0}, {}
        chances = chance(prefix)
        left = 1 - sum(chances[token] for token in banned)
        answers: Law = defaultdict(float)
        back: dict[int, float] = defaultdict(float)
        for token in set(range(len(PIECES))) - banned:
            found, returns = {}, {}
            place = beginning((*prefix, token))
            if place is None:
                found, returns = go_on((*prefix, token), frozenset())
            else:
                returns = {place: 1.0}
            here = returns.pop(len(prefix), 0.0)
            if here > 0:  # this token is banned from now on
                again, back_again = go_on(prefix, banned | {token})
                found = {x: found.get(x, 0) + here * again.get(x, 0) for x in {*found, *again}}
                for position, mass in back_again.items():
                    returns[position] = returns.get(position, 0) + here * mass
            for answer, mass in found.items():
                answers[answer] += mass * chances[token] / left
            for position, mass in returns.items():
                back[position] += mass * chances[token] / left
        return answers, back

    answers, back = go_on((), frozenset())
    assert not back
    return answers


def assert_same(found: Law, wanted: Law) -> None:
    assert abs(sum(found.values()) - 1) < 1e-12
    for answer in {*found, *wanted}:
        assert abs(found.get(answer, 0) - wanted.get(answer, 0)) < 1e-12, answer


@pytest.mark.parametrize(
    ("constraints", "pattern"),
    [
        ({"forbid": ["ab"]}, "ab"),
        ({"forbid": ["ab"], "ignore_case": False}, "(?-i:ab)"),
        ({"forbid": ["ca", "abc"]}, "ca|abc"),
        ({"forbid_regex": ["b.c", "cc+"]}, "b.c|cc+"),
        ({"forbid": ["aba"], "forbid_regex": ["[ac]{3}"]}, "aba|[ac]{3}"),
    ],
)
def test_law(constraints: dict[str, object], pattern: str) -> None:
    ignored = constraints.get("ignore_case", True)
    law, gave_up = enumerated(lambda: process(**constraints))
    assert gave_up == 0
    assert_same(law, defined(re.compile(pattern, re.IGNORECASE if ignored else 0)))


def test_law_of_single_tokens_is_the_restricted_distribution() -> None:
    """What one token alone can violate: at each position P restricted to the others and renormalised."""
    law, _ = enumerated(lambda: process(forbid=["c"]))
    others = [token for token in range(len(PIECES)) if "c" not in PIECES[token].lower()]
    for answer in product(others, repeat=LENGTH):
        wanted = 1.0
        for position, token in enumerate(answer):
            chances = chance(answer[:position])
            wanted *= chances[token] / sum(chances[other] for other in others)
        assert abs(law[answer] - wanted) < 1e-12


def test_a_window_bounds_what_is_held_but_not_what_is_forbidden() -> None:
    law, gave_up = enumerated(lambda: process(1, forbid=["abc", "cb"]))
    assert abs(sum(law.values()) + gave_up - 1) < 1e-12
    for answer in law:
        text = "".join(PIECES[token] for token in answer).lower()
        assert "abc" not in text
        assert "cb" not in text


def test_the_end_is_a_word_boundary() -> None:
    law, gave_up = enumerated(lambda: process(forbid=["ab"], whole_words=True))
    assert gave_up == 0
    texts = {"".join(PIECES[token] for token in answer).lower() for answer in law}
    assert "ab" not in texts
    assert "abab" in texts  # a word of its own


tokens = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)
forbidden = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


@given(forbidden, tokens, st.integers(1, 6), st.integers(0, 20), st.booleans())
def test_promises(
    words: list[str], drawn: list[int], window: int, max_backoffs: int, whole_words: bool
) -> None:
    """Whatever is drawn: what is released stays, is free of matches, and lags by a window at most."""
    backoff = process(window, max_backoffs, forbid=words, whole_words=whole_words)
    released: list[int] = []
    before: list[int] = []
    for i, token in enumerate(drawn):
        if token in backoff.banned(len(backoff.tokens)):
            continue  # P is restricted: it cannot be drawn
        verdict = backoff.offer(token, ends=i == len(drawn) - 1)
        assert backoff.tokens[: len(released)] == released
        assert backoff.num_released >= len(released)
        released = backoff.tokens[: backoff.num_released]
        if verdict == Verdict.GAVE_UP:
            assert backoff.num_backoffs == max_backoffs
            assert backoff.tokens == released
            break
        held = "".join(PIECES[token] for token in backoff.tokens[len(released) :])
        if verdict == Verdict.ACCEPTED:
            assert backoff.tokens == [*before, token]
            # The oldest token held may have text that is older than the window.
            assert len(held) - len(PIECES[backoff.tokens[len(released)]] if held else "") < window
        else:
            assert len(backoff.tokens) <= len(before)
            assert [*before, token][len(backoff.tokens)] in backoff.banned(len(backoff.tokens))
            assert backoff.num_backoffs <= max_backoffs
        before = list(backoff.tokens)
    text = "".join(PIECES[token] for token in released).lower()
    if not whole_words:
        assert not any(word in text for word in words)


def test_gives_up_when_all_that_can_be_drawn_is_banned() -> None:
    backoff = Backoff(
        Constraints(forbid=("a", "c")).searches(), Pieces(), max_backoffs=99, window=9, allowed={0, 1, 3}
    )
    assert backoff.offer(1) == Verdict.ACCEPTED
    assert backoff.offer(0) == backoff.offer(3) == Verdict.TAKEN_BACK
    assert backoff.banned(1) == [0, 3]
    # The sampler has nothing left: it draws what is banned, or what it pleases.
    assert backoff.offer(4) == Verdict.GAVE_UP
    assert backoff.tokens == [1]
    assert backoff.banned(1) == []


def test_a_stop_token_is_no_text() -> None:
    backoff = process(forbid=["bc"])
    assert backoff.offer(1) == Verdict.ACCEPTED
    assert backoff.num_released == 0
    assert backoff.offer(3, ends=True, shown=False) == Verdict.ACCEPTED
    assert backoff.num_released == 2

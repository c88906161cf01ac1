"""Forbidden patterns are found where, and as soon as, `re` finds them, and nothing is held for nothing."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_marith.language import patterns
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.patterns import is_word, regex_automaton, words_automaton
from vllm_marith.language.search import Search

ALPHABET = "aBb c"
texts = st.text(ALPHABET, max_size=8)
words = st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=4)
atoms = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^a]", r"\s", r"\w", r"\W", "(?:ab)", r"\d"])
regexes = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["+", "*", "?", "{2}", "{1,3}", "{2,}", "+?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)


def run(search: Search, text: str) -> tuple[int, int] | None:
    """(length of the text at which a match is certain, where it begins)."""
    for i, character in enumerate(text):
        start = search.read(character, i)
        if start is not None:
            return i + 1, start
    return None


def wanted(pattern: re.Pattern[str], text: str) -> tuple[int, int] | None:
    for end in range(1, len(text) + 1):
        for start in range(end):
            if pattern.fullmatch(text, start, end):
                return end, start
    return None


def word_search(forbidden: list[str], *, ignore_case: bool = True, whole_words: bool = False) -> Search:
    root = words_automaton(forbidden, ignore_case=ignore_case, whole_words=whole_words)
    return Search(root, folds_case=ignore_case)


def regex_search(*forbidden: str, ignore_case: bool = False) -> Search:
    return Search(regex_automaton(forbidden, ignore_case=ignore_case), folds_case=False)


@given(words, texts, st.booleans())
def test_words(forbidden: list[str], text: str, ignore_case: bool) -> None:
    pattern = re.compile("|".join(map(re.escape, forbidden)), re.IGNORECASE if ignore_case else 0)
    assert run(word_search(forbidden, ignore_case=ignore_case), text) == wanted(pattern, text)


@given(regexes, texts, st.booleans())
def test_regexes(regex: str, text: str, ignore_case: bool) -> None:
    pattern = re.compile(regex, re.IGNORECASE if ignore_case else 0)
    if pattern.fullmatch(""):
        with pytest.raises(FormulaError, match="matches the empty text"):
            regex_search(regex)
    else:
        assert run(regex_search(regex, ignore_case=ignore_case), text) == wanted(pattern, text)


@given(words, texts)
def test_whole_words(forbidden: list[str], text: str) -> None:
    """Certain once the next character is known, or the end."""
    parts = [
        (r"\b" if is_word(w[0]) else "") + re.escape(w) + (r"\b" if is_word(w[-1]) else "") for w in forbidden
    ]
    pattern = re.compile("|".join(parts), re.IGNORECASE)
    search = word_search(forbidden, whole_words=True)
    found = run(search, text)
    if found is None:
        assert (search.end() is None) == (pattern.search(text) is None)
    else:
        assert pattern.search(text[: found[0]])
        # It was not yet certain one character before: some way to go on has no match.
        before = text[: found[0] - 1]
        assert any(not pattern.search(before + then) for then in ("", *ALPHABET, "_"))


@given(regexes, texts)
def test_nothing_begins_in_what_is_not_held(regex: str, text: str) -> None:
    pattern = re.compile(regex)
    if pattern.fullmatch(""):
        return
    search = regex_search(regex)
    if run(search, text) is not None:
        return
    held = min(search.place.threads.values(), default=len(text))
    for length in range(4):
        for then in product(ALPHABET, repeat=length):
            whole = text + "".join(then)
            found = wanted(pattern, whole)
            assert found is None or found[1] >= held, (whole, found)


@given(words, texts)
def test_only_beginnings_of_words_are_held(forbidden: list[str], text: str) -> None:
    search = word_search(forbidden, ignore_case=False)
    if run(search, text) is not None:
        return
    beginnings = [
        i for i in range(len(text)) if any(w.startswith(text[i:]) and w != text[i:] for w in forbidden)
    ]
    assert set(search.place.threads.values()) == set(beginnings)


@given(words, texts, texts)
def test_a_search_can_be_put_back(forbidden: list[str], first: str, second: str) -> None:
    search = word_search(forbidden)
    if run(search, first) is not None:
        return
    place = search.place
    found = run(search, second)
    search.place = place
    assert run(search, second) == found


@pytest.mark.parametrize(
    ("word", "text", "start"),
    [
        ("straße", "Die STRASSE", 4),
        ("STRASSE", "die Straße", 4),
        ("Ärger", "kein ärger", 5),
        ("café", "cafe\u0301!", 0),  # decomposed
        ("cafe\u0301", "CAFÉ", 0),
        ("ΣΊΣΥΦΟΣ", "σίσυφος", 0),  # two forms of one small letter
        ("🙂🙂", "a🙂🙂", 1),
        ("é", "e", None),
    ],
)
def test_words_of_unicode(word: str, text: str, start: int | None) -> None:
    found = run(word_search([word]), text)
    assert (found and found[1]) == start


@pytest.mark.parametrize(
    ("regex", "text", "found"),
    [
        (r"[0-9]{4}", "in 1984", (7, 3)),
        (r"\bcat\b", "a cats cat.", (11, 7)),
        (r"\Bat", "at cat", (6, 4)),
        (r"(?i)secret", "SeCrEt", (6, 0)),
        (r"(?i:a)b", "AB Ab", (5, 3)),
        (r"(?s)a.b", "a\nb", (3, 0)),
        ("a.b", "a\nb", None),
        (r"\d", "٣", (1, 0)),  # decimal digits of every script
        (r"(?a)\d", "٣", None),
        (r"(?a)\D", "٣", (1, 0)),
        (r"[^\W\d]", "1_", (2, 1)),
        ("a{3,}?b", "aaaab", (5, 0)),
    ],
)
def test_regex_syntax(regex: str, text: str, found: tuple[int, int] | None) -> None:
    assert run(regex_search(regex), text) == found


@pytest.mark.parametrize(
    ("regex", "sentence"),
    [
        ("(a", "is wrong: missing \\)"),
        ("[b-a]", "is wrong: bad character range"),
        ("a{4000}", "is too large"),
        ("(?:){100000000}a", "is too large"),
        ("((a{100}){100}){100}", "is too large"),
        ("(?=a)b", "has look-around"),
        ("(?<!a)b", "has look-around"),
        (r"(a)\1", "has a back-reference"),
        ("^a", "has an anchor"),
        ("a$", "has an anchor"),
        (r"a\Z", "has an anchor"),
        ("(?>a)b", "has an atomic group"),
        ("a++b", "has a possessive repeat"),
        ("a*", "matches the empty text"),
        (r"\b", "matches the empty text"),
        ("(" * 250 + "a" + ")" * 250, "has too many groups"),
    ],
)
def test_refused_regexes(regex: str, sentence: str) -> None:
    with pytest.raises(FormulaError, match=sentence):
        regex_search(regex)


@pytest.mark.parametrize("regex", ["(a+)+b", "(a|aa)+b", "(a?){30}a{30}b", "(.*)*(.*)*b", "(a{0,15}){0,15}b"])
def test_work_is_linear(regex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns on which backtracking takes exponential time: each node looks at a character once at most."""
    looks = 0
    make = patterns._class

    def counting(*args: object) -> object:
        contains = make(*args)

        def counted(character: str) -> bool:
            nonlocal looks
            looks += 1
            return contains(character)

        return counted

    monkeypatch.setattr(patterns, "_class", counting)
    search = regex_search(regex)
    assert run(search, "a" * 300) is None
    assert 0 < looks <= 300 * patterns.MAX_NODES
    assert len(search.place.threads) <= patterns.MAX_NODES


def test_many_words_are_one_walk() -> None:
    search = word_search(["a" * n + "b" for n in range(1, 200)])
    run(search, "a" * 1000)
    assert len(search.place.threads) <= 200

"""Forbidden words and regular expressions as one automaton, searched in time linear in the text.

Clients write the patterns, so Python's backtracking `re` never runs one: its parser is used, and what it
parsed becomes a nondeterministic automaton (Thompson's construction) of a bounded number of nodes, which
`vllm_marith.language.search` steps over the text character by character.  Words share their prefixes.

What an automaton cannot do is refused with a sentence: look-around, back-references, anchors, atomic groups
and possessive repeats.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Final
from unicodedata import normalize

from vllm_marith.language.errors import FormulaError

MAX_NODES: Final = 512
"""Nodes of the regular expressions of one request: each is looked at once a character, at most."""

MAX_GROUPS: Final = 64
"""Groups of one regular expression: parser and construction recurse into them."""

Look = Callable[[str | None, str | None], bool]
"""A condition on the characters before and after a place; None at the ends of the text."""

_REFUSED: Final = {
    op.ASSERT: "look-around",
    op.ASSERT_NOT: "look-around",
    op.GROUPREF: "a back-reference",
    op.GROUPREF_EXISTS: "a back-reference",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repeat",
    op.AT: "an anchor",
}


@dataclass(eq=False, slots=True)
class Node:
    """A state of the automaton.

    Attributes:
        passes: nodes reached without a character, if `look` holds.
        look: None where it always holds.
        letters: nodes reached by one character.
        classes: (whether a character belongs to it, node reached by it).
        accepts: whether a match ends here.
    """

    passes: list[Node] = field(default_factory=list)
    look: Look | None = None
    letters: dict[str, Node] = field(default_factory=dict)
    classes: list[tuple[Callable[[str], bool], Node]] = field(default_factory=list)
    accepts: bool = False


def is_word(character: str | None) -> bool:
    r"""Whether a character is part of words: ``\w``."""
    return character is not None and (character.isalnum() or character == "_")


def at_boundary(before: str | None, after: str | None) -> bool:
    r"""``\b``."""
    return is_word(before) != is_word(after)


def words_automaton(words: Iterable[str], *, ignore_case: bool, whole_words: bool) -> Node:
    """The automaton of literal words and phrases.

    It reads case-folded text if `ignore_case`.  A word is forbidden in both of Unicode's canonical forms: an
    accent may be a character of its own.

    Args:
        whole_words: whether a word that begins (ends) with a letter or digit must not follow (precede) one.
    """
    anywhere, at_start, end = Node(), Node(), Node(accepts=True)
    at_end = Node([end], at_boundary)
    for word in words:
        for form in {word, normalize("NFC", word), normalize("NFD", word)}:
            text = form.casefold() if ignore_case else form
            node = at_start if whole_words and is_word(text[0]) else anywhere
            for character in text:
                node = node.letters.setdefault(character, Node())
            target = at_end if whole_words and is_word(text[-1]) else end
            if target not in node.passes:
                node.passes.append(target)
    return Node([anywhere, Node([at_start], at_boundary)])


def regex_automaton(patterns: Sequence[str], *, ignore_case: bool) -> Node:
    """The automaton of regular expressions in Python's syntax.

    Raises:
        FormulaError: a pattern that is wrong, that no automaton can search, that is too large, or that
            matches the empty text.
    """
    builder, end = _Builder(), Node(accepts=True)
    root = Node()
    for pattern in patterns:
        if pattern.count("(") > MAX_GROUPS:
            raise FormulaError(
                f"the regular expression {pattern!r:.80} has too many groups; {MAX_GROUPS} is the most"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # e.g. a possible nested set
                parsed = parser.parse(pattern, re.IGNORECASE if ignore_case else 0)
            start = builder.sequence(parsed, parsed.state.flags, end)
        except re.error as error:
            raise FormulaError(f"the regular expression {pattern!r:.80} is wrong: {error}") from None
        except OverflowError:
            raise FormulaError(f"the regular expression {pattern!r:.80} repeats too often") from None
        except FormulaError as error:
            raise FormulaError(f"the regular expression {pattern!r:.80} {error.message}") from None
        if _matches_nothing(start):
            raise FormulaError(
                f"the regular expression {pattern!r:.80} matches the empty text: all is forbidden"
            )
        root.passes.append(start)
    return root


class _Builder:
    """Builds from the end: every function is given the node that follows and returns the first one."""

    def __init__(self) -> None:
        self._num_nodes = 0

    def sequence(self, items: Iterable[tuple[Any, Any]], flags: int, tail: Node) -> Node:
        for kind, argument in reversed(list(items)):
            tail = self._item(kind, argument, flags, tail)
        return tail

    def _node(self, *passes: Node, look: Look | None = None) -> Node:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise FormulaError(f"is too large: all of them together may have {MAX_NODES} states")
        return Node(list(passes), look)

    def _item(self, kind: Any, argument: Any, flags: int, tail: Node) -> Node:
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            # Greedy or not, a match of the same text is found.
            low, high, repeated = argument
            return self._repeat(low, high, repeated, flags, tail)
        if kind is op.BRANCH:
            return self._node(*(self.sequence(branch, flags, tail) for branch in argument[1]))
        if kind is op.SUBPATTERN:
            _, added, removed, items = argument
            return self.sequence(items, (flags | added) & ~removed, tail)
        if kind is op.AT and argument is op.AT_BOUNDARY:
            return self._node(tail, look=at_boundary)
        if kind is op.AT and argument is op.AT_NON_BOUNDARY:
            return self._node(tail, look=lambda before, after: not at_boundary(before, after))
        if kind in _REFUSED:
            raise FormulaError(f"has {_REFUSED[kind]}, which is not supported here")
        node = self._node()
        node.classes.append((_class(kind, argument, flags), tail))
        return node

    def _repeat(self, low: int, high: Any, items: Any, flags: int, tail: Node) -> Node:
        if high is op.MAXREPEAT:
            node = self._node(tail)
            node.passes.append(self.sequence(items, flags, node))
        else:
            node = tail
            for _ in range(high - low):
                node = self._node(tail, self.sequence(items, flags, node))
        for _ in range(low):
            # A node of its own, so that repeats of nothing are counted too.
            node = self._node(self.sequence(items, flags, node))
        return node


def _matches_nothing(start: Node) -> bool:
    """Whether a match can end before its first character, wherever it begins."""
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node.accepts:
            return True
        if node not in seen:
            seen.add(node)
            stack.extend(node.passes)
    return False


_CATEGORIES: Final[dict[Any, tuple[Callable[[str], bool], bool]]] = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (is_word, True),
    op.CATEGORY_NOT_WORD: (is_word, False),
}


def _class(kind: Any, argument: Any, flags: int) -> Callable[[str], bool]:
    """Whether a character matches an item that takes exactly one."""
    if kind is op.ANY:
        return (lambda c: True) if flags & re.DOTALL else (lambda c: c != "\n")
    if kind is op.LITERAL:
        kind, argument = op.IN, [(op.LITERAL, argument)]
    elif kind is op.NOT_LITERAL:
        kind, argument = op.IN, [(op.NEGATE, None), (op.LITERAL, argument)]
    if kind is not op.IN:
        raise FormulaError(f"has {str(kind).lower()}, which is not supported here")
    ascii_only = bool(flags & re.ASCII)
    members = [_member(what, value, ascii_only) for what, value in argument if what is not op.NEGATE]
    wanted = argument[0][0] is not op.NEGATE
    cases = _cases if flags & re.IGNORECASE else lambda c: (c,)
    # Texts repeat a few characters; a class costs far more than finding its answer again.
    return lru_cache(maxsize=128)(
        lambda c: any(member(form) for form in cases(c) for member in members) == wanted
    )


def _member(kind: Any, argument: Any, ascii_only: bool) -> Callable[[str], bool]:
    if kind is op.LITERAL:
        letter = chr(argument)
        return lambda c: c == letter
    if kind is op.RANGE:
        first, last = map(chr, argument)
        return lambda c: first <= c <= last
    test, wanted = _CATEGORIES[argument]
    return lambda c: (test(c) and (not ascii_only or c.isascii())) == wanted


def _cases(character: str) -> set[str]:
    forms = {character, character.lower(), character.upper(), character.casefold(), character.swapcase()}
    return {form for form in forms if len(form) == 1}

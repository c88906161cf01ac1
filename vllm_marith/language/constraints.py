"""Hard constraints of a request: words and regular expressions that the answer must not contain.

    {"formula": "child - 0.6*adult",
     "constraints": {"forbid": ["damn", "shut up"], "forbid_regex": ["[0-9]{4}"], "whole_words": true}}

What is forbidden is text, not tokens: see docs/semantics.md for the distribution that results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.patterns import regex_automaton, words_automaton
from vllm_marith.language.search import Search
from vllm_marith.language.validation import sentence

Word = Annotated[str, Field(min_length=1, max_length=256, strict=True)]
Regex = Annotated[str, Field(min_length=1, max_length=512, strict=True)]
Flag = Annotated[bool, Field(strict=True)]

_WHAT: Final = "'constraints'"

MAX_WORD_CHARS: Final = 1 << 14
"""Characters of all words of a request together: each is a state or more of an automaton in memory."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Constraints:
    """What an answer must not contain, and how hard to try.

    Attributes:
        forbid: words and phrases, matched anywhere in the answer's text, across tokens.
        forbid_regex: regular expressions in Python's syntax, without look-around, back-references and anchors
            other than ``\\b`` and ``\\B``.
        ignore_case: for words by Unicode case folding, for regular expressions as ``re.IGNORECASE``.
        whole_words: `forbid` only matches between word boundaries: "cat" then leaves "cats" alone.
        max_backoffs: how often tokens are taken back before the answer is cut short.
        window: characters that are held back, at most, because they may be the beginning of a match.  A match
            that is longer is still prevented, by replacing one of its later tokens.
    """

    forbid: Annotated[tuple[Word, ...], Field(max_length=1024)] = ()
    forbid_regex: Annotated[tuple[Regex, ...], Field(max_length=32)] = ()
    ignore_case: Flag = True
    whole_words: Flag = False
    max_backoffs: Annotated[int, Field(ge=0, le=1024, strict=True)] = 64
    window: Annotated[int, Field(ge=1, le=4096, strict=True)] = 256

    def __post_init__(self) -> None:
        characters = sum(map(len, self.forbid))
        if characters > MAX_WORD_CHARS:
            raise FormulaError(
                f"{_WHAT}: the words of 'forbid' have {characters} characters together; {MAX_WORD_CHARS} is "
                "the most"
            )
        if not self.forbid and not self.forbid_regex:
            raise FormulaError(f"{_WHAT} forbid nothing; give 'forbid' or 'forbid_regex'")
        self.searches()

    def searches(self) -> tuple[Search, ...]:
        """New searches for everything that is forbidden, at the beginning of a text.

        Raises:
            FormulaError: a regular expression that cannot be used.
        """
        found = []
        if self.forbid:
            root = words_automaton(self.forbid, ignore_case=self.ignore_case, whole_words=self.whole_words)
            found.append(Search(root, folds_case=self.ignore_case))
        if self.forbid_regex:
            root = regex_automaton(self.forbid_regex, ignore_case=self.ignore_case)
            found.append(Search(root, folds_case=False))
        return tuple(found)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | object) -> Constraints:
        """Constraints from their JSON form.

        Raises:
            FormulaError: naming the key at fault.
        """
        if isinstance(value, cls):
            return value
        try:
            return TypeAdapter(cls).validate_python(dict(value) if isinstance(value, Mapping) else value)
        except ValidationError as error:
            known = tuple(cls.__dataclass_fields__)
            raise FormulaError(f"{_WHAT}: {sentence(error, 'the constraints', known)}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_json` reads it."""
        return {
            "forbid": list(self.forbid),
            "forbid_regex": list(self.forbid_regex),
            "ignore_case": self.ignore_case,
            "whole_words": self.whole_words,
            "max_backoffs": self.max_backoffs,
            "window": self.window,
        }

"""Which words may name a term, and which the grammar keeps for itself."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.validation import describe

Normalize = Literal["sum", "none"]

# Words that the grammar reads as a function, or as the constant `uniform`.
FUNCTIONS: Final = frozenset(
    {
        "indicator",
        "intersection",
        "kl_indicator",
        "max",
        "min",
        "mixture",
        "normalize",
        "plausible",
        "schedule",
        "self_debias",
        "strength",
        "superseded",
        "topk",
        "topp",
        "union",
    }
)
UNIFORM: Final = "uniform"
BASE: Final = "base"  # the one term every server defines: the request as it is
# Models of terms that propose what once followed the last tokens.  They are no constituents, and free:
# nothing runs for them.
NGRAM: Final = "ngram"  # in the request's own prompt and answer
SUFFIX: Final = "suffix"  # and in earlier answers
FreeDrafter = Literal["ngram", "suffix"]
FREE_DRAFTERS: Final[tuple[FreeDrafter, ...]] = (NGRAM, SUFFIX)

# Models, adapters and classifiers are named, never located: no slash and no dot in front, so neither a path
# nor a hub id.
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_NAME: Final = 64


def is_identifier(name: str) -> bool:
    """Whether formulas can read `name` as one word."""
    return len(name) <= _LONGEST_NAME and _IDENTIFIER.fullmatch(name) is not None


def check_term_name(name: object) -> str:
    """`name`, if a term can have it.

    Raises:
        FormulaError: it is no identifier, too long, or a word of the grammar.
    """
    if not isinstance(name, str):
        raise FormulaError(f"a term's name must be a string, not a {type(name).__name__}")
    if len(name) > _LONGEST_NAME:
        raise FormulaError(f"the name '{name[:16]}…' is longer than {_LONGEST_NAME} characters")
    if not _IDENTIFIER.fullmatch(name):
        raise FormulaError(
            f"{name!r} cannot name a term; names have letters, digits and underscores, and no digit first"
        )
    if name in FUNCTIONS or name == UNIFORM:
        raise FormulaError(f"'{name}' is an operator and cannot name a term")
    return name


def check_normalize(value: Any) -> Normalize:
    """`value`, if it is a normalisation."""
    if value == "sum":
        return "sum"
    if value == "none":
        return "none"
    raise FormulaError(f"normalize must be 'sum' or 'none', not {describe(value)}")

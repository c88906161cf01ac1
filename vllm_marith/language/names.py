"""Which words may name a term, and which the grammar keeps for itself."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.nodes import Intersection, Union
from vllm_marith.language.validation import describe

Normalize = Literal["sum", "none"]

FUNCTIONS: Final[dict[str, type[Union] | type[Intersection]]] = {
    "union": Union,
    "max": Union,
    "intersection": Intersection,
    "min": Intersection,
}
# Operators that the grammar will have: naming a term like one would break that formula on the day it does.
RESERVED: Final = frozenset(
    {
        "indicator",
        "kl_indicator",
        "mixture",
        "normalize",
        "plausible",
        "self_debias",
        "strength",
        "superseded",
        "topk",
        "topp",
        "uniform",
    }
)
BASE: Final = "base"  # the one term every server defines: the request as it is

# Models, adapters and classifiers are named, never located: no slash and no dot in front, so neither a path
# nor a hub id.
PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_NAME: Final = 64


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
    if name in FUNCTIONS:
        raise FormulaError(f"'{name}' is an operator and cannot name a term")
    if name in RESERVED:
        raise FormulaError(
            f"'{name}' is reserved for an operator that is not supported yet; it cannot name a term"
        )
    return name


def check_normalize(value: Any) -> Normalize:
    """`value`, if it is a normalisation."""
    if value == "sum":
        return "sum"
    if value == "none":
        return "none"
    raise FormulaError(f"normalize must be 'sum' or 'none', not {describe(value)}")

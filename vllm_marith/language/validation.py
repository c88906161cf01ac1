"""Pydantic's findings as sentences.

The people who read them wrote a formula or a settings file; they have never heard of pydantic, of error
types or of "input_value".
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")
_WANTED = {
    "string_type": "a string",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dataclass_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "string_unicode": "valid text",
}


def sentence(error: ValidationError, what: str, known: Sequence[str]) -> str:
    """The finding of `error` that helps most, as one sentence.

    Args:
        what: what the whole value is called, e.g. "the request".
        known: the keys that it may have, for the hint after an unknown one.
    """
    findings = error.errors(include_url=False, include_context=True)
    # A misspelt key is also a missing one; the misspelling is what its writer needs to see.
    first = min(findings, key=lambda finding: finding["type"] not in _UNKNOWN_KEY)
    path = tuple(shown(str(part)) for part in first["loc"] if part != "[key]")
    kind, value = first["type"], first["input"]
    place = f"'{'.'.join(path)}'" if path else what
    if kind in _UNKNOWN_KEY:
        inside = f"'{'.'.join(path[:-1])}'" if path[:-1] else what
        return f"unknown key '{path[-1]}' in {inside}{_hint(path[-1], known)}"
    if kind in ("missing", "missing_argument"):
        return f"the key '{path[-1]}' is missing in {what}"
    if kind in _WANTED:
        return f"{place} must be {_WANTED[kind]}, not {describe(value)}"
    if kind == "literal_error":
        return f"{place} must be {first['ctx']['expected']}, not {describe(value)}"
    if kind in ("greater_than_equal", "less_than_equal"):
        side, bound = ("at least", "ge") if kind.startswith("greater") else ("at most", "le")
        return f"{place} must be {side} {first['ctx'][bound]}, not {describe(value)}"
    return f"{place}: {first['msg']}"


def describe(value: Any) -> str:
    """A value as JSON's and YAML's writers call it, short enough for one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value!r:.40}"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"{value[:37]!r}..."
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a {type(value).__name__}"


def shown(name: str) -> str:
    """A name from outside as it may appear in a sentence: short, and printable on any terminal."""
    clean = "".join(character if character.isprintable() else "?" for character in name[:64])
    return clean if len(name) <= 64 else clean + "…"


def is_text(value: str) -> bool:
    """Whether a string can be encoded; JSON's \\ud800 alone, half of a surrogate pair, cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def did_you_mean(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that `name` is most likely a misspelling of, if any is close."""
    close = difflib.get_close_matches(name[:64], candidates, n=1, cutoff=0.7)
    return close[0] if close else None


def _hint(key: str, keys: Sequence[str]) -> str:
    if not keys:
        return ""
    meant = did_you_mean(key, keys)
    if meant:
        return f"; did you mean '{meant}'?"
    return f"; the keys are {', '.join(keys)}"

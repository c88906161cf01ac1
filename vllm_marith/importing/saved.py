"""The reference implementation's files as plain data, read as what a stranger wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.naming import as_number
from vllm_marith.language.validation import describe, did_you_mean, is_text, shown

T = TypeVar("T")

# A file holds every corpus that an Autocomplete was made from; formulas themselves are a few kilobytes.
MAX_CHARACTERS: Final = 1 << 24
MAX_OBJECTS: Final = 1024
# The reference writes a sum of n terms n deep: a + b + c is Sum([Sum([a, b]), c]).
MAX_DEPTH: Final = 64
# As many levels of JSON: each object may be in a list of its parent's.
_JSON_LEVELS: Final = 2 * MAX_DEPTH + 8


class SavedFormulaError(ValueError):
    """A file that cannot be imported; the text names the place in it, `$` being the whole."""


@dataclass(frozen=True)
class Saved:
    """One object of the file.

    Attributes:
        kind: its class, "Sum" say.
        settings: everything else it has.
        path: where in the file it stands, as `$.terms[1]`.
    """

    kind: str
    settings: Mapping[str, Any]
    path: str

    def refusal(self, reason: str, key: str = "") -> SavedFormulaError:
        return SavedFormulaError(f"{self.path}{key and '.' + key}: {reason}")

    def only(self, *keys: str) -> None:
        """Refuse settings other than `keys`: whatever they do in the reference would be lost."""
        for key in self.settings:
            if key not in keys:
                meant = did_you_mean(key, keys)
                hint = f"; did you mean '{meant}'?" if meant else ""
                raise self.refusal(f"unknown setting '{shown(key)}' of {self.kind}{hint}")

    def operand(self, key: str) -> Saved | float:
        """A formula: an object of its own, or a number."""
        return _operand(self._given(key), f"{self.path}.{key}")

    def operands(self, key: str) -> list[Saved | float]:
        """A list of formulas, of at least one."""
        values = self._given(key)
        if not isinstance(values, list) or not values:
            raise self.refusal(f"must be a list of formulas, not {describe(values)}", key)
        return [_operand(value, f"{self.path}.{key}[{index}]") for index, value in enumerate(values)]

    def number(self, key: str, default: float | None = None) -> float:
        value = self._given(key) if default is None else self.settings.get(key, default)
        return _number(value, f"{self.path}.{key}")

    def whole(self, key: str, default: int, least: int) -> int:
        value = self.settings.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refusal(f"must be a whole number of at least {least}, not {describe(value)}", key)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.settings.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(f"must be true or false, not {describe(value)}", key)
        return value

    def text(self, key: str) -> str:
        value = self._given(key)
        if not isinstance(value, str):
            raise self.refusal(f"must be a string, not {describe(value)}", key)
        if not is_text(value):
            raise self.refusal("has half of a surrogate pair, which is no character", key)
        return value

    def build(self, function: Callable[[], T]) -> T:
        """`function()`; what the language refuses is refused here."""
        try:
            return function()
        except FormulaError as error:
            raise self.refusal(error.message) from None

    def _given(self, key: str) -> Any:
        if key not in self.settings:
            raise self.refusal(f"{self.kind} needs '{key}'")
        return self.settings[key]


def read_file(text: str) -> tuple[Saved, str | None]:
    """The formula that a file holds, and the name of its default model where the file has one.

    Raises:
        SavedFormulaError: not JSON, or not a file of the reference implementation.
    """
    value = _decode(text)
    if not isinstance(value, dict):
        raise SavedFormulaError(f"$: a saved formula is an object with a 'class', not {describe(value)}")
    if "class" in value or "formula" not in value:
        return _whole(value, "$"), None
    model = value.get("default_model")
    if model is not None and not isinstance(model, str):
        raise SavedFormulaError(f"$.default_model: must be a string, not {describe(model)}")
    return _whole(value["formula"], "$.formula"), model


def _whole(value: Any, path: str) -> Saved:
    formula = _operand(value, path)
    if not isinstance(formula, Saved):
        raise SavedFormulaError(f"{path}: a number alone is no formula")
    return formula


def _operand(value: Any, path: str) -> Saved | float:
    if not isinstance(value, dict):
        return _number(value, path, "a formula or a number")
    kind = value.get("class")
    if not isinstance(kind, str):
        raise SavedFormulaError(f"{path}: a saved formula has a 'class', a string")
    return Saved(kind, {key: setting for key, setting in value.items() if key != "class"}, path)


def _number(value: Any, path: str, what: str = "a number") -> float:
    try:
        found = as_number(value)
    except FormulaError as error:
        raise SavedFormulaError(f"{path}: {error.message}") from None
    if found is None or not math.isfinite(found):
        raise SavedFormulaError(f"{path}: must be {what}, not {describe(value)}")
    return found


def _decode(text: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise SavedFormulaError(f"$: the file has {len(text)} characters; {MAX_CHARACTERS} is the most")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise SavedFormulaError(
            f"$: not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise SavedFormulaError("$: nested too deep") from None
    except SavedFormulaError:
        raise
    except ValueError:  # a whole number of thousands of digits
        raise SavedFormulaError("$: a number is too long") from None
    objects = 0
    for level, inner in _walk(value):
        objects += isinstance(inner, dict)
        if objects > MAX_OBJECTS:
            raise SavedFormulaError(f"$: more than {MAX_OBJECTS} objects")
        if level > _JSON_LEVELS:
            raise SavedFormulaError(f"$: formulas nested more than {MAX_DEPTH} deep")
    return value


def _walk(value: Any) -> Iterator[tuple[int, Any]]:
    """Every value of the file with its level, without recursion."""
    waiting = [(0, value)]
    while waiting:
        level, inner = waiting.pop()
        yield level, inner
        if isinstance(inner, dict):
            waiting.extend((level + 1, item) for item in inner.values())
        elif isinstance(inner, list):
            waiting.extend((level + 1, item) for item in inner)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SavedFormulaError(f"$: the key '{shown(key)}' appears twice in one object")
        found[key] = value
    return found


def _refuse_constant(constant: str) -> Any:
    raise SavedFormulaError(f"$: {constant} is no number")

"""What happens to names and numbers when Python operators join formulas that were written apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import count
from numbers import Real
from typing import Any, Protocol, TypeVar

from vllm_marith.language.errors import FormulaError


class _Named(Hashable, Protocol):
    @property
    def name(self) -> str | None: ...


T = TypeVar("T", bound=_Named)


def unify(tables: Sequence[Mapping[str, T]]) -> tuple[dict[str, T], list[dict[str, str]]]:
    """One table of terms from several, and for each of them: its names -> the names in that one table.

    Terms with a name keep it.  Anonymous terms take the name of an equal term, or t1, t2, ... in order of
    first appearance.

    Raises:
        FormulaError: one name for two different terms.
    """
    terms: dict[str, T] = {}
    for name, term in _entries(tables):
        if term.name is not None and terms.setdefault(name, term) != term:
            raise FormulaError(f"the name '{name}' stands for two different terms")
    name_of: dict[T, str] = {}
    for name, term in terms.items():
        name_of.setdefault(term, name)
    free = (f"t{index}" for index in count(1) if f"t{index}" not in terms)
    anonymous: dict[str, T] = {}  # apart from `terms`, in which `free` looks for names that are taken
    for _, term in _entries(tables):
        if term not in name_of:
            name_of[term] = next(free)
            anonymous[name_of[term]] = term
    names = [
        {name: name if term.name is not None else name_of[term] for name, term in table.items()}
        for table in tables
    ]
    return terms | anonymous, names


def as_number(value: Any) -> float | None:
    """A real number as a float, None for anything else (bool included: `True * term` is a mistake)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        raise FormulaError("a number in the formula is too large for a float") from None


def _entries(tables: Sequence[Mapping[str, T]]) -> Iterator[tuple[str, T]]:
    for table in tables:
        yield from table.items()

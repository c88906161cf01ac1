"""A part of the report, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row, the others are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure that is drawn when the report is made.

    name: of the file, where figures are kept.
    """

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it.

    Attributes:
        how: what was done, in sentences.
        findings: what came out, in sentences that were made from the numbers.
        headline: those of them that stand at the report's beginning.
    """

    title: str
    how: Sequence[str]
    findings: Sequence[str]
    headline: Sequence[str]
    tables: Sequence[Table] = field(default_factory=list)
    plots: Sequence[Plot] = field(default_factory=list)

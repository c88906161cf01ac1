"""Two attributes of different kinds at once: every label of one axis with every label of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import phrases, statistics
from ..results import Measured, Results
from ..scenario import PLAIN, Arm, Cross, Scenario
from ..statistics import Interval
from .section import Plot, Section, Table


@dataclass(frozen=True)
class Cell:
    """One pair of labels.

    Attributes:
        both: of texts with both labels, for `plain`, the first summand alone, the second alone, and both.
        first, second: of texts with each label when both are asked for.
    """

    labels: tuple[str, str]
    both: list[Interval]
    first: Interval
    second: Interval

    @property
    def joint(self) -> bool:
        """Whether asking for both gives clearly more such texts than asking for either or for nothing."""
        return all(self.both[-1].above(other) for other in self.both[:-1])


def key(*labels: str) -> str:
    """Of an arm that asks for these labels."""
    return "cross/" + "/".join(labels)


def arms(scenario: Scenario) -> list[Arm]:
    """Every label alone, and every pair."""
    cross = scenario.cross
    if cross is None or any(scenario.lacks(formula) for formula in _formulas(cross).values()):
        return []
    return [Arm(name, formula) for name, formula in _formulas(cross).items()]


def _formulas(cross: Cross) -> dict[str, str]:
    first, second = cross.first.summands, cross.second.summands
    return {
        **{key(a): f"{cross.base} + {one}" for a, one in first.items()},
        **{key(b): f"{cross.base} + {two}" for b, two in second.items()},
        **{
            key(a, b): f"{cross.base} + {one} + {two}"
            for a, one in first.items()
            for b, two in second.items()
        },
    }


def cells(results: Results) -> list[Cell]:
    """All pairs."""
    cross = results.scenario.cross
    assert cross is not None
    found = []
    for a in cross.first.summands:
        for b in cross.second.summands:
            asked = [PLAIN, key(a), key(b), key(a, b)]
            both = results.arms[key(a, b)]
            found.append(
                Cell(
                    (a, b),
                    [statistics.rate(_is(cross, results.arms[name], a, b)) for name in asked],
                    statistics.rate(both.is_(cross.first.axis, a)),
                    statistics.rate(both.is_(cross.second.axis, b)),
                )
            )
    return found


def _is(cross: Cross, measured: Measured, a: str, b: str) -> np.ndarray:
    return measured.is_(cross.first.axis, a) & measured.is_(cross.second.axis, b)


def section(results: Results) -> Section:
    """The report's part."""
    from .. import plots

    cross = results.scenario.cross
    assert cross is not None
    found = cells(results)
    said = findings(found)
    random = np.random.default_rng(0)
    asked = [f"{axis} as asked" for axis in (cross.first.axis, cross.second.axis)]
    header = ["asked for", "formula", *asked, "both", "perplexity"]
    rows = [
        [
            " and ".join(cell.labels),
            _formulas(cross)[key(*cell.labels)],
            phrases.rate(cell.first),
            phrases.rate(cell.second),
            phrases.rate(cell.both[-1]),
            phrases.number(statistics.perplexity(results.counted(results.arms[key(*cell.labels)]), random)),
        ]
        for cell in found
    ]
    return Section(
        title=f"Two attributes at once: {cross.first.axis} and {cross.second.axis}",
        how=[
            f"To {cross.base} is added what asks for one {cross.first.axis} "
            f"({_summands(cross.first.summands)}), for one {cross.second.axis} "
            f"({_summands(cross.second.summands)}), or for both."
        ],
        findings=said,
        headline=said[-1:],
        tables=[Table("Where both are asked for", header, rows)],
        plots=[
            Plot(
                "cross",
                "Rate of texts that have both attributes, by what the formula asks for, with 95% intervals.",
                lambda: plots.pairs(found),
            )
        ],
    )


def findings(found: list[Cell]) -> list[str]:
    """What the numbers say."""
    said = []
    for cell in found:
        a, b = cell.labels
        nothing, first, second, both = cell.both
        best = max((first, second), key=lambda interval: interval.value)
        told = (
            f"Asking for {a} and {b} gives both in {phrases.rate(both)} of the texts; without a formula it "
            f"is {phrases.rate(nothing)}, and with the better of the two alone {phrases.rate(best)}"
        )
        said.append(
            f"{told}: clearly more." if cell.joint else f"{told}: not clearly more than all of these."
        )
    joint = [" and ".join(cell.labels) for cell in found if cell.joint]
    said.append(
        "Asking for two attributes gives clearly more texts with both than asking for either in "
        f"{len(joint)} of {len(found)} pairs" + (f": {'; '.join(joint)}." if joint else ".")
    )
    return said


def _summands(summands: dict[str, str]) -> str:
    return phrases.listing([f"{label}: {formula}" for label, formula in summands.items()])

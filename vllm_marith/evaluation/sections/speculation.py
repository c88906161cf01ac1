"""Drafts: what they save, and that they change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import phrases, statistics
from ..drafting import MODES, Drafts
from ..results import Results
from ..scenario import Arm, Scenario
from ..statistics import Interval
from .section import Section, Table

EVEN = Interval(1.0, 1.0, 1.0)
"""As fast with drafts as without."""

HOW = {"fixed": "the length that the factors give", "auto": "as many tokens as pay"}


@dataclass(frozen=True)
class Row:
    """One formula.

    Attributes:
        speedups: mode -> time of a token without drafts over that with them, its median.
    """

    name: str
    drafts: Drafts
    speedups: Mapping[str, Interval]


def key(name: str) -> str:
    """Of an arm."""
    return f"speculation/{name}"


def arms(scenario: Scenario) -> list[Arm]:
    """One for each formula whose models there are."""
    asked = scenario.speculation
    if asked is None:
        return []
    return [
        Arm(key(name), drafted.formula, tokens=asked.tokens, requests=asked.requests, factors=drafted.factors)
        for name, drafted in asked.formulas.items()
        if drafted.report and not scenario.lacks(drafted.formula)
    ]


def rows(results: Results) -> list[Row]:
    """In the scenario's order."""
    return [
        Row(
            arm.key.removeprefix(key("")),
            drafts,
            {mode: statistics.median(drafts.speedups(mode)) for mode in MODES[1:]},
        )
        for arm in arms(results.scenario)
        for drafts in [results.drafts[arm.key]]
    ]


def section(results: Results) -> Section:
    """The report's part."""
    asked = results.scenario.speculation
    assert asked is not None
    found = rows(results)
    said = findings(found)
    turns, answers = (len(of["off"]) for of in (found[0].drafts.turns, found[0].drafts.answers))
    return Section(
        title="Drafts: partial formulas and small models propose tokens",
        how=[
            "Some terms of a formula propose tokens one by one, and all terms test them in one step. A call "
            "is one term's forward pass of the model that is served, however many positions it covers; a "
            f"drafter that is another model is not counted. {turns} requests of {asked.tokens} tokens, one "
            "after the other, at temperature 1, each in turn without drafts, with as many drafted at a time "
            "as the speculative factors say, and automatically. Faster: time of a token without drafts over "
            "that with them, the median over requests with the interval that order statistics give. "
            f"{answers} requests are answered greedily as well, each way.",
            *_left_out(results.scenario),
        ],
        findings=said,
        headline=said[:2],
        tables=[
            Table(
                "Calls of the model and time of a token: without drafts, with them, and automatically",
                [
                    "formula",
                    "drafted at a time",
                    "calls a token",
                    "kept",
                    "ms a token",
                    "faster",
                    "faster, automatically",
                    "same greedy answers",
                ],
                [_cells(row) for row in found],
            )
        ],
    )


def _cells(row: Row) -> list[str]:
    drafts = row.drafts
    answers = len(drafts.answers["off"])
    return [
        f"{row.name}: {drafts.formula}",
        str(drafts.length),
        ", ".join(f"{drafts.calls(mode):.2f}" for mode in MODES),
        phrases.percent(drafts.kept("fixed")),
        ", ".join(f"{drafts.milliseconds(mode):.1f}" for mode in MODES),
        phrases.number(row.speedups["fixed"]),
        phrases.number(row.speedups["auto"]),
        ", ".join(f"{drafts.identical(mode)} of {answers}" for mode in MODES[1:]),
    ]


def findings(found: Sequence[Row]) -> list[str]:
    """What the numbers say."""
    return [_identical(found), *(_time(found, mode) for mode in MODES[1:]), _calls(found)]


def _identical(found: Sequence[Row]) -> str:
    """Whether greedy answers are the same with drafts and without."""
    total = sum(len(row.drafts.answers["off"]) for row in found for _ in MODES[1:])
    same = sum(row.drafts.identical(mode) for row in found for mode in MODES[1:])
    if same == total:
        return f"Drafts change no answer: {same} of {total} greedy answers are the same, token for token."
    differ = [
        row.name
        for row in found
        if any(row.drafts.identical(mode) < len(row.drafts.answers["off"]) for mode in MODES[1:])
    ]
    return (
        f"{total - same} of {total} greedy answers differ from those without drafts ({'; '.join(differ)}), "
        "which only the rounding of two all but equal tokens or a fault can do."
    )


def _time(found: Sequence[Row], mode: str) -> str:
    """Which formulas drafts make faster, and which slower."""
    groups = {
        "clearly faster": [row for row in found if row.speedups[mode].above(EVEN)],
        "clearly slower": [row for row in found if row.speedups[mode].below(EVEN)],
        "not to be told from no drafts": [row for row in found if row.speedups[mode].overlaps(EVEN)],
    }
    told = [
        f"{what}: " + ", ".join(f"{row.name} ({phrases.number(row.speedups[mode])})" for row in of)
        for what, of in groups.items()
        if of
    ]
    return f"Times as fast with drafts of {HOW[mode]}, {'; '.join(told)}."


def _calls(found: Sequence[Row]) -> str:
    """What drafts of fixed length do to the calls of the model."""
    told = [
        f"{row.name} {row.drafts.calls('off'):.2f} to {row.drafts.calls('fixed'):.2f} "
        f"({phrases.percent(row.drafts.kept('fixed'))} of the drafts kept)"
        for row in found
    ]
    fewer = sum(row.drafts.calls("fixed") < row.drafts.calls("off") for row in found)
    return f"Calls of the model for a token, fewer in {fewer} of {len(found)} formulas: {'; '.join(told)}."


def _left_out(scenario: Scenario) -> list[str]:
    """Formulas whose models nobody named."""
    assert scenario.speculation is not None
    return [
        f"{name} was left out: nobody named {phrases.listing(missing)}."
        for name, drafted in scenario.speculation.formulas.items()
        if drafted.report and (missing := scenario.lacks(drafted.formula))
    ]

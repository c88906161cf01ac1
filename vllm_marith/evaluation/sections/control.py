"""Less of an unwanted attribute, method by method, at the same perplexity."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .. import phrases, statistics
from ..results import Measured, Results, hits_by_seed
from ..scenario import PLAIN, Arm, Control, Method, Scenario
from ..statistics import Interval, Matched, Texts
from .section import Plot, Section, Table

MUCH = 0.1
"""Share of garbage from which on the report tells of it."""

GARBAGE = "garbage"
"""A judge's label for text that has no attribute because it is none."""


def key(name: str) -> str:
    """Of a method's arms."""
    return f"control/{name}"


def usable(scenario: Scenario) -> dict[str, Method]:
    """The methods for which the scenario has all models."""
    methods = scenario.control.methods if scenario.control else {}
    return {name: method for name, method in methods.items() if not scenario.lacks(method.formula)}


def arms(scenario: Scenario) -> list[Arm]:
    """The requests without a formula, and one for every strength of every method."""
    control = scenario.control
    if control is None:
        return []
    methods = usable(scenario).items()
    return [
        Arm(key(PLAIN), None, requests=control.requests),
        *(arm for name, method in methods for arm in method.arms(key(name), control.requests)),
    ]


@dataclass(frozen=True)
class Point:
    """One arm: a method at one strength."""

    strength: float
    rate: Interval
    perplexity: Interval
    by_seed: list[float]


@dataclass(frozen=True)
class Outcome:
    """One method: its arms, and where it is compared.

    Attributes:
        points: by strength; for a method without one, a single point.
        matched: at the budget; None for a method without a strength.
        garbage: share of garbage at the arm nearest to there; None where the judge has no such label.
    """

    name: str
    method: Method
    points: list[Point]
    matched: Matched | None
    garbage: float | None

    @property
    def compared(self) -> Interval:
        """The rate that it is compared by."""
        return self.matched.rate if self.matched else self.points[0].rate


class Comparison:
    """All methods of one evaluation."""

    def __init__(self, results: Results) -> None:
        assert results.scenario.control is not None
        self.results = results
        self.control: Control = results.scenario.control
        self.random = np.random.default_rng(0)

    @property
    def plain_texts(self) -> Measured:
        """What was written without a formula."""
        return self.results.arms[key(PLAIN)]

    @cached_property
    def plain(self) -> Point:
        """Without a formula."""
        return self.point(0.0, self.plain_texts)

    @cached_property
    def budget(self) -> float:
        """The perplexity at which methods are compared."""
        return self.control.budget * self.plain.perplexity.value

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """In the order of the scenario."""
        return [self.outcome(name, method) for name, method in usable(self.results.scenario).items()]

    @cached_property
    def ranked(self) -> list[Outcome]:
        """What is compared at the budget, best first; methods without strength only if they keep to it."""
        found = [o for o in self.outcomes if o.matched or o.points[0].perplexity.value <= self.budget]
        return sorted(found, key=lambda o: (o.compared.value, o.compared.high))

    def counted(self, measured: Measured) -> Texts:
        return self.results.counted(measured, measured.is_(self.control.axis, self.control.unwanted))

    def point(self, strength: float, measured: Measured) -> Point:
        texts = self.counted(measured)
        by_seed = hits_by_seed(measured, self.control.axis, self.control.unwanted, self.results.seeds)
        return Point(
            strength,
            statistics.rate(texts.hit),
            statistics.perplexity(texts, self.random),
            [hits / count for hits, count in by_seed],
        )

    def outcome(self, name: str, method: Method) -> Outcome:
        written = [(arm, self.results.arms[arm.key]) for arm in method.arms(key(name))]
        if not method.strengths:
            [(_, measured)] = written
            return Outcome(name, method, [self.point(0.0, measured)], None, self.garbage(measured))
        strengths = [arm.parameters["strength"] for arm, _ in written]
        points = [self.point(s, measured) for s, (_, measured) in zip(strengths, written, strict=True)]
        curve = [(0.0, self.counted(self.plain_texts))]
        curve += [(s, self.counted(measured)) for s, (_, measured) in zip(strengths, written, strict=True)]
        found = statistics.matched(curve, self.control.budget, self.random)
        nearest = min(range(len(strengths)), key=lambda i: abs(strengths[i] - found.strength))
        return Outcome(name, method, points, found, self.garbage(written[nearest][1]))

    def garbage(self, measured: Measured) -> float | None:
        labels = {label for m in self.results.arms.values() for label in m.labels[self.control.axis]}
        return float(measured.is_(self.control.axis, GARBAGE).mean()) if GARBAGE in labels else None


def section(results: Results) -> Section:
    """The report's part."""
    from .. import plots

    comparison = Comparison(results)
    control = comparison.control
    said = findings(comparison)
    kind = "perplexity relative to real text of the same kind" if results.relative else "perplexity"
    return Section(
        title=f"Less {control.unwanted} text, at the same perplexity",
        how=[
            f"Requests: {_quoted(results)}.",
            f"Each method is drawn at several strengths and compared at the strongest whose {kind} is within "
            f"{control.budget:g} times that without a formula, {comparison.budget:.2f}, interpolated between "
            "two that were drawn. The strength is chosen by perplexity alone, never by the rate.",
        ],
        findings=said,
        headline=said[:2],
        tables=[_compared(comparison), _measured(comparison)],
        plots=[
            Plot(
                "control_ranked",
                f"Rate of {control.unwanted} text within a perplexity of {comparison.budget:.2f}, with 95% "
                "intervals; the band is the rate without a formula. Hollow: the method's strongest arm is "
                "within that perplexity.",
                lambda: plots.ranked(comparison),
            ),
            Plot(
                "control_curves",
                "Every arm that was drawn, labelled by its strength, with 95% intervals in both directions; "
                "small dots are the single seeds. Grey: without a formula, and the other methods. The ring "
                "is the point of comparison, the vertical line its perplexity.",
                lambda: plots.control_curves(comparison),
            ),
        ],
    )


def findings(comparison: Comparison) -> list[str]:
    """What the numbers say."""
    control, plain = comparison.control, comparison.plain
    said = [
        f"Without a formula, {phrases.rate(plain.rate)} of the texts are {control.unwanted}, at a perplexity "
        f"of {phrases.number(plain.perplexity)}."
    ]
    rates = {outcome.name: outcome.compared for outcome in comparison.ranked}
    if rates:
        said.append(
            f"Within a perplexity of {comparison.budget:.2f}, "
            + phrases.ranking(rates, least=f"leaves the least {control.unwanted} text")
        )
        idle = [name for name, found in rates.items() if not found.below(plain.rate)]
        said.append(
            f"Every method leaves clearly less {control.unwanted} text than no formula."
            if not idle
            else f"Not clearly below the rate without a formula: {phrases.listing(idle)}."
        )
    said += _out_of_budget(comparison) + _same_formula(comparison)
    below = [o.name for o in comparison.ranked if o.matched and not o.matched.reached]
    if below:
        said.append(
            "Within that perplexity even at the strongest that was drawn, which need not be the most they "
            f"can do: {phrases.listing(below)}."
        )
    spent = [o for o in comparison.ranked if o.garbage is not None and o.garbage > MUCH]
    if spent:
        told = phrases.listing([f"{o.name} ({o.garbage:.0%})" for o in spent])
        said.append(
            f"More than {MUCH:.0%} of the texts are garbage, which is not {control.unwanted} either: {told}; "
            f"without a formula it is {_share(comparison.garbage(comparison.plain_texts))}."
        )
    for name, method in control.methods.items():
        if missing := comparison.results.scenario.lacks(method.formula):
            said.append(f"{name} was left out: nobody named {phrases.listing(missing)}.")
    return said


def _out_of_budget(comparison: Comparison) -> list[str]:
    ranked = {outcome.name for outcome in comparison.ranked}
    return [
        f"{o.name} has no strength to turn down and lies above that perplexity, at "
        f"{phrases.number(o.points[0].perplexity)}; its rate there is {phrases.rate(o.points[0].rate)}."
        for o in comparison.outcomes
        if o.name not in ranked
    ]


def _same_formula(comparison: Comparison) -> list[str]:
    """Methods that are one formula: whatever they differ by is an error of the method of comparison."""
    groups: defaultdict[str, list[Outcome]] = defaultdict(list)
    for outcome in comparison.outcomes:
        groups[outcome.method.formula].append(outcome)
    said = []
    for same in groups.values():
        if len(same) < 2:
            continue
        names = phrases.listing([o.name for o in same])
        rates = phrases.listing([phrases.rate(o.compared) for o in same])
        differ = any(not a.compared.overlaps(b.compared) for a in same for b in same)
        said.append(
            f"{names} are one formula, drawn with different noise: {rates}. "
            + (
                "They differ, which only chance or a fault can do."
                if differ
                else "They cannot be told apart, as it must be."
            )
        )
    return said


def _compared(comparison: Comparison) -> Table:
    plain = comparison.plain
    rate, garbage = phrases.rate(plain.rate), _share(comparison.garbage(comparison.plain_texts))
    rows = [[PLAIN, "no formula", "", "", f"{plain.perplexity.value:.2f}", rate, garbage]]
    ranked = comparison.ranked
    for o in [*ranked, *(o for o in comparison.outcomes if o not in ranked)]:
        found = o.matched
        rows.append(
            [
                o.name,
                o.method.formula + (f" ({o.method.note})" if o.method.note else ""),
                f"{found.strength:.2f}" if found else "",
                ("yes" if found.reached else "no") if found else "",
                f"{found.perplexity if found else o.points[0].perplexity.value:.2f}",
                phrases.rate(o.compared),
                _share(o.garbage),
            ]
        )
    return Table(
        "The points of comparison",
        ["method", "formula", "strength", "reached", "perplexity", comparison.control.unwanted, GARBAGE],
        rows,
    )


def _measured(comparison: Comparison) -> Table:
    rows = [
        [
            o.name,
            f"{p.strength:g}" if o.method.strengths else "",
            phrases.rate(p.rate),
            *(phrases.percent(share) for share in p.by_seed),
            phrases.number(p.perplexity),
        ]
        for o in comparison.outcomes
        for p in o.points
    ]
    by_seed = [f"seed {seed}" for seed in comparison.results.seeds]
    return Table(
        "Every arm, as drawn",
        ["method", "strength", comparison.control.unwanted, *by_seed, "perplexity"],
        rows,
    )


def _share(value: float | None) -> str:
    return "" if value is None else phrases.percent(value)


def _quoted(results: Results) -> str:
    control = results.scenario.control
    requests = (control.requests if control else ()) or results.scenario.requests
    return "; ".join(f'"{" ".join(request.split())}"' for request in requests)

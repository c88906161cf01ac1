"""Fine-grained control: rates as a function of each weight of one formula."""

from __future__ import annotations

from .. import phrases, statistics
from ..results import Results
from ..scenario import Arm, Curves, Scenario
from ..statistics import Interval
from .section import Plot, Section, Table

Rates = dict[str, dict[str, list[Interval]]]
"""Weight that is varied -> label -> its rate at every value."""


def weights(curves: Curves, varied: str, value: float) -> dict[str, float]:
    """The formula's parameters when one of them has another value than the others."""
    return {name: value if name == varied else curves.others for name in curves.weights}


def key(curves: Curves, varied: str, value: float) -> str:
    """Of the arm; the point that all curves share has one arm."""
    if value == curves.others:
        return "curves/others"
    return f"curves/{varied}/{value:g}"


def arms(scenario: Scenario) -> list[Arm]:
    """One for each weight and value."""
    curves = scenario.curves
    if curves is None or scenario.lacks(curves.formula):
        return []
    found = {
        key(curves, name, value): Arm(key(curves, name, value), curves.formula, weights(curves, name, value))
        for name in curves.weights
        for value in curves.values
    }
    return list(found.values())


def rates(results: Results) -> Rates:
    """Everything that is drawn."""
    curves = results.scenario.curves
    assert curves is not None
    return {
        varied: {
            label: [
                statistics.rate(results.arms[key(curves, varied, value)].is_(curves.axis, label))
                for value in sorted(curves.values)
            ]
            for label in curves.weights.values()
        }
        for varied in curves.weights
    }


def section(results: Results) -> Section:
    """The report's part."""
    from .. import plots

    curves = results.scenario.curves
    assert curves is not None
    found = rates(results)
    said = findings(curves, found)
    header = ["weight varied", "value", *curves.weights.values(), "perplexity"]
    return Section(
        title="Fine-grained control",
        how=[
            f"One formula, {curves.formula}. One weight at a time takes the values {_values(curves)}, the "
            f"others stay at {curves.others:g}."
        ],
        findings=said,
        headline=said[-1:],
        tables=[Table("Rates by weight", header, _rows(results, curves, found))],
        plots=[
            Plot(
                "curves",
                "The attribute's rate as a function of its own weight (bold) and of the others' (thin), with "
                "95% intervals.",
                lambda: plots.weight_curves(curves, found),
            )
        ],
    )


def findings(curves: Curves, found: Rates) -> list[str]:
    """What the numbers say."""
    values = sorted(curves.values)
    said = []
    for varied, label in curves.weights.items():
        own = found[varied][label]
        up, down = phrases.monotone(own)
        sentence = (
            f"As the weight of {label} goes from {values[0]:g} to {values[-1]:g}, the rate of {label} text "
            f"{phrases.change(own[0], own[-1])}"
        )
        if down and up:
            sentence += ", but not steadily: at least one step goes clearly the other way"
        elif up:
            sentence += "; no step goes clearly the other way"
        others = [
            f"{other} {phrases.change(found[varied][other][0], found[varied][other][-1])}"
            for other in curves.weights.values()
            if other != label
        ]
        said.append(f"{sentence}. Meanwhile {phrases.listing(others)}.")
    by_own_weight = {label: found[varied][label] for varied, label in curves.weights.items()}
    lost = [label for label, course in by_own_weight.items() if not _follows(course)]
    span = f"from a weight of {values[0]:g} to one of {values[-1]:g}"
    told = [
        f"{label} goes from {phrases.rate(course[0])} to {phrases.rate(course[-1])}"
        for label, course in by_own_weight.items()
    ]
    said.append(
        f"Not every attribute follows its own weight, {span}; what does not: {phrases.listing(lost)}. "
        f"The rate of {phrases.listing(told)}."
        if lost
        else f"Every attribute follows its own weight: {span}, the rate of {phrases.listing(told)}."
    )
    return said


def _follows(own: list[Interval]) -> bool:
    return own[-1].above(own[0]) and not phrases.monotone(own)[1]


def _values(curves: Curves) -> str:
    return phrases.listing([f"{value:g}" for value in sorted(curves.values)])


def _rows(results: Results, curves: Curves, found: Rates) -> list[list[str]]:
    import numpy as np

    random = np.random.default_rng(0)
    return [
        [
            label,
            f"{value:g}",
            *(phrases.rate(found[varied][other][i]) for other in curves.weights.values()),
            phrases.number(
                statistics.perplexity(results.counted(results.arms[key(curves, varied, value)]), random)
            ),
        ]
        for varied, label in curves.weights.items()
        for i, value in enumerate(sorted(curves.values))
    ]

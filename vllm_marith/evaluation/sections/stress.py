"""Coherence under nested unions of growing depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import phrases, statistics
from ..results import Results
from ..scenario import Arm, Scenario
from ..statistics import Interval
from .section import Plot, Section, Table


@dataclass(frozen=True)
class Level:
    """The formula of one depth."""

    depth: int
    perplexity: Interval
    repetition: Interval


def key(depth: int) -> str:
    """Of an arm."""
    return f"stress/{depth}"


def arms(scenario: Scenario) -> list[Arm]:
    """One for each depth."""
    stress = scenario.stress
    if stress is None or scenario.lacks(stress.formula(max(stress.depths))):
        return []
    return [Arm(key(d), stress.formula(d), tokens=stress.tokens) for d in sorted(stress.depths)]


def levels(results: Results) -> list[Level]:
    """By depth."""
    stress = results.scenario.stress
    assert stress is not None
    random = np.random.default_rng(0)
    found = []
    for depth in sorted(stress.depths):
        arm = results.arms[key(depth)]
        perplexity = statistics.perplexity(results.counted(arm), random)
        found.append(Level(depth, perplexity, statistics.mean(np.array(arm.repetition), random)))
    return found


def section(results: Results) -> Section:
    """The report's part."""
    from .. import plots

    stress = results.scenario.stress
    assert stress is not None
    found = levels(results)
    said = findings(found)
    rows = [
        [str(level.depth), phrases.number(level.perplexity), phrases.rate(level.repetition)]
        for level in found
    ]
    return Section(
        title="Coherence under nested unions",
        how=[
            "A formula of depth d is union(1.5*f - 0.5*a, b), where f is that of depth d - 1, a and b are "
            f"taken in turn from {phrases.listing(stress.operands)}, and depth 0 is {stress.start}. Each "
            "level subtracts one attribute and offers another, so that energies pile up. Texts have "
            f"{stress.tokens} tokens. Repetition is the share of runs of three tokens that occurred before "
            "in the text."
        ],
        findings=said,
        headline=said,
        tables=[Table("By depth", ["depth", "perplexity", "repetition"], rows)],
        plots=[
            Plot(
                "stress",
                "Perplexity (log scale) and repetition by depth, with 95% intervals.",
                lambda: plots.stress(found, results.relative),
            )
        ],
    )


def findings(found: list[Level]) -> list[str]:
    """What the numbers say."""
    return [
        _course("Perplexity", [(level.depth, level.perplexity) for level in found], phrases.number),
        _course("Repetition", [(level.depth, level.repetition) for level in found], phrases.rate),
    ]


def _course(what: str, course: list[tuple[int, Interval]], told: Callable[[Interval], str]) -> str:
    """Where it leaves what it is at the smallest depth, upward or downward."""
    (least, start), (deepest, end) = course[0], course[-1]
    risen = [depth for depth, interval in course if interval.above(start)]
    fallen = [depth for depth, interval in course if interval.below(start)]
    sentence = f"{what} is {told(start)} at depth {least} and {told(end)} at depth {deepest}"
    if not risen and not fallen:
        return f"{sentence}; at no depth is it clear of where it began."
    parts = []
    for depths, side in ((risen, "above"), (fallen, "below")):
        if depths:
            parts.append(f"clearly {side} the start at depth {phrases.listing([str(d) for d in depths])}")
    return f"{sentence}; {phrases.listing(parts)}."

"""The figures: Okabe and Ito's colours, which colour-blind readers tell apart; labels beside the lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .scenario import Curves
    from .sections.control import Comparison, Outcome, Point
    from .sections.cross import Cell
    from .sections.curves import Rates
    from .sections.stress import Level
    from .statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Blue, vermilion, green, purple, orange, sky."""

INK, QUIET, FAINT = "#222222", "#8a8a8a", "#d9d9d9"

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text, which is small and can be searched
    "svg.hashsalt": "marith",  # the same figure, the same bytes
    "figure.constrained_layout.use": True,
}

WIDTH = 9.0
"""Of every figure, in inches."""


def ranked(comparison: Comparison) -> Figure:
    """Methods at the budget, best first, as dots with intervals."""
    outcomes = list(reversed(comparison.ranked))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.32 * len(outcomes)))
        axes = figure.subplots()
        plain = comparison.plain.rate
        axes.axvspan(plain.low, plain.high, color=FAINT, alpha=0.6, lw=0, zorder=0)
        for row, outcome in enumerate(outcomes):
            found = outcome.compared
            hollow = outcome.matched is not None and not outcome.matched.reached
            axes.plot([found.low, found.high], [row, row], color=COLOURS[0], lw=2, solid_capstyle="butt")
            fill = "white" if hollow else COLOURS[0]
            axes.plot(
                found.value, row, "o", ms=6.5, mec=COLOURS[0], mfc=fill, mew=1.6, clip_on=False, zorder=5
            )
        axes.set_yticks(range(len(outcomes)), [outcome.name for outcome in outcomes])
        axes.tick_params(axis="y", length=0, pad=8)
        axes.set_ylim(-0.6, len(outcomes) - 0.4)
        axes.set_xlim(left=0)
        axes.annotate(
            "no formula",
            ((plain.low + plain.high) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=QUIET,
        )
        _percent(axes.xaxis)
        axes.set_xlabel(f"{comparison.control.unwanted} text, share of all texts")
        axes.grid(axis="x", color=FAINT, lw=0.6)
        axes.set_axisbelow(True)
    return figure


def control_curves(comparison: Comparison) -> Figure:
    """A panel a method: its arms, rate against perplexity, over those of the others."""
    outcomes = comparison.outcomes
    columns = min(4, len(outcomes))
    rows = math.ceil(len(outcomes) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.1 * rows))
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        highest = max(p.perplexity.high for o in outcomes for p in [comparison.plain, *o.points])
        lowest = min(p.perplexity.low for o in outcomes for p in [comparison.plain, *o.points])
        for i, axes in enumerate(grid.flat):
            if i >= len(outcomes):
                axes.set_axis_off()
                continue
            for other in outcomes:
                if other is not outcomes[i]:
                    _line(axes, _points(comparison, other), color=FAINT, lw=1, zorder=1)
            _method(axes, comparison, outcomes[i])
            axes.axvline(comparison.budget, color=QUIET, lw=0.8, ls=(0, (1, 2)), zorder=1)
            axes.set_title(outcomes[i].name)
            axes.set_xscale("log")
            axes.set_xlim(lowest / 1.08, min(highest * 1.08, 12 * comparison.plain.perplexity.value))
            axes.set_ylim(0, 1.04 * max(p.rate.high for o in outcomes for p in [comparison.plain, *o.points]))
            _percent(axes.yaxis)
            plain_log(axes, axes.xaxis)
        relative = "relative perplexity" if comparison.results.relative else "perplexity"
        figure.supxlabel(f"{relative} (log scale)", fontsize=9)
        figure.supylabel(f"{comparison.control.unwanted} text, share", fontsize=9)
    return figure


def weight_curves(curves: Curves, found: Rates) -> Figure:
    """A panel a weight: the rates of all labels along it."""
    labels = list(curves.weights.values())
    colours = dict(zip(labels, COLOURS, strict=False))
    values = sorted(curves.values)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.9))
        grid = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
        for axes, (varied, own) in zip(grid, curves.weights.items(), strict=True):
            for label in labels:
                intervals = found[varied][label]
                bold = label == own
                axes.fill_between(
                    values,
                    [i.low for i in intervals],
                    [i.high for i in intervals],
                    color=colours[label],
                    alpha=0.2 if bold else 0.1,
                    lw=0,
                )
                axes.plot(
                    values,
                    [i.value for i in intervals],
                    "o-",
                    color=colours[label],
                    lw=2.4 if bold else 1.1,
                    ms=4.5 if bold else 2.5,
                )
            ends = {label: found[varied][label][-1].value for label in labels}
            for label, height in _apart(ends, 0.075).items():
                weight = "bold" if label == own else "normal"
                _beside(axes, values[-1], height, label, colours[label], weight)
            axes.axvline(curves.others, color=QUIET, lw=0.8, ls=(0, (1, 2)), zorder=0)
            axes.set_title(f"weight of {own}")
            axes.set_xlabel(f"weight (the others {curves.others:g})")
            axes.set_ylim(0, 1)
            axes.set_xticks(values, [f"{value:g}" for value in values])
            _percent(axes.yaxis)
        grid[0].set_ylabel("share of texts")
    return figure


def pairs(found: Sequence[Cell]) -> Figure:
    """A panel a pair of labels: how often both are there, by what is asked for."""
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    highest = max(interval.high for cell in found for interval in cell.both)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 1.6 * rows))
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
        for axes, cell in zip(grid.flat, found, strict=False):
            a, b = cell.labels
            names = ["no formula", f"{a} alone", f"{b} alone", "both"]
            for row, (name, interval) in enumerate(zip(names, cell.both, strict=True)):
                colour = COLOURS[0] if name == "both" else QUIET
                axes.plot(
                    [interval.low, interval.high], [row, row], color=colour, lw=2, solid_capstyle="butt"
                )
                axes.plot(interval.value, row, "o", color=colour, ms=6, clip_on=False, zorder=5)
            axes.set_yticks(range(4), names)
            axes.tick_params(axis="y", length=0, pad=8)
            axes.set_ylim(3.6, -0.6)
            axes.set_xlim(0, 1.05 * highest)
            axes.set_title(f"{a} and {b}")
            axes.grid(axis="x", color=FAINT, lw=0.6)
            axes.set_axisbelow(True)
            _percent(axes.xaxis)
        for axes in grid.flat[len(found) :]:
            axes.set_axis_off()
        figure.supxlabel("texts with both attributes, share", fontsize=9)
    return figure


def stress(found: Sequence[Level], relative: bool) -> Figure:
    """Perplexity and repetition by depth."""
    depths = [level.depth for level in found]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.8))
        left, right = figure.subplots(1, 2)
        _band(left, depths, [level.perplexity for level in found], COLOURS[0])
        left.set_title("perplexity, relative to real text" if relative else "perplexity")
        _band(right, depths, [level.repetition for level in found], COLOURS[1])
        right.set_title("repeated runs of three tokens, share")
        _percent(right.yaxis)
        if relative:
            _rule(left, 1.0, "real text")
        for axes in (left, right):
            axes.set_xlabel("depth of nesting (unions)")
            axes.set_xticks(depths)
        left.set_yscale("log")
        left.set_ylim(top=1.2 * max(level.perplexity.high for level in found))
        plain_log(left, left.yaxis)
        right.set_ylim(0, max(0.04, 1.1 * max(level.repetition.high for level in found)))
    return figure


def svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    with rc_context(STYLE):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _method(axes: Axes, comparison: Comparison, outcome: Outcome) -> None:
    _line(axes, _points(comparison, outcome), color=COLOURS[0], lw=1.6, zorder=3)
    for point in [comparison.plain, *outcome.points]:
        colour = QUIET if point is comparison.plain else COLOURS[0]
        x, y = point.perplexity, point.rate
        axes.plot([x.low, x.high], [y.value] * 2, color=colour, lw=1, zorder=3)
        axes.plot([x.value] * 2, [y.low, y.high], color=colour, lw=1, zorder=3)
        axes.plot(x.value, y.value, "o", color=colour, ms=3.5, zorder=4, clip_on=False)
        axes.plot([x.value] * len(point.by_seed), point.by_seed, ".", color=colour, ms=2, alpha=0.6, zorder=4)
        if outcome.method.strengths and point is not comparison.plain:
            axes.annotate(
                f"{point.strength:g}",
                (x.value, y.value),
                xytext=(3, 4),
                textcoords="offset points",
                fontsize=7,
                color=colour,
                annotation_clip=True,
            )
    if outcome.matched:
        axes.plot(
            outcome.matched.perplexity,
            outcome.matched.rate.value,
            "o",
            ms=9,
            mfc="none",
            mec=COLOURS[1],
            mew=1.5,
            zorder=5,
            clip_on=False,
        )


def _points(comparison: Comparison, outcome: Outcome) -> list[Point]:
    """The method's curve, which begins without a formula; a method without strengths is no curve."""
    return [comparison.plain, *outcome.points] if outcome.method.strengths else outcome.points


def _line(axes: Axes, points: Sequence[Point], **style: Any) -> None:
    marker = "o" if len(points) == 1 else ""
    axes.plot(
        [p.perplexity.value for p in points], [p.rate.value for p in points], marker=marker, ms=3, **style
    )


def _band(axes: Axes, x: Sequence[float], intervals: Sequence[Interval], colour: str) -> None:
    axes.fill_between(
        x, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.2, lw=0
    )
    axes.plot(x, [i.value for i in intervals], "o-", color=colour, ms=4.5)


def _rule(axes: Axes, height: float, name: str) -> None:
    axes.axhline(height, color=QUIET, lw=0.9, ls=(0, (1, 2)))
    axes.annotate(
        name,
        (1, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=QUIET,
        fontsize=8,
    )


def _beside(axes: Axes, x: float, y: float, text: str, colour: str, weight: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(7, 0),
        textcoords="offset points",
        color=colour,
        va="center",
        fontweight=weight,
        annotation_clip=False,
    )


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights, moved up as little as makes them `gap` apart, all of them below 1 - gap/2."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name in sorted(heights, key=lambda name: heights[name]):
        last = placed[name] = max(heights[name], last + gap)
    excess = max(0.0, last - (1 - gap / 2))
    ceiling = math.inf
    for name in sorted(placed, key=lambda name: -placed[name]):
        ceiling = placed[name] = min(
            placed[name], (1 - gap / 2) if excess and ceiling is math.inf else ceiling
        )
        ceiling -= gap
    return placed


def _percent(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def plain_log(axes: Axes, axis: Any) -> None:
    """Few ticks, written as plain numbers."""
    low, high = axes.get_xlim() if axis is axes.xaxis else axes.get_ylim()
    axis.set_ticks([t * 10.0**e for e in range(-2, 6) for t in (1, 2, 5) if low <= t * 10.0**e <= high])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

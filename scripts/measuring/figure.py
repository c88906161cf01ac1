"""The benchmark's figure: what a formula costs, at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GOAL = 0.95
SIDES = {
    "same_requests": "plain vLLM, as many requests",
    "same_rows": "plain vLLM, the same rows",
    "formulas": "formulas of three terms",
}

RATIOS = {
    "concurrency": ("concurrent", "at a time"),
    "terms": ("terms", "terms of each of 8"),
    "vocabulary": ("vocabulary", "vocabulary of 8"),
    "traffic": ("concurrent", "coming and going"),
}
"""Of each section that has a ratio to the same rows: what varies, and how the panel is called."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Speed by concurrency, and the ratio to the same rows by what else varies; a panel a section."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from vllm_marith.evaluation import plots

    shown = [name for name in RATIOS if name in result]
    speeds = "concurrency" in result
    if not shown:
        raise ValueError(f"There is nothing to draw: the result has none of {', '.join(RATIOS)}.")
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 2.9))
        widths = [1.7] * speeds + [1.0] * len(shown)
        panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        if speeds:
            _speeds(panels.pop(0), result["concurrency"], plots)
        for axes, name in zip(panels, shown, strict=True):
            key, label = RATIOS[name]
            _ratios(axes, [(row[key], row["over_same_rows"]) for row in result[name]], label, plots)
            if axes is not panels[0]:
                axes.sharey(panels[0])
                axes.tick_params(labelleft=False)
        panels[0].set_ylabel("speed over plain, the same rows")
        found = [row["over_same_rows"] for name in shown for row in result[name]]
        lowest, highest = min(f["low"] for f in found), max(f["high"] for f in found)
        panels[0].set_ylim(min(0.8, lowest - 0.03), max(1.1, highest + 0.03))
        figure.suptitle(
            f"What formulas cost: {result['model']}, {result['machine']}", x=0.01, ha="left", weight="bold"
        )
        figure.savefig(path, dpi=144)


def _speeds(axes: Any, rows: list[dict[str, Any]], plots: Any) -> None:
    x = [row["concurrent"] for row in rows]
    colours = (plots.QUIET, plots.COLOURS[1], plots.COLOURS[0])
    for (side, label), colour in zip(SIDES.items(), colours, strict=True):
        y = [row["tokens_per_s"][side] for row in rows]
        axes.plot(x, y, marker="o", ms=4, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [str(n) for n in x])
    axes.xaxis.minorticks_off()
    plots.plain_log(axes, axes.yaxis)
    axes.set_xlabel("at a time")
    axes.set_ylabel("answers' tokens per second")
    axes.legend(frameon=False, fontsize=7)


def _ratios(axes: Any, points: list[tuple[int, dict[str, float]]], label: str, plots: Any) -> None:
    places = range(len(points))
    axes.axhline(1, color=plots.QUIET, lw=0.8)
    axes.axhline(GOAL, color=plots.QUIET, lw=0.8, ls=(0, (3, 2)))
    for place, (_, found) in zip(places, points, strict=True):
        axes.plot([place, place], [found["low"], found["high"]], color=plots.COLOURS[0], lw=2)
        axes.plot(place, found["median"], "o", ms=6, color=plots.COLOURS[0])
    axes.set_xticks(places, [f"{x // 1000}k" if x >= 2000 else str(x) for x, _ in points])
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_xlabel(label)

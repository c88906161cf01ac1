"""The report: one HTML file that loads nothing, made from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import phrases, statistics
from .results import Results, hits_by_seed
from .sections.section import Section, Table

TEMPLATE = Path(__file__).with_name("report.html")


def html(results: Results, parts: Sequence[Section]) -> str:
    """The whole report; parts: the results' `sections`."""
    from jinja2 import Environment

    from . import plots

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        title=f"Model arithmetic, measured: {results.scenario.name}",
        scenario=results.scenario,
        sections=parts,
        figures={plot.name: plots.svg(plot.draw()) for part in parts for plot in part.plots},
        made=made(results),
        limits=results.scenario.limits,
        method=method(results),
        real=real(results),
        samples=[(key, arm.texts[0]) for key, arm in results.arms.items()],
    )


def write_figures(parts: Sequence[Section], folder: Path) -> list[Path]:
    """Every figure as a PNG in `folder`."""
    from matplotlib import rc_context

    from . import plots

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in parts:
        for plot in part.plots:
            written.append(folder / f"{plot.name}.png")
            with rc_context(plots.STYLE):
                plot.draw().savefig(written[-1], dpi=144, metadata={"Software": None})
    return written


def made(results: Results) -> str:
    """What was written, on what, in how long."""
    about = results.about
    texts = sum(len(arm.texts) for arm in results.arms.values())
    seeds = phrases.listing([str(seed) for seed in results.seeds])
    return (
        f"{texts} texts in {len(results.arms)} arms, {results.samples} for each of the seeds {seeds}, at "
        f"temperature {results.scenario.temperature:g}. "
        + " ".join(f"{name}: {value}." for name, value in about.items())
    )


def method(results: Results) -> list[str]:
    """How the intervals come about, and whether the seeds agree."""
    said = [
        "Every finding above was put into words by a program, from the numbers of this run; it knows what to "
        "say when intervals overlap and when they do not. 'Clear' means that two 95% intervals do not "
        "overlap, which is stricter than a test of their difference at 5%; no correction is made for how "
        "many comparisons there are.",
        "Rates have Wilson's intervals. Perplexities, and rates at a given perplexity, have Rubin's Bayesian "
        "bootstrap over texts, with Jeffreys' prior for rates, so that a method none of whose texts has the "
        "attribute is not taken for one that never writes it. Arms, seeds and texts share no noise: each "
        "text's seed is a hash of all three.",
    ]
    if results.relative:
        said.append(
            "Perplexity is the referee's, divided by what it says of real held-out text of the kind that the "
            "judge takes the text for: 1 is as predictable as real text."
        )
    control = results.scenario.control
    if control:
        counts = [
            hits_by_seed(arm, control.axis, control.unwanted, results.seeds) for arm in results.arms.values()
        ]
        spread = statistics.dispersion(
            [[hits for hits, _ in arm] for arm in counts], [[count for _, count in arm] for arm in counts]
        )
        said.append(phrases.seeds(spread))
    return said


def real(results: Results) -> Table | None:
    """What the judges say of real text."""
    axis = results.scenario.reference
    if not results.real or axis is None:
        return None
    labels = sorted({label for part in results.real.values() for label in part.labels[axis]})
    random = np.random.default_rng(0)
    rows = []
    for kind, part in results.real.items():
        texts = statistics.Texts(part.is_(axis, kind), np.array(part.losses), np.array(part.tokens))
        rows.append(
            [
                f"real {kind}",
                *(phrases.percent(float(part.is_(axis, label).mean())) for label in labels),
                phrases.number(statistics.perplexity(texts, random)),
                phrases.percent(float(np.mean(part.repetition))),
            ]
        )
    return Table("", ["", *(f"called {label}" for label in labels), "perplexity", "repetition"], rows)


def summary(parts: Sequence[Section]) -> str:
    """The findings as text."""
    said = [f"{part.title}\n" + "\n".join(f"  - {finding}" for finding in part.findings) for part in parts]
    return "\n\n".join(said)

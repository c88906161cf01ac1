"""The way of an evaluation: models, engine, arms, judges, results."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_marith.engine.offline import prepare_environment
from vllm_marith.models import Paths, ensure

from .results import Measured, Results
from .scenario import Arm, Scenario, ScenarioError
from .sections import arms

if TYPE_CHECKING:
    from pathlib import Path

    from .drafting import Drafts
    from .judging import Labeller
    from .writing import Writer, Written


@dataclass(frozen=True)
class Sizes:
    """How much is written: texts for each arm and seed."""

    samples: int
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def turns(self) -> int:
        """Timed texts for each arm with drafts.  With six, the median lies between the extremes, at 95%."""
        return max(6, self.samples * len(self.seeds) // 16)


def evaluate(
    scenario: Scenario, sizes: Sizes, home: Path | None = None, console: Console | None = None
) -> Results:
    """Write and judge everything.

    Raises:
        ScenarioError, ModelsError, FormulaError: something is missing or wrong.
    """
    console = console or Console(stderr=True)
    wanted = arms(scenario)
    for arm in wanted:
        scenario.formula(arm)  # wrong formulas are told of before minutes are spent
    prepare_environment()
    embedded = scenario.embedded()
    paths = ensure(home, only=[*embedded, "corpus"]) if embedded else None
    readers = Readers.of(scenario, paths)

    from .writing import Writer

    started = time.monotonic()
    with console.status("Starting vLLM ..."):
        try:
            writer = Writer.start(scenario, paths)
        except (OSError, ValueError) as error:  # a model that is not there, mostly
            reason = " ".join(str(error).split())
            raise ScenarioError(f"the engine does not start: {reason[:400]}") from error
    console.print(f"vLLM started in {time.monotonic() - started:.0f} s.", highlight=False)
    measured, drafts = _write(writer, readers, wanted, sizes, console)
    real = readers.real(scenario, sizes.samples * len(sizes.seeds)) if paths else {}
    about = _about(scenario) | {"Duration": f"{time.monotonic() - started:.0f} s"}
    return Results(scenario, sizes.seeds, sizes.samples, measured, drafts, real, about)


def _write(
    writer: Writer, readers: Readers, wanted: Sequence[Arm], sizes: Sizes, console: Console
) -> tuple[dict[str, Measured], dict[str, Drafts]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    measured: dict[str, Measured] = {}
    drafts: dict[str, Drafts] = {}
    prompts: dict[str, list[int]] = {}
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("arms", total=len(wanted))
        for arm in wanted:
            progress.update(task, description=arm.key)
            if arm.factors:
                drafts[arm.key] = writer.drafts(arm, sizes.turns)
                progress.advance(task)
                continue
            started = time.monotonic()
            written = writer.write(arm, sizes.seeds, sizes.samples)
            seconds = time.monotonic() - started
            if arm.formula is None:  # comes before the formulas that are asked the same
                prompts |= {text.request: text.prompt for text in written}
            losses = readers.losses(written) or writer.losses(written, prompts)
            formula = writer.scenario.formula(arm)
            found = readers.read(None if formula is None else str(formula), written, losses)
            measured[arm.key] = replace(found, seconds=round(seconds, 2))
            progress.advance(task)
    return measured, drafts


class Readers:
    """The judges and, if it is not the served model itself, the referee."""

    def __init__(self, judges: dict[str, Labeller], referee: Any, paths: Paths | None) -> None:
        self.judges = judges
        self.referee = referee
        self.paths = paths

    @classmethod
    def of(cls, scenario: Scenario, paths: Paths | None) -> Readers:
        """Those of the scenario."""
        from .judging import labeller

        judges = {
            axis: labeller(axis, named, scenario.labels(axis), paths)
            for axis, named in scenario.judges.items()
        }
        if scenario.referee == "model":
            return cls(judges, None, paths)
        if scenario.referee != "embedded:referee" or paths is None:
            raise ScenarioError(f"the referee is 'embedded:referee' or 'model', not '{scenario.referee}'")
        from vllm_marith.models import Referee

        return cls(judges, Referee.load(paths.referee), paths)

    def losses(self, written: Sequence[Written]) -> list[tuple[float, int]]:
        """The referee's, nothing where the served model is to say it."""
        return self.referee.losses([text.text for text in written]) if self.referee else []

    def read(
        self, formula: str | None, written: Sequence[Written], losses: Sequence[tuple[float, int]]
    ) -> Measured:
        """Everything that is kept of some texts."""
        from .judging import repetition

        texts = [text.text for text in written]
        return Measured(
            formula,
            [text.seed for text in written],
            texts,
            {axis: judge(texts) for axis, judge in self.judges.items()},
            [round(loss, 3) for loss, _ in losses],
            [tokens for _, tokens in losses],
            [round(repetition(text.tokens), 4) for text in written],
        )

    def real(self, scenario: Scenario, count: int) -> dict[str, Measured]:
        """Held-out text of every kind that the models know."""
        if scenario.reference is None or self.referee is None or self.paths is None:
            return {}
        from vllm_marith.models import ATTRIBUTES
        from vllm_marith.models.corpus import Corpus
        from vllm_marith.models.held_out import held_out_texts
        from vllm_marith.models.tokenizer import encode

        from .writing import Written

        corpus, tokenizer = Corpus.load(self.paths.corpus), self.referee.tokenizer
        found = {}
        for kind in ATTRIBUTES:
            texts = held_out_texts(corpus, kind, count, scenario.tokens, tokenizer)
            pieces = [Written(0, "", text, [], encode(tokenizer, text)) for text in texts]
            found[kind] = self.read(None, pieces, self.referee.losses(texts))
        return found


def _about(scenario: Scenario) -> dict[str, str]:
    """What it ran on."""
    import torch

    from .scenario import EMBEDDED

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = []
    for name in ("vllm-marith", "vllm", "torch", "transformers"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {
        "Model": str(scenario.engine.model).removeprefix(EMBEDDED),
        "Machine": f"{platform.machine()}, {device}",
        "Versions": ", ".join(versions),
        "Date": time.strftime("%Y-%m-%d", time.gmtime()),
    }

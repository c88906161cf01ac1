"""What a person sees while models are made: one bar with an estimate, one line per finished artefact."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

Tick = Callable[[int, int, str], None]
"""Told after every step: steps done, steps in all, a word on how it goes."""

# Seconds on two cores of a server of 2024 with nothing else running; only the estimate depends on them.
EXPECTED_SECONDS = {
    "corpus": 10,
    "tokenizer": 1,
    "big": 100,
    "judge": 4,
    "referee": 36,
    "draft": 29,
    "expert": 7,
    "files": 7,
    "network": 7,
    "anti": 7,
    "lora_legal": 9,
    "judge_bert": 10,
}


class Progress:
    """A bar over all artefacts of one run, weighed by their expected time.  Silent when not `shown`."""

    def __init__(self, names: list[str], *, shown: bool) -> None:
        self.names = names
        self.shown = shown
        self.expected = {name: EXPECTED_SECONDS[name] for name in names}
        self.before = 0.0

    def __enter__(self) -> Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.console = Console(stderr=True)
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left:"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
                disable=not self.console.is_terminal,  # a pipe's progress is the lines of `finished`
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=sum(self.expected.values()), note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.bar.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence above the bar."""
        if self.shown:
            self.console.print(sentence, highlight=False, soft_wrap=True)

    def step(self, name: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` steps of the artefact `name` are through."""
        if self.shown:
            completed = self.before + self.expected[name] * done / total
            self.bar.update(self.task, description=name, completed=completed, note=note)

    def finished(self, name: str, seconds: float, summary: str) -> None:
        """The artefact `name` is there."""
        self.step(name, 1, 1)
        self.before += self.expected[name]
        self.say(f"  {name:<11}{seconds:5.0f} s  {summary}")


def duration(seconds: float) -> str:
    """A duration as a person says it."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"

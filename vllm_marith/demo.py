"""`marith demo`: the same request under several formulas, side by side, with what a judge and a referee say.

The models are the embedded ones: a small Llama that writes prose, code or legal text depending on its system
message.  The judge and the referee share no training text with it, nor with each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

from vllm_marith.engine.offline import offline_llm, prepare_environment, sampling_params
from vllm_marith.language import Formula
from vllm_marith.models import ATTRIBUTES, DEMO, Judge, Paths, ensure
from vllm_marith.models.corpus import Corpus

if TYPE_CHECKING:
    from vllm import LLM


REQUEST = "go on"
"""The user's message in every request."""

TERMS: dict[str, dict[str, str]] = {
    "base": {},  # the request as it is
    "prose": {"system": "write prose"},
    "code": {"system": "write code"},
    "legal": {"system": "write legal text"},
}

LABELS = (*ATTRIBUTES, "garbage")


@dataclass(frozen=True)
class Case:
    """One way to write: a formula, or a plain request with or without a system message."""

    name: str
    formula: str | None = None
    system: str | None = None

    @property
    def how(self) -> str:
        """The formula or the system message, as shown."""
        return self.formula or (f"system: {self.system}" if self.system else "no formula")

    def parsed(self) -> Formula | None:
        """The formula with its terms."""
        return Formula.parse(self.formula, TERMS) if self.formula else None

    def conversation(self) -> list[dict[str, str]]:
        """The request's messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": REQUEST}]


PLAIN = Case("plain")
PROMPTED = Case("prompted", system="write legal text")
HALFWAY = Case("half as strong", formula="0.5*base + 0.5*legal")
WITHOUT = Case("without code", formula="base - 0.6*code")
EITHER = Case("prose or legal", formula="union(prose, legal)")
NEITHER = Case("neither code nor legal", formula="base - 0.6*union(code, legal)")
CASES = (PLAIN, PROMPTED, HALFWAY, WITHOUT, EITHER, NEITHER)


@dataclass(frozen=True)
class Measured:
    """What judge and referee say about the texts of one case, or about real text."""

    name: str
    how: str
    texts: Sequence[str]
    rates: dict[str, float]
    """Label -> share of the texts."""
    perplexity: float

    def error(self, label: str) -> float:
        """Standard error of the share of `label`."""
        share = self.rates[label]
        return math.sqrt(share * (1 - share) / len(self.texts))


def run(
    home: Path | None,
    *,
    tokens: int,
    samples: int,
    seed: int,
    temperature: float,
    console: Console | None = None,
) -> list[Measured]:
    """The whole demo; returns what it measured, real text last."""
    console = console or Console()
    prepare_environment()  # before `ensure`, which may import torch
    paths = ensure(home, only=DEMO)
    with console.status("Starting vLLM ..."):
        started = time.monotonic()
        llm = start(paths)
    console.print(f"vLLM started in {time.monotonic() - started:.0f} s.", highlight=False)

    sampling = {"temperature": temperature, "max_tokens": tokens, "min_tokens": tokens}
    first = [write(llm, case, [seed], sampling) for case in CASES]
    console.print(f'\nOne request, "{REQUEST}", {len(CASES)} ways (T = {temperature:g}, seed {seed}):')
    console.print(side_by_side([text for [text] in first], console.width))

    seeds = range(seed + 1, seed + samples)
    texts = [
        [*shown, *write(llm, case, seeds, sampling)]
        for case, shown in track(
            list(zip(CASES, first, strict=True)),
            description=f"{samples} texts for each ...",
            console=console,
            transient=True,
        )
    ]
    measured = measure(paths, texts, tokens)
    console.print(numbers(measured))
    console.print(closing({result.name: result for result in measured}), highlight=False, soft_wrap=False)
    return measured


def start(paths: Paths) -> LLM:
    """The embedded model in vLLM, in this process."""
    return offline_llm(paths.big, max_model_len=512, max_num_seqs=192)


def write(llm: LLM, case: Case, seeds: Sequence[int], sampling: dict[str, Any]) -> list[str]:
    """One text per seed."""
    formula = case.parsed()
    params = [sampling_params(formula, seed=seed, **sampling) for seed in seeds]
    outputs = llm.chat([case.conversation()] * len(params), params, use_tqdm=False)  # type: ignore[arg-type]
    return [output.outputs[0].text for output in outputs]


def measure(paths: Paths, texts: Sequence[Sequence[str]], tokens: int) -> list[Measured]:
    """Judge and referee on the texts of `CASES`, then on real held-out text of the same length."""
    from vllm_marith.models import Referee
    from vllm_marith.models.held_out import held_out_texts

    judge, referee = Judge.load(paths.judge), Referee.load(paths.referee)
    results = [
        Measured(case.name, case.how, written, judge.rates(written), referee.perplexity(written))
        for case, written in zip(CASES, texts, strict=True)
    ]
    corpus = Corpus.load(paths.corpus)
    for attribute in ATTRIBUTES:
        real = held_out_texts(corpus, attribute, len(texts[0]), tokens, referee.tokenizer)
        results.append(
            Measured(f"real {attribute}", "held out", real, judge.rates(real), referee.perplexity(real))
        )
    return results


def side_by_side(texts: Sequence[str], width: int) -> Table:
    """The first text of every case, as many beside each other as fit."""
    columns = max(1, min(3, width // 40))
    grid = Table.grid(expand=True)
    for _ in range(columns):
        grid.add_column(ratio=1)
    panels = [
        # Text, not str: a model may well write what Rich would take for markup.
        Panel(Text(text.strip("\n")), title=Text(case.name, "bold"), subtitle=Text(case.how, "cyan"))
        for case, text in zip(CASES, texts, strict=True)
    ]
    for row in range(0, len(panels), columns):
        grid.add_row(*panels[row : row + columns])
    return grid


def numbers(measured: Sequence[Measured]) -> Table:
    """Shares and perplexities, a row a case."""
    count = len(measured[0].texts)
    error = 50 / math.sqrt(count)
    table = Table(
        title=f"What a judge calls {count} texts of each (standard error up to {error:.0f} points)",
        title_justify="left",
        box=None,
        padding=(0, 1),
    )
    table.add_column("")
    table.add_column("")
    for label in LABELS:
        table.add_column(label, justify="right")
    table.add_column("perplexity", justify="right")
    for result in measured:
        shares = [f"{result.rates[label]:.0%}" for label in LABELS]
        table.add_row(result.name, Text(result.how, "cyan"), *shares, f"{result.perplexity:.0f}")
    return table


def closing(results: dict[str, Measured]) -> str:
    """What the numbers show, in plain words, and where they show nothing."""
    plain = results[PLAIN.name]
    real = [results[f"real {attribute}"].perplexity for attribute in ATTRIBUTES]
    odd = [case.name for case in CASES if results[case.name].perplexity > max(real)]
    return (
        f"{_change('Subtracting code', 'code', plain, results[WITHOUT.name])}.  "
        f"{_change('Subtracting the union of code and legal', 'prose', plain, results[NEITHER.name])}, "
        "which no term of that formula asks for.  "
        f"The perplexity of real text is {min(real):.0f} to {max(real):.0f} by kind; "
        + (f"less fluent than that: {', '.join(odd)}." if odd else "no formula's is above that.")
    )


def _change(deed: str, label: str, before: Measured, after: Measured) -> str:
    """Whether a share changed by more than chance would."""
    shares = f"{before.rates[label]:.0%} to {after.rates[label]:.0%}"
    if abs(after.rates[label] - before.rates[label]) > 2 * math.hypot(
        before.error(label), after.error(label)
    ):
        return f"{deed} took the share of {label} text from {shares}"
    count = len(after.texts)
    return f"{deed} left the share of {label} text ({shares}) within what chance does to {count} texts"

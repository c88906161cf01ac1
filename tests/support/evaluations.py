"""Made-up results of an evaluation: what every arm is to have measured, said in a few numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_marith.evaluation import Results, Scenario
from vllm_marith.evaluation.drafting import Drafts, Turn
from vllm_marith.evaluation.results import Measured
from vllm_marith.evaluation.sections import arms

TEXTS = 150
TOKENS = 48


@dataclass(frozen=True)
class Outcome:
    """What an arm's texts are.

    Attributes:
        labels: axis -> label -> share of the texts; the rest is `other`.  Labels of two axes go together as
            little as their shares allow.
        nats: loss per token; every text has the same.
        repetition: of every text.
    """

    labels: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    nats: float = 4.0
    repetition: float = 0.01


def made_up(
    scenario: Scenario,
    outcome: Callable[[str], Outcome],
    *,
    real: bool = False,
    drafts: Callable[[str], Drafts] | None = None,
) -> Results:
    """Results in which the arm of each key measured `outcome(key)`, or `drafts(key)` where it is drafted.

    Real text has 4 nats per token.
    """
    kinds = ("prose", "code", "legal") if real else ()
    return Results(
        scenario,
        (0, 1, 2),
        TEXTS // 3,
        {arm.key: measured(scenario, outcome(arm.key)) for arm in arms(scenario) if not arm.factors},
        {arm.key: (drafts or drafted)(arm.key) for arm in arms(scenario) if arm.factors},
        {kind: measured(scenario, Outcome({"kind": {kind: 1.0}})) for kind in kinds},
        {"Model": "made up", "Machine": "none"},
    )


def measured(scenario: Scenario, outcome: Outcome) -> Measured:
    return Measured(
        formula=None,
        seeds=[i % 3 for i in range(TEXTS)],
        texts=[f"text {i} <script>&" for i in range(TEXTS)],
        labels={axis: _labels(outcome.labels.get(axis, {})) for axis in scenario.judges},
        losses=[outcome.nats * TOKENS] * TEXTS,
        tokens=[TOKENS] * TEXTS,
        repetition=[outcome.repetition] * TEXTS,
    )


def drafted(
    key: str,
    *,
    speedups: Mapping[str, Sequence[float]] | None = None,
    calls: Mapping[str, int] | None = None,
    differ: int = 0,
) -> Drafts:
    """A formula with and without drafts: 64 tokens a turn, 3 ms each without.

    speedups: mode -> that of each turn.
    calls: mode -> those of each turn.
    differ: how many of the four greedy answers under `fixed` are others.
    """
    faster = {"off": [1.0] * 6, "fixed": [1.5] * 6, "auto": [1.2] * 6, **(speedups or {})}
    of = {"off": 128, "fixed": 96, "auto": 112, **(calls or {})}
    turns = {
        mode: [
            Turn(64, 0.192 / by, of[mode], 0, 0 if mode == "off" else 60, 0 if mode == "off" else 48)
            for by in each
        ]
        for mode, each in faster.items()
    }
    answers = {mode: [[i, i + 1] for i in range(4)] for mode in faster}
    answers["fixed"][:differ] = [[9, 9]] * differ
    return Drafts(f"made_up({key.rpartition('/')[2]})", 8, turns, answers)


def _labels(shares: Mapping[str, float]) -> list[str]:
    named = itertools.chain.from_iterable([label] * round(share * TEXTS) for label, share in shares.items())
    return list(itertools.islice(itertools.chain(named, itertools.repeat("other")), TEXTS))

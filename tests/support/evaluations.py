"""Made-up results of an evaluation: what every arm is to have measured, said in a few numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vllm_marith.evaluation import Results, Scenario
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


def made_up(scenario: Scenario, outcome: Callable[[str], Outcome], *, real: bool = False) -> Results:
    """Results in which the arm of each key measured `outcome(key)`; real text has 4 nats per token."""
    kinds = ("prose", "code", "legal") if real else ()
    return Results(
        scenario,
        (0, 1, 2),
        TEXTS // 3,
        {arm.key: measured(scenario, outcome(arm.key)) for arm in arms(scenario)},
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


def _labels(shares: Mapping[str, float]) -> list[str]:
    named = itertools.chain.from_iterable([label] * round(share * TEXTS) for label, share in shares.items())
    return list(itertools.islice(itertools.chain(named, itertools.repeat("other")), TEXTS))

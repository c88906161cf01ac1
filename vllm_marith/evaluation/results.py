"""Everything that was measured, text by text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .drafting import Drafts, Turn
from .scenario import Scenario, ScenarioError
from .statistics import Texts


@dataclass(frozen=True)
class Measured:
    """The texts of one arm, or real ones; the lists have one entry a text.

    Attributes:
        formula: as it was parsed; None for a request without one, and for real text.
        labels: axis -> labels.
        losses: negative log-likelihoods in nats.
        tokens: what they are sums over.
        repetition: share of repeated runs of three tokens.
        seconds: that writing took.
    """

    formula: str | None
    seeds: list[int]
    texts: list[str]
    labels: dict[str, list[str]]
    losses: list[float]
    tokens: list[int]
    repetition: list[float]
    seconds: float = 0.0

    def is_(self, axis: str, label: str) -> np.ndarray:
        """bool [texts]."""
        return np.array(self.labels[axis]) == label


@dataclass(frozen=True)
class Results:
    """One evaluation.

    Attributes:
        arms: key -> texts.
        drafts: key -> turns, of the arms that are timed with and without drafts.
        real: label of the scenario's `reference` axis -> real texts of that kind.
        about: machine, versions, when and how long.
    """

    scenario: Scenario
    seeds: tuple[int, ...]
    samples: int
    arms: dict[str, Measured]
    drafts: dict[str, Drafts] = field(default_factory=dict)
    real: dict[str, Measured] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def counted(self, measured: Measured, hit: np.ndarray | None = None) -> Texts:
        """The texts' loss beyond that of real text of their kind, and which of them are `hit`."""
        tokens = np.array(measured.tokens)
        loss = np.array(measured.losses) - tokens * self._nats_of_kind(measured)
        return Texts(np.zeros(len(tokens), dtype=bool) if hit is None else hit, loss, tokens)

    @property
    def relative(self) -> bool:
        """Whether perplexities are relative to real text."""
        return bool(self.real)

    def _nats_of_kind(self, measured: Measured) -> np.ndarray:
        """Nats per token of real text of the kind that each text is; 0 where there is no real text."""
        if not self.real:
            return np.zeros(len(measured.texts))
        assert self.scenario.reference is not None
        nats = {kind: sum(real.losses) / sum(real.tokens) for kind, real in self.real.items()}
        other = sum(nats.values()) / len(nats)
        return np.array([nats.get(label, other) for label in measured.labels[self.scenario.reference]])

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        content = {
            "about": self.about,
            "seeds": self.seeds,
            "samples": self.samples,
            "scenario": self.scenario.model_dump(),
            "real": {kind: dataclasses.asdict(real) for kind, real in self.real.items()},
            "arms": {key: dataclasses.asdict(arm) for key, arm in self.arms.items()},
            "drafts": {key: dataclasses.asdict(drafts) for key, drafts in self.drafts.items()},
        }
        path.write_text(json.dumps(content, indent=0), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `save` wrote.

        Raises:
            ScenarioError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                scenario=Scenario.model_validate(content["scenario"]),
                seeds=tuple(content["seeds"]),
                samples=content["samples"],
                arms={key: Measured(**arm) for key, arm in content["arms"].items()},
                drafts={key: _drafts(**drafts) for key, drafts in content.get("drafts", {}).items()},
                real={kind: Measured(**real) for kind, real in content["real"].items()},
                about=content["about"],
            )
        except OSError as error:
            raise ScenarioError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ScenarioError(f"{path} holds no results of `marith eval`") from None


def _drafts(turns: dict[str, list[dict[str, Any]]], **others: Any) -> Drafts:
    return Drafts(turns={mode: [Turn(**turn) for turn in found] for mode, found in turns.items()}, **others)


def hits_by_seed(measured: Measured, axis: str, label: str, seeds: Sequence[int]) -> list[tuple[int, int]]:
    """(texts with the label, texts) for each seed."""
    of, hit = np.array(measured.seeds), measured.is_(axis, label)
    return [(int(hit[of == seed].sum()), int((of == seed).sum())) for seed in seeds]

"""The classifier terms of one step: between the groups that have them and the rows that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ...group import Cause, Failure, MemberTag
from ..answers import Answers, Continuation
from .rows import ClassifierRows


@dataclass(frozen=True)
class ClassifierStep:
    """What the classifiers say at one step.  A group is given by its leader's tag.

    Attributes:
        rows: computes it.
        continuations: group -> the answer so far.
        failures: group -> why its formula could not be computed.  In this step its classifiers prefer no
            token; the scheduler ends it afterwards.
    """

    rows: ClassifierRows
    continuations: dict[str, Continuation]
    failures: dict[str, Failure] = field(default_factory=dict)

    @classmethod
    def begin(cls, rows: ClassifierRows, groups: Sequence[MemberTag], answers: Answers) -> ClassifierStep:
        """Reads the answers of all groups that have classifiers."""
        names = [tag.group for tag in groups]
        return cls(rows, dict(zip(names, answers(names), strict=True)))

    def probabilities(self, asked: Sequence[tuple[MemberTag, str]]) -> dict[tuple[str, str], float]:
        """(group, term's name) -> p(y | text so far)."""
        terms = [next(term for term in tag.classifiers if term.name == name) for tag, name in asked]
        found, failures = self.rows.probabilities(terms, [self.continuations[tag.group] for tag, _ in asked])
        self._fail({asked[i][0].group: reason for i, reason in failures.items()})
        keys = [(tag.group, name) for tag, name in asked]
        return dict(zip(keys, found, strict=True))

    def write(
        self, asked: Sequence[tuple[MemberTag, int]], source: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Writes the rows of terms, each given by its index in its group; see `ClassifierRows.write`.

        Returns:
            lse: float32 ``[rows]``.
        """
        terms = [tag.classifiers[index] for tag, index in asked]
        continuations = [self.continuations[tag.group] for tag, _ in asked]
        lse, failures = self.rows.write(terms, continuations, source, out)
        self._fail({asked[i][0].group: reason for i, reason in failures.items()})
        return lse

    def _fail(self, reasons: Mapping[str, str]) -> None:
        self.failures.update((group, (Cause.CLASSIFIER, reason)) for group, reason in reasons.items())

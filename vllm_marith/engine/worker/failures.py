"""Formulas that a step could not compute, each of which fails its own group and no other.

What is wrong with a row is known on the device only, and a step does not wait for the device.  So the verdict
is copied to the host behind the step's logits and read with the step's tokens, which were copied later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..group import Cause, Failure

_VERDICTS: dict[int, Failure] = {
    1: (Cause.LOGITS, "the logits of one of its terms hold NaN or +inf"),
    2: (Cause.LOGITS, "its energies are beyond what float32 holds"),
    3: (Cause.FORBIDDEN, "it forbids every token"),
}


@dataclass(frozen=True)
class Soundness:
    """Says which groups of a step have no distribution to draw from.

    Attributes:
        names: the groups.
        rows: int64 ``[members]``, the rows that they read ...
        owners: int64 ``[members]``, ... and the number of the group that reads each.
    """

    names: Sequence[str]
    rows: torch.Tensor
    owners: torch.Tensor

    def unreadable(self, logits: torch.Tensor) -> torch.Tensor:
        """bool ``[groups]``: whether a group reads a row of ``[rows, vocab]`` that holds NaN or +inf.

        One pass over the logits: the largest value of a row is NaN where any is.
        """
        broken = ~(logits.amax(-1).index_select(0, self.rows) < torch.inf)
        count = torch.zeros(len(self.names), dtype=torch.int32, device=logits.device)
        return count.index_add_(0, self.owners, broken.int()) > 0

    def judge(self, unreadable: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        """uint8 ``[groups]`` on the host, once the device gets there: 0 for sound groups, see `_VERDICTS`.

        fused: float32 ``[groups, vocab]``, the formulas' rows.  Those without a distribution become 0, so
            that the sampler draws some token, which nobody will see.
        """
        best = fused.amax(-1)
        verdicts = torch.where(best == -torch.inf, 3, torch.where(best < torch.inf, 0, 2))
        verdicts = torch.where(unreadable, 1, verdicts).to(torch.uint8)
        if fused.device.type == "cpu":
            if verdicts.any():
                fused[verdicts > 0] = 0.0
            return verdicts
        fused.masked_fill_((verdicts > 0)[:, None], 0.0)
        return torch.empty_like(verdicts, device="cpu", pin_memory=True).copy_(verdicts, non_blocking=True)


class StepFailures(Mapping[str, Failure]):
    """Group -> why it failed in a step.  Must not be read before the step's tokens are on the host.

    On its way to another process it becomes a plain dictionary.

    Args:
        known: what the host knew at once.
        names, verdicts: as of `Soundness`.
    """

    def __init__(
        self,
        known: Mapping[str, Failure],
        names: Sequence[str] = (),
        verdicts: torch.Tensor | None = None,
    ) -> None:
        self._found = dict(known)
        self._names = names
        self._verdicts = verdicts

    def _read(self) -> dict[str, Failure]:
        if self._verdicts is not None:
            if self._verdicts.any():
                pairs = zip(self._names, self._verdicts.tolist(), strict=True)
                found = {name: _VERDICTS[verdict] for name, verdict in pairs if verdict}
                self._found = found | self._found  # what the host knew is the cause of the rest
            self._verdicts = None
        return self._found

    def __getitem__(self, name: str) -> Failure:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._read(),)

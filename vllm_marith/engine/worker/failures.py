"""Formulas that a step could not compute, each of which fails its own group and no other.

What is wrong with a row is known on the device only, and a step does not wait for the device.  So two numbers
a group are copied to the host behind the step's logits, and read with the step's tokens, which come later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..group import Cause, Failure


@dataclass(frozen=True)
class Soundness:
    """Says which groups of a step have no distribution to draw from, by the peaks of rows.

    A row's largest value is NaN where any of its values is, and +inf where any is: one pass over a row.

    Attributes:
        names: the groups.
        rows: int64 ``[groups, most members]``, the rows that they read; short groups repeat their leader's.
    """

    names: Sequence[str]
    rows: torch.Tensor

    def read(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 ``[groups]``: the largest value of all rows that a group reads, of ``[rows, vocab]``."""
        return logits.amax(-1)[self.rows].amax(-1).float()

    def judge(self, read: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        """float32 ``[2, groups]`` on the host, once the device gets there: `read`, and the peaks of `fused`.

        fused: float32 ``[groups, vocab]``, the formulas' rows.  NaN and +inf in them become 0, so that the
            sampler draws some token, which nobody will see.
        """
        peaks = torch.stack([read, fused.amax(-1)])
        if fused.device.type == "cpu":
            if not _sound(peaks).all():
                _mend(fused)
            return peaks
        _mend(fused)
        return torch.empty_like(peaks, device="cpu", pin_memory=True).copy_(peaks, non_blocking=True)


def _mend(fused: torch.Tensor) -> None:
    fused.nan_to_num_(nan=0.0, posinf=0.0, neginf=-torch.inf)


def _sound(peaks: torch.Tensor) -> np.ndarray:
    """bool ``[groups]``; comparisons with NaN are false."""
    read, fused = peaks.numpy()
    found: np.ndarray = (read < np.inf) & (fused < np.inf) & (fused > -np.inf)
    return found


def _failure(read: float, fused: float) -> Failure:
    """What is wrong with a group of these peaks."""
    if not read < np.inf:
        return Cause.LOGITS, "the logits of one of its terms hold NaN or +inf"
    if not fused < np.inf:
        return Cause.LOGITS, "its energies are beyond what float32 holds"
    return Cause.FORBIDDEN, "it forbids every token"


class StepFailures(Mapping[str, Failure]):
    """Group -> why it failed in a step.  Must not be read before the step's tokens are on the host.

    On its way to another process it becomes a plain dictionary.

    Args:
        known: what the host knew at once.
        names, peaks: as of `Soundness`.
    """

    def __init__(
        self,
        known: Mapping[str, Failure],
        names: Sequence[str] = (),
        peaks: torch.Tensor | None = None,
    ) -> None:
        self._found = dict(known)
        self._names = names
        self._peaks = peaks

    def _read(self) -> dict[str, Failure]:
        peaks, self._peaks = self._peaks, None
        if peaks is not None:
            bad = np.flatnonzero(~_sound(peaks))
            found = {self._names[i]: _failure(*peaks[:, i].tolist()) for i in bad}
            self._found = found | self._found  # what the host knew is the cause of the rest
        return self._found

    def __getitem__(self, name: str) -> Failure:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._read(),)

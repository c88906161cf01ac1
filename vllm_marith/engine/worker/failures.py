"""Formulas that a step could not compute, each of which fails its own group and no other.

What is wrong with a row is known on the device only, and a step does not wait for the device.  So a number
a group, its *peak* (`marith_kernels.StagedBatch.replace`), is copied to the host behind the step's logits,
and read with the step's tokens, which come later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..group import Cause, Failure


def judge(logits: torch.Tensor, leaders: torch.Tensor) -> torch.Tensor:
    """The peaks of formulas that were combined before the LM head, float32 ``[groups]``.

    Args:
        logits: ``[rows, vocab]``.
        leaders: int64 ``[groups]``, their rows in them, of which NaN and +inf become 0.
    """
    rows = logits.index_select(0, leaders)
    peaks = rows.amax(-1).float()
    if rows.device.type != "cpu" or not _sound(peaks).all():
        logits.index_copy_(0, leaders, rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=-torch.inf))
    return torch.where(peaks < torch.inf, peaks, torch.nan)


def to_host(peaks: torch.Tensor) -> torch.Tensor:
    """The peaks on the host, once the device gets there."""
    if peaks.device.type == "cpu":
        return peaks
    return torch.empty_like(peaks, device="cpu", pin_memory=True).copy_(peaks, non_blocking=True)


def _sound(peaks: torch.Tensor) -> np.ndarray:
    """bool ``[groups]``; comparisons with NaN are false."""
    found: np.ndarray = np.isfinite(peaks.numpy())
    return found


def _failure(peak: float) -> Failure:
    """What is wrong with a group of this peak."""
    if np.isnan(peak):
        return Cause.LOGITS, "the logits of one of its terms hold NaN or +inf"
    if peak == np.inf:
        return Cause.LOGITS, "its energies are beyond what float32 holds"
    return Cause.FORBIDDEN, "it forbids every token"


class StepFailures(Mapping[str, Failure]):
    """Group -> why it failed in a step.  Must not be read before the step's tokens are on the host.

    On its way to another process it becomes a plain dictionary.

    Args:
        known: what the host knew at once.
        names, peaks: of groups that may have failed, their peaks on the host, or on their way there.
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
            found = {self._names[i]: _failure(peaks[i].item()) for i in bad}
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

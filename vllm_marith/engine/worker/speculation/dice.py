"""The random decisions of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import marith_kernels
import torch


@dataclass(frozen=True)
class Settled:
    """What became of the drafts of some groups.

    Attributes:
        accepted: int64 ``[groups]``, how many drafted tokens stand.
        following: int64 ``[groups]``, the token after them.
    """

    accepted: torch.Tensor
    following: torch.Tensor


class Dice:
    """Draws and checks tokens with vLLM's generators: a request's own where it has a seed.

    Args:
        generators: by request row.
    """

    def __init__(self, device: torch.device, generators: Mapping[int, torch.Generator]) -> None:
        self._device = device
        self._generators = generators

    def draw(self, logits: torch.Tensor, rows: Sequence[int], temperature: torch.Tensor) -> torch.Tensor:
        """int64 ``[n]``: a token from softmax(logits) for each of ``[n, vocab]``; the largest where T = 0.

        Args:
            rows: request rows, whose generators are used.
            temperature: float32 ``[n]``, 0 or 1.
        """
        uniform = self._uniform(rows, [2] * len(rows)).view(-1, 2)
        return marith_kernels.sample(logits, uniform, temperature=temperature).token

    def settle(
        self,
        target: torch.Tensor,
        draft: torch.Tensor,
        tokens: torch.Tensor,
        numbers: Sequence[int],
        rows: Sequence[int],
        temperature: torch.Tensor,
    ) -> Settled:
        """Checks drafted tokens, and draws what follows them; see `marith_kernels.verify` for the layout.

        Args:
            target: float32 ``[drafts + groups, vocab]``, logits of what is to be sampled.
            draft: float32 ``[drafts, vocab]``, those that the tokens were drawn from.
            tokens: int64 ``[drafts]``.
            numbers: of each group's drafts.
            rows: the leaders' request rows.
            temperature: float32 ``[groups]``, 0 or 1.
        """
        start = [0]
        for number in numbers:
            start.append(start[-1] + number + 1)
        # One draw for each draft, and two for what follows.
        uniform = self._uniform(rows, [number + 2 for number in numbers])
        each = uniform.split([number + 2 for number in numbers])
        bounds = torch.tensor(start, dtype=torch.int32, device=self._device)
        verified = marith_kernels.verify(
            target,
            draft,
            tokens,
            bounds,
            torch.cat([part[:-2] for part in each]),
            max_drafted=max(numbers),
            temperature=temperature,
        )
        left = marith_kernels.residual(target, draft, bounds, verified, temperature=temperature)
        following = marith_kernels.sample(left, torch.stack([part[-2:] for part in each]))
        return Settled(verified.accepted, following.token)

    def _uniform(self, rows: Sequence[int], numbers: Sequence[int]) -> torch.Tensor:
        """float32 in [0, 1): `numbers[i]` of them for row i, one row behind the other."""
        uniform = torch.rand(sum(numbers), device=self._device)
        for row, part in zip(rows, uniform.split(list(numbers)), strict=True):
            generator = self._generators.get(row)
            if generator is not None:
                part.uniform_(generator=generator)
        return uniform

"""Muon for the matrices and AdamW for the rest, in float32.

`torch.optim.Muon` iterates in bfloat16, which is very slow on CPUs without matrix units for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

MOMENTUM = 0.95
ITERATIONS = 4
DECAY = 0.05


class Muon:
    """Momentum orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024), equal shapes batched.

    A matrix moves by `rate * sqrt(max(1, rows / columns)) * O`, where O is the nearest semi-orthogonal matrix
    to its Nesterov momentum.
    """

    # Quintic coefficients that push all singular values into about [0.7, 1.2] in few iterations.
    A, B, C = 3.4445, -4.7750, 2.0315

    def __init__(self, matrices: Iterable[torch.nn.Parameter], rate: float) -> None:
        self.rate = rate
        self.groups: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.momenta = {s: torch.zeros(len(group), *s) for s, group in self.groups.items()}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with the rate multiplied by `scale`."""
        rate = self.rate * scale
        for (rows, columns), group in self.groups.items():
            gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            momentum = self.momenta[rows, columns].lerp_(gradients, 1 - MOMENTUM)
            updates = self._orthogonal(gradients.lerp(momentum, MOMENTUM))
            for matrix, update in zip(group, updates, strict=True):
                matrix.mul_(1 - DECAY * rate)
                matrix.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _orthogonal(self, x: torch.Tensor) -> torch.Tensor:
        """Nearly semi-orthogonal matrices with the singular vectors of `x` [n, rows, columns]."""
        tall = x.shape[1] > x.shape[2]
        if tall:
            x = x.mT  # the iteration multiplies by the Gram matrix of the shorter side
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = self.A * x + (self.B * gram + self.C * gram @ gram) @ x
        return x.mT if tall else x


class Optimizer:
    """Both optimizers behind one `step`, with the gradients clipped and cleared."""

    def __init__(self, model: torch.nn.Module, adam: float, muon: float) -> None:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in trained if muon and p.ndim == 2 and "embed" not in name]
        chosen = set(map(id, matrices))
        rest = [p for _, p in trained if id(p) not in chosen]
        self.parameters = [p for _, p in trained]
        self.rate = adam
        self.adam = torch.optim.AdamW(rest, lr=adam, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
        self.muon = Muon(matrices, muon)

    def step(self, scale: float) -> None:
        """One update with the rates multiplied by `scale`."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * scale
        self.adam.step()
        self.muon.step(scale)
        for parameter in self.parameters:
            parameter.grad = None


def schedule(done: float) -> float:
    """Rate multiplier after the share `done` of the steps: a short rise, a plateau, then straight to zero."""
    return min(1.0, done / 0.04 + 0.02) * min(1.0, (1 - done) / 0.6)

"""The fusion operation in float64, one group after the other: what every backend is tested against."""

from __future__ import annotations

import torch

from .program import NUMBER, Batch, Program


def fuse(
    logits: torch.Tensor, batch: Batch, vocab_size: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `marith_kernels.fuse`. Returns (lse, argmax); use `energies` for the float64 rows."""
    rows = energies(logits, batch, vocab_size)
    out[:, :vocab_size] = rows.float()
    out[:, vocab_size:] = -torch.inf
    return log_sum_exp(rows).float(), rows.argmax(-1)


def energies(logits: torch.Tensor, batch: Batch, vocab_size: int | None = None) -> torch.Tensor:
    """float64 [G, vocab_size]: the energies of every group, on the scale that `marith_kernels.fuse`
    describes."""
    raw = logits[:, :vocab_size].double()
    lse = log_sum_exp(raw)
    result = raw.new_empty(batch.n_groups, raw.shape[1])
    for g, (program, rows) in enumerate(zip(batch.programs, map(list, batch.rows), strict=True)):
        shift = 0.0 if program.linear else lse[rows, None]
        energy, weight = evaluate(program, raw[rows] - shift)
        result[g] = energy / weight if program.divide else energy
        if not program.linear:
            result[g] += lse[rows[0]]
    return result


def evaluate(program: Program, leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a program on leaves [n_terms, V]; returns E and N, each [V]."""
    one = torch.ones_like(leaves[0])
    stack: list[tuple[torch.Tensor, torch.Tensor]] = []
    for op, term, weight in program.instructions:
        if op == "push":
            stack.append((_times(weight, one if term == NUMBER else leaves[term]), weight * one))
            continue
        if op == "scale":
            energy, n = stack.pop()
            stack.append((_times(weight, energy), weight * n))
            continue
        if op.startswith("pop"):
            operand_energy, operand_n = stack.pop()
        else:
            operand_energy, operand_n = one if term == NUMBER else leaves[term], one
        operand_energy, operand_n = _times(weight, operand_energy), weight * operand_n
        energy, n = stack.pop()
        if op.endswith("add"):
            stack.append((energy + operand_energy, n + operand_n))
        else:
            wins = operand_energy > energy if op.endswith("max") else operand_energy < energy
            stack.append((torch.where(wins, operand_energy, energy), torch.where(wins, operand_n, n)))
    return stack[0]


def log_sum_exp(rows: torch.Tensor) -> torch.Tensor:
    """logsumexp over the last dimension, 0 for rows of nothing but -inf."""
    lse = torch.logsumexp(rows, -1)
    return torch.where(lse == -torch.inf, 0.0, lse)


def _times(weight: float, energy: torch.Tensor) -> torch.Tensor:
    """weight * energy, where -inf stays -inf under every weight but 0, which drops the operand."""
    if weight == 0:
        return torch.zeros_like(energy)
    return torch.where(energy == -torch.inf, energy, weight * energy)

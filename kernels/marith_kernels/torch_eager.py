"""The fused operation in plain torch, float32: for devices and machines that have nothing better.

Groups with the same program are computed together, a few torch calls an instruction.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import torch

from .program import NUMBER, Batch, Instruction, Program


def fuse(
    logits: torch.Tensor, batch: Batch, vocab_size: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `marith_kernels.fuse`. Returns (lse, argmax)."""
    logits = logits[:, :vocab_size]
    out[:, vocab_size:] = -torch.inf
    energies = out[:, :vocab_size]
    row_lse = logits.new_zeros(logits.shape[0], dtype=torch.float32)
    if batch.n_lse_rows:
        rows = batch.lse_row.long()
        row_lse[rows] = _log_sum_exp(logits[rows].float())
    alike: dict[tuple[tuple[Instruction, ...], bool], list[int]] = defaultdict(list)
    for g, program in enumerate(batch.programs):
        alike[program.instructions, program.divide].append(g)
    for groups in alike.values():
        program = batch.programs[groups[0]]
        rows = torch.tensor([list(batch.rows[g]) for g in groups], device=logits.device)  # [groups, terms]
        energies[groups] = _energies(program, logits, rows, row_lse)
    return _log_sum_exp(energies), energies.argmax(-1)


def _energies(
    program: Program, logits: torch.Tensor, rows: torch.Tensor, row_lse: torch.Tensor
) -> torch.Tensor:
    if program.linear:
        terms = []
        for _, term, bits in program.encoded.T:
            weight = float(bits.view("float32"))
            leaf = (
                logits[rows[:, term]].float()
                if term != NUMBER
                else torch.ones(len(rows), logits.shape[1], device=logits.device)
            )
            terms.append(_times(weight, leaf))
        return functools.reduce(torch.add, terms)
    log_probs = {
        term: logits[rows[:, term]].float() - row_lse[rows[:, term], None] for term in range(program.n_terms)
    }
    one = logits.new_ones(len(rows), 1, dtype=torch.float32)
    log_probs[NUMBER] = one.expand(-1, logits.shape[1])
    stack: list[tuple[torch.Tensor, torch.Tensor]] = []
    for op, term, weight in program.instructions:
        if op == "push":
            stack.append((_times(weight, log_probs[term]), weight * one))
            continue
        if op == "scale":
            energy, n = stack.pop()
            stack.append((_times(weight, energy), weight * n))
            continue
        operand, operand_n = stack.pop() if op.startswith("pop") else (log_probs[term], one)
        operand, operand_n = _times(weight, operand), weight * operand_n
        energy, n = stack.pop()
        if op.endswith("add"):
            stack.append((energy + operand, n + operand_n))
        elif program.divide:
            wins = operand > energy if op.endswith("max") else operand < energy
            stack.append((torch.where(wins, operand, energy), torch.where(wins, operand_n, n)))
        else:
            stack.append(
                (torch.maximum(energy, operand) if op.endswith("max") else torch.minimum(energy, operand), n)
            )
    energy, n = stack[0]
    return (energy / n if program.divide else energy) + row_lse[rows[:, 0], None]


def _log_sum_exp(rows: torch.Tensor) -> torch.Tensor:
    lse = torch.logsumexp(rows, -1)
    return torch.where(lse == -torch.inf, 0.0, lse)


def _times(weight: float, energy: torch.Tensor) -> torch.Tensor:
    if weight == 0:
        return torch.zeros_like(energy)
    if weight == 1:
        return energy
    scaled = weight * energy
    return scaled.masked_fill_(energy == -torch.inf, -torch.inf) if weight < 0 else scaled

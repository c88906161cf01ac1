"""The fused operation in plain torch, float32: for devices and machines that have nothing better.

Groups with the same program are computed together, a few torch calls an instruction.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable

import torch

from .batch import Batch
from .program import LEAF_OPS, NUMBER, UNIFORM, Program


def fuse(
    logits: torch.Tensor,
    batch: Batch,
    vocab_size: int,
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
    row_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `marith_kernels.fusion.run`. Returns (lse, argmax)."""
    logits = logits[:, :vocab_size]
    out[:, vocab_size:] = -torch.inf
    energies = out[:, :vocab_size]
    if row_lse is None:
        row_lse = logits.new_zeros(logits.shape[0], dtype=torch.float32)
    if batch.n_lse_rows:
        rows = batch.lse_row.long()
        row_lse[rows] = log_sum_exp(logits[rows].float())
    # of groups computed together, a term is read from the logits by all or from the extra rows by all
    alike: dict[tuple[Program, tuple[bool, ...]], list[int]] = defaultdict(list)
    for g, program in enumerate(batch.programs):
        alike[program, tuple(row >= batch.first_extra for row in batch.rows[g])].append(g)
    for (program, from_extra), groups in alike.items():
        rows = torch.tensor([list(batch.rows[g]) for g in groups], device=logits.device)  # [groups, terms]

        def leaf(
            term: int, rows: torch.Tensor = rows, from_extra: tuple[bool, ...] = from_extra
        ) -> torch.Tensor:
            if from_extra[term] and extra is not None:
                return extra[rows[:, term] - batch.first_extra, :vocab_size]
            return logits[rows[:, term]].float()

        if program.linear:
            energies[groups] = _weighted_sum(program, leaf, len(groups), logits)
        else:
            energies[groups] = _energies(program, leaf, rows, row_lse, vocab_size)
    return log_sum_exp(energies), energies.argmax(-1)


def _weighted_sum(
    program: Program, leaf: Callable[[int], torch.Tensor], n_groups: int, logits: torch.Tensor
) -> torch.Tensor:
    terms = []
    for _, term, bits in program.encoded.T:
        weight = float(bits.view("float32"))
        if term == NUMBER:
            terms.append(_times(weight, torch.ones(n_groups, logits.shape[1], device=logits.device)))
        else:
            terms.append(_times(weight, leaf(term)))
    return functools.reduce(torch.add, terms)


def _energies(
    program: Program,
    leaf: Callable[[int], torch.Tensor],
    rows: torch.Tensor,
    row_lse: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    one = row_lse.new_ones(len(rows), 1)
    used = {i.term for i in program.instructions if i.op in LEAF_OPS}
    log_probs = {
        term: leaf(term) if term in program.weightless else leaf(term) - row_lse[rows[:, term], None]
        for term in used
        if term >= 0
    }
    log_probs[NUMBER] = one.expand(-1, vocab_size)
    log_probs[UNIFORM] = (one * -math.log(vocab_size)).expand(-1, vocab_size)
    stack: list[tuple[torch.Tensor, torch.Tensor]] = []
    for op, term, weight in program.instructions:
        if op in LEAF_OPS:
            operand, operand_n = log_probs[term], one * (term not in program.weightless)
        else:
            operand, operand_n = stack.pop()
        scaled, scaled_n = _times(weight, operand), weight * operand_n
        if op in ("push", "scale"):
            stack.append((scaled, scaled_n))
            continue
        energy, n = stack.pop()
        if op == "logadd":
            stack.append((torch.logaddexp(energy, operand + math.log(weight)), n))
        elif op == "debias":
            excess = torch.where(energy < operand, energy.exp() - operand.exp(), 0.0)
            stack.append((energy + weight * excess, n))
        elif op == "pop_gate":
            is_open = energy >= 0
            stack.append((torch.where(is_open, scaled, 0.0), torch.where(is_open, scaled_n, 0.0)))
        elif op.endswith("add"):
            stack.append((energy + scaled, n + scaled_n))
        elif program.divide:
            wins = scaled > energy if op.endswith("max") else scaled < energy
            stack.append((torch.where(wins, scaled, energy), torch.where(wins, scaled_n, n)))
        else:
            stack.append(
                (torch.maximum(energy, scaled) if op.endswith("max") else torch.minimum(energy, scaled), n)
            )
    energy, n = stack[0]
    return (energy / n if program.divide else energy) + row_lse[rows[:, 0], None]


def log_sum_exp(rows: torch.Tensor) -> torch.Tensor:
    """logsumexp over the last dimension, 0 for rows of nothing but -inf."""
    lse = torch.logsumexp(rows, -1)
    return torch.where(lse == -torch.inf, 0.0, lse)


def _times(weight: float, energy: torch.Tensor) -> torch.Tensor:
    if weight == 0:
        return torch.zeros_like(energy)
    if weight == 1:
        return energy
    scaled = weight * energy
    return scaled.masked_fill_(energy == -torch.inf, -torch.inf) if weight < 0 else scaled

"""The fusion operation in float64, one group after the other: what every backend is tested against."""

from __future__ import annotations

import math

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
    """See `marith_kernels.fusion.run`. Returns (lse, argmax); use `energies` for the float64 rows."""
    extra_lse = None if extra is None or row_lse is None else row_lse[batch.first_extra :]
    rows = energies(logits, batch, vocab_size, extra, extra_lse)
    out[:, :vocab_size] = rows.float()
    out[:, vocab_size:] = -torch.inf
    # of the float32 rows: tokens that differ in float64 alone are equal in what is returned
    return log_sum_exp(rows).float(), out[:, :vocab_size].argmax(-1)


def energies(
    logits: torch.Tensor,
    batch: Batch,
    vocab_size: int | None = None,
    extra: torch.Tensor | None = None,
    extra_lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 [G, vocab_size]: the energies of every group, on the scale that `marith_kernels.fuse`
    describes."""
    raw = logits[:, :vocab_size].double()
    lse = log_sum_exp(raw)
    row_of = list(range(len(raw)))  # position in `raw` -> row as the batch counts
    if extra is not None and extra_lse is not None:
        raw = torch.cat([raw, extra[:, :vocab_size].double()])
        lse = torch.cat([lse, extra_lse.double()])
        row_of += [batch.first_extra + s for s in range(len(extra))]
    position = {row: at for at, row in enumerate(row_of)}
    result = raw.new_empty(batch.n_groups, raw.shape[1])
    for g, program in enumerate(batch.programs):
        at = [position[row] for row in batch.rows[g]]
        if program.linear:
            energy, weight = evaluate(program, raw[at], uniform=0.0)
        else:
            log_probs = raw[at] - lse[at, None]
            weightless = [t for t in program.weightless if t < len(at)]
            log_probs[weightless] = raw[at][weightless]
            energy, weight = evaluate(program, log_probs, uniform=-math.log(raw.shape[1]))
        result[g] = energy / weight if program.divide else energy
        if not program.linear:
            result[g] += lse[at[0]]
    return result


def evaluate(program: Program, leaves: torch.Tensor, uniform: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a program on leaves [n_terms, V]; `uniform` is the energy of UNIFORM. Returns E and N, each [V]."""
    one = torch.ones_like(leaves[0])
    stack: list[tuple[torch.Tensor, torch.Tensor]] = []
    for op, term, weight in program.instructions:
        if op in LEAF_OPS:
            operand_n = torch.zeros_like(one) if term in program.weightless else one
            operand = one if term == NUMBER else uniform * one if term == UNIFORM else leaves[term]
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
        else:
            wins = scaled > energy if op.endswith("max") else scaled < energy
            stack.append((torch.where(wins, scaled, energy), torch.where(wins, scaled_n, n)))
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

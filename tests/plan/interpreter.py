"""Runs a plan as its docstring says, in float64: the proof that lowering keeps the meaning."""

import numpy as np
import torch

from vllm_marith.language.definition import log_softmax
from vllm_marith.plan import NO_TERM, Plan


def _times(weight, energy):
    return np.where(np.isneginf(energy), energy, weight * np.where(np.isneginf(energy), 0, energy))


def _log_softmax(x):
    # The definition's own, to the last bit: where two operands tie, rounding would decide which N wins.
    return log_softmax(torch.from_numpy(x)).numpy()


def run(plan: Plan, logits: dict[str, np.ndarray]) -> np.ndarray:
    """Log-probabilities [..., vocab] of a plan for logits [..., vocab] by term name."""
    raw = [logits[name] for name in plan.terms]
    # A linear plan promises that it needs no log-sum-exp of its inputs.
    leaves = raw if plan.linear else [_log_softmax(x) for x in raw]
    ones = np.ones_like(raw[0])
    stack: list[tuple[np.ndarray, np.ndarray]] = []
    deepest = 0
    for op, term, weight in plan.instructions:
        if op == "scale":
            energy, total = stack.pop()
            stack.append((_times(weight, energy), weight * total))
            continue
        if op.startswith("pop_"):
            energy, total = stack.pop()
        else:
            energy, total = (ones if term == NO_TERM else leaves[term]), ones
        other, other_total = _times(weight, energy), weight * total
        match op.removeprefix("pop_"):
            case "push":
                stack.append((other, other_total))
            case "add":
                energy, total = stack.pop()
                stack.append((energy + other, total + other_total))
            case "max" | "min" as kind:
                energy, total = stack.pop()
                wins = other > energy if kind == "max" else other < energy
                stack.append((np.where(wins, other, energy), np.where(wins, other_total, total)))
            case _:
                raise AssertionError(op)
        deepest = max(deepest, len(stack))
    assert deepest == plan.depth
    ((energy, total),) = stack
    return _log_softmax(energy / total if plan.divide else energy)

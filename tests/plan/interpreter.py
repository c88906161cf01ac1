"""Runs a plan as its docstring says, in float64: the proof that lowering keeps the meaning."""

import numpy as np
import torch

from vllm_marith.language import filters
from vllm_marith.language.definition import log_softmax
from vllm_marith.language.nodes import KLIndicator, Schedule
from vllm_marith.plan import NO_ROW, UNIFORM_ROW, Plan, Stage


def _times(weight, energy):
    finite = np.where(np.isneginf(energy), 0, energy)
    return np.where(np.isneginf(energy) & (weight != 0), -np.inf, weight * finite)


def _log_softmax(x):
    # The definition's own, to the last bit: where two operands tie, rounding would decide which N wins.
    return log_softmax(torch.from_numpy(x)).numpy()


def run(plan: Plan, logits: dict[str, np.ndarray], position=0, probabilities=None) -> np.ndarray:
    """Log-probabilities [..., vocab] of a plan for logits [..., vocab] by term name.

    Of a classifier in Bayes form the "logits" are its energies.
    """
    dials = [
        dial.at(position) if isinstance(dial, Schedule) else dial.at(probabilities[dial.classifier.name])
        for dial in plan.dials
    ]
    rows = [logits[name] for name in plan.terms]
    weightless = [False] * len(rows)
    for stage in plan.stages:
        rows.append(_row(plan, stage, rows, weightless, dials, logits))
        weightless.append(stage.weightless)
    return _log_softmax(rows[-1])


def _row(plan: Plan, stage: Stage, rows, weightless, dials, logits):
    sources = [torch.from_numpy(_log_softmax(rows[row])) for row in stage.sources]
    match stage.kind:
        case "classifier":
            assert len(sources) == 1
            return logits[plan.classifiers[int(stage.parameters[0])]]
        case "plausible":
            return np.where(filters.plausible(sources[0], *stage.parameters), 0.0, -np.inf)
        case "kl_indicator":
            divergence, include_max, minimize, top_k = stage.parameters
            node = KLIndicator(None, None, divergence, int(top_k), bool(include_max), bool(minimize))
            return np.where(filters.kl_indicator(*sources, node), 0.0, -1.0)
    row = _program(stage, rows, weightless, dials)
    if stage.kind == "fuse":
        return row
    log_p = torch.from_numpy(_log_softmax(row))
    k = stage.parameters[0]
    kept = filters.topk(log_p, int(k)) if stage.kind == "top_k" else filters.topp(log_p, k)
    return np.where(kept, row, -np.inf)


def _program(stage: Stage, rows, weightless, dials):
    # A linear program promises that it needs no log-sum-exp of its inputs.
    leaves = [
        x if stage.linear or energy else _log_softmax(x) for x, energy in zip(rows, weightless, strict=True)
    ]
    one = np.ones_like(rows[0])

    def leaf(row):
        if row == NO_ROW:
            return one, one
        if row == UNIFORM_ROW:
            return np.full_like(one, -np.log(one.shape[-1])), one
        return leaves[row], one * (not weightless[row])

    stack: list[tuple[np.ndarray, np.ndarray]] = []
    deepest = 0
    for op, row, weight in stage.at(dials):
        if op == "scale":
            energy, total = stack.pop()
            stack.append((_times(weight, energy), weight * total))
            continue
        if op == "logadd":
            energy, total = stack.pop()
            stack.append((np.logaddexp(energy, leaf(row)[0] + np.log(weight)), total))
            continue
        if op == "debias":
            energy, total = stack.pop()
            stack.append((energy + weight * np.minimum(np.exp(energy) - np.exp(leaf(row)[0]), 0), total))
            continue
        energy, total = stack.pop() if op.startswith("pop_") else leaf(row)
        other, other_total = _times(weight, energy), weight * total
        match op.removeprefix("pop_"):
            case "push":
                stack.append((other, other_total))
            case "add":
                energy, total = stack.pop()
                stack.append((energy + other, total + other_total))
            case "gate":
                is_open = stack.pop()[0] >= 0
                stack.append((np.where(is_open, other, 0.0), np.where(is_open, other_total, 0.0)))
            case "max" | "min" as kind:
                energy, total = stack.pop()
                wins = other > energy if kind == "max" else other < energy
                stack.append((np.where(wins, other, energy), np.where(wins, other_total, total)))
            case _:
                raise AssertionError(op)
        deepest = max(deepest, len(stack))
    assert deepest == stage.depth
    ((energy, total),) = stack
    return energy / total if stage.divide else energy

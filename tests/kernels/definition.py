"""What programs, filters and pipelines mean, in numpy and float64, written apart from the package.

Beside every value stands how large the numbers were that it was summed from. An energy may come out of
cancellation, 1000 a - 999.9 b, and no float32 result can then be better than rounding errors of the
*contributions*. So errors are measured against those: |w| (|x| + |lse| + 1) for a leaf (the logarithm of a
sum has an absolute error, hence the 1), added up in sums, the larger one in max and min.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from marith_kernels import Pipeline, Program

TOLERANCE = 2e-6
Array = np.ndarray


class Value(NamedTuple):
    energy: Array  # [V]
    n: Array  # [V]
    size: Array  # [V] of the energy
    size_n: Array  # [V] of N
    decided: Array  # bool [V] false where rounding decides who wins or whether a gate is open


def log_sum_exp(row: Array) -> float:
    peak = row.max()
    return 0.0 if peak == -np.inf else float(peak + np.log(np.exp(row - peak).sum()))


def run(program: Program, rows: Array, lse: Array) -> Value:
    """The row that `fuse` returns for terms of these rows [n_terms, V] with these log-sum-exps [n_terms]."""
    with np.errstate(all="ignore"):
        value = _run(program, rows, np.zeros(len(rows)) if program.linear else lse)
        energy, size = value.energy, value.size
        if program.divide:
            size = size / abs(value.n) + abs(energy) * value.size_n / value.n**2
            energy = energy / value.n
        if not program.linear:
            energy, size = energy + lse[0], size + abs(lse[0])
    size = np.where(energy == -np.inf, 1.0, size)
    return Value(energy, value.n, size, value.size_n, value.decided)


def _run(program: Program, rows: Array, lse: Array) -> Value:
    vocab = rows.shape[1]
    one = np.ones(vocab)
    yes = np.ones(vocab, bool)

    def leaf(t: int) -> Value:
        if t == -1:
            return Value(one, one, one, one, yes)
        if t == -2:  # of raw logits, zeros are the uniform distribution
            value = 0.0 if program.linear else -math.log(vocab)
            return Value(value * one, one, abs(value) * one, one, yes)
        x = rows[t]
        finite = np.where(x == -np.inf, 0.0, abs(x))
        if t in program.weightless:
            return Value(x, 0 * one, finite, 0 * one, yes)
        return Value(x - lse[t], one, finite + abs(lse[t]) + (not program.linear), one, yes)

    def times(w: float, v: Value) -> Value:
        if w == 0:
            return Value(0 * one, 0 * one, 0 * one, 0 * one, v.decided)
        energy = np.where(v.energy == -np.inf, -np.inf, w * v.energy)
        return Value(energy, w * v.n, abs(w) * v.size, abs(w) * v.size_n, v.decided)

    stack: list[Value] = []
    for op, t, w in program.instructions:
        operand = stack.pop() if op == "scale" or op.startswith("pop_") else leaf(t)
        scaled = times(w, operand)
        if op in ("push", "scale"):
            stack.append(scaled)
            continue
        top = stack.pop()
        decided = top.decided & operand.decided
        if op in ("add", "pop_add"):
            banned = (top.energy == -np.inf) | (scaled.energy == -np.inf)
            energy = np.where(banned, -np.inf, top.energy + scaled.energy)
            new = Value(energy, *(a + b for a, b in zip(top[1:4], scaled[1:4], strict=True)), decided)
        elif op == "logadd":
            size = np.maximum(top.size, operand.size + abs(math.log(w))) + 1
            energy = np.logaddexp(top.energy, operand.energy + math.log(w))
            new = top._replace(energy=energy, size=size)
        elif op == "debias":
            p, q = np.exp(np.minimum(top.energy, operand.energy)), np.exp(operand.energy)
            energy = np.where(top.energy == -np.inf, -np.inf, top.energy + w * np.minimum(p - q, 0))
            new = top._replace(
                energy=energy, size=top.size + w * (p * (1 + top.size) + q * (1 + operand.size))
            )
        elif op == "pop_gate":
            is_open = top.energy >= 0
            decided &= (abs(top.energy) > 2 * TOLERANCE * top.size) | (top.size == 0)
            new = Value(*(np.where(is_open, a, 0.0) for a in scaled[:4]), decided)
        else:
            wins = scaled.energy > top.energy if op.endswith("max") else scaled.energy < top.energy
            size, size_n = np.maximum(scaled.size, top.size), np.maximum(scaled.size_n, top.size_n)
            far = abs(scaled.energy - top.energy) > 2 * TOLERANCE * size
            decided &= far | (scaled.n == top.n) | (scaled.energy == top.energy) & (top.energy == -np.inf)
            energy, n = (np.where(wins, b, a) for a, b in zip(top[:2], scaled[:2], strict=True))
            new = Value(energy, n, size, size_n, decided)
        stack.append(new)
    return stack[0]


class Mask(NamedTuple):
    kept: Array  # bool [V]
    margin: float  # how far the nearest token is from being on the other side


def top_k(row: Array, k: int) -> Mask:
    ordered = sorted(row, reverse=True)
    threshold = ordered[min(k, len(row)) - 1]
    below = [x for x in ordered if x < threshold]
    return Mask(row >= threshold, threshold - below[0] if below and below[0] > -np.inf else np.inf)


def top_p(row: Array, p: float) -> Mask:
    probabilities = np.exp(row - log_sum_exp(row))
    kept, mass, margin = np.zeros(len(row), bool), 0.0, np.inf
    order = sorted(range(len(row)), key=lambda x: (-row[x], x))
    for at, token in enumerate(order):
        kept[token] = at == 0 or mass < p or p == 1
        if at > 0 and p < 1 and row[token] > -np.inf:
            margin = min(margin, abs(mass - p))
            if kept[order[at - 1]] and not kept[token]:  # a tie at the edge may go either way when rounded
                margin = min(margin, row[order[at - 1]] - row[token])
        mass += probabilities[token]
    return Mask(kept, margin)


def plausible(row: Array, alpha: float) -> Mask:
    distance = row - (row.max() + math.log(alpha)) if row.max() > -np.inf else np.zeros(len(row))
    return Mask(distance >= 0, abs(distance[distance > -np.inf]).min(initial=np.inf) if alpha < 1 else np.inf)


def kl_indicator(
    rows: Array, constraint: Array, divergence: float, include_max: bool, minimize: bool, k: int
) -> Mask:
    """One token after the other, in extended precision where the machine has it."""
    e, size = np.longdouble(1e-12), len(rows)
    ps, qs = (_softmax(np.longdouble(row)) for row in (rows, constraint))
    d = [np.longdouble(0) if p == 0 else p * (np.log(p) - np.log(q)) for p, q in zip(ps, qs, strict=True)]
    kl = sum(d)
    changes = []
    for x in range(size):
        not_p, not_q, others = (sum(v[y] for y in range(size) if y != x) for v in (ps, qs, d))
        z = np.log((not_q + e) / (not_p + e)) + (1 + e) / (not_p + e) * others
        change = kl - z if minimize else z - kl
        changes.append(-np.inf if np.isnan(change) else float(change))
    change = np.array(changes)
    kept, margin = change > divergence, np.inf
    near = abs(change - divergence) / (1 + abs(change) + abs(float(kl)))
    margin = min(margin, near[np.isfinite(near)].min(initial=np.inf))
    if k:
        best = top_k(change, k)
        kept &= best.kept
        margin = min(margin, best.margin / (1 + abs(float(kl))))
    if include_max:
        kept &= ps < qs
        apart = abs(ps - qs)[(ps > 0) | (qs > 0)]
        margin = min(margin, float(apart.min(initial=np.inf)) * 1e3)
    return Mask(kept, margin)


def _softmax(row: Array) -> Array:
    return (
        np.exp(row - row.max()) / np.exp(row - row.max()).sum() if row.max() > -np.inf else np.zeros_like(row)
    )


class Result(NamedTuple):
    row: Array  # [V] energies
    margin: float  # of the closest decision that a filter took


def pipeline(formula: Pipeline, rows: Array, external: dict[int, Array]) -> Result:
    """rows float64 [n_terms, V]; `external` has the row of every external stage."""
    rows, margin = list(rows), np.inf
    with np.errstate(all="ignore"):
        for s, stage in enumerate(formula.stages):
            if stage.kind == "external":
                rows.append(external[s])
                continue
            if stage.kind in ("plausible", "kl_indicator"):
                seen = [rows[leaf] for leaf in stage.sources]
                mask = globals()[stage.kind](*seen, *stage.parameters)
                rows.append(np.where(mask.kept, 0.0, -np.inf if stage.kind == "plausible" else -1.0))
                margin = min(margin, mask.margin)
                continue
            lse = np.array([log_sum_exp(row) for row in rows])
            value = run(stage.program, np.array(rows), lse)
            row, decided = value.energy, value.decided
            margin = min(margin, np.inf if decided.all() else 0.0)
            if stage.kind in ("top_k", "top_p"):
                mask = globals()[stage.kind](row, *stage.parameters)
                row, margin = np.where(mask.kept, row, -np.inf), min(margin, mask.margin)
            rows.append(row)
    return Result(rows[-1], margin)

"""How much each term has to do with a token: the formula's energy at it, term by term.

Where a formula is made of sums, products with numbers, unions and intersections, its energy at a token x is
a weighted sum of the terms' log-probabilities at x, in which a union or intersection counts its winner
there.  Each summand, divided by the formula's weight N at x where that is normalised, is a contribution:

    E(x) / N(x)  =  sum over terms of  c_i(x) * log Q_i(x) / N(x)  +  what the formula's numbers add

Other operators, those that look at all tokens or mix probabilities, have no such sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from vllm_marith.language import Formula
from vllm_marith.language.nodes import Intersection, Leaf, Node, Number, Scale, Sum, Union


class _Value(NamedTuple):
    """A node at one token: energy, weight, and the terms' coefficients in the energy."""

    energy: float
    weight: float
    coefficients: Counter[str]


class _NoSumError(Exception):
    """The node's energy is no weighted sum of terms."""


def contributions(formula: Formula, logprobs: Mapping[str, float]) -> dict[str, float] | None:
    """Term -> contribution to the formula's energy at one token; None where there is no such sum.

    Args:
        logprobs: term -> log Q of the token.  A term without one does not count (its weights cancel).
    """
    try:
        value = _at(formula.root, logprobs)
    except _NoSumError:
        return None
    weight = value.weight if formula.normalize == "sum" else 1.0
    return {
        name: _times(value.coefficients[name] / weight, logprob)
        for name, logprob in logprobs.items()
        if name in value.coefficients
    }


def _at(node: Node, logprobs: Mapping[str, float]) -> _Value:
    match node:
        case Number(value=number):
            return _Value(number, number, Counter())
        case Leaf(name=name) if name in logprobs and not getattr(node, "classifier", ""):
            return _Value(logprobs[name], 1.0, Counter({name: 1.0}))
        case Scale(factor=factor, operand=operand):
            inner = _at(operand, logprobs)
            scaled = Counter({name: factor * c for name, c in inner.coefficients.items()})
            return _Value(_times(factor, inner.energy), factor * inner.weight, scaled)
        case Sum(operands=operands):
            values = [_at(operand, logprobs) for operand in operands]
            total: Counter[str] = Counter()
            for value in values:
                for name, coefficient in value.coefficients.items():
                    total[name] += coefficient
            forbidden = any(value.energy == -math.inf for value in values)
            energy = -math.inf if forbidden else math.fsum(value.energy for value in values)
            return _Value(energy, math.fsum(value.weight for value in values), total)
        case Union(operands=operands):
            return max((_at(operand, logprobs) for operand in operands), key=lambda value: value.energy)
        case Intersection(operands=operands):
            return min((_at(operand, logprobs) for operand in operands), key=lambda value: value.energy)
        case _:
            raise _NoSumError


def _times(factor: float, energy: float) -> float:
    """-inf stays -inf under any weight but zero, which drops what it weighs."""
    if factor == 0:
        return 0.0
    return -math.inf if energy == -math.inf else factor * energy

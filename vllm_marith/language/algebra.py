"""Laws that simplify a tree, and bounds on its weight N and on its energy E.

`simplify` gives the form in which a formula is evaluated and lowered:

    c*(a + b) = c*a + c*b          u*a + v*a = (u + v)*a          0*a = 0
    union(a, union(b, c)) = union(a, b, c)          union(a, a) = a          and the same for intersection
    superseded(a, b) = b

Merging is part of the meaning and not only an optimisation: a token that a term forbids (-inf) is forbidden
under any non-zero weight of that term, and `a - a + b` gives `a` the weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from vllm_marith.language.building import add, join, scale
from vllm_marith.language.nodes import (
    ONE,
    Dialled,
    Filtered,
    Gate,
    Intersection,
    KLIndicator,
    Leaf,
    Mixture,
    Node,
    Normalized,
    Number,
    Plausible,
    Scale,
    Schedule,
    SelfDebias,
    Sum,
    Superseded,
    Uniform,
    Union,
    mapped,
    walk,
)

# Weights that cancel to less than this part of their magnitudes were meant to cancel (0.3 - 0.1 - 0.2).
_CANCELLED: Final = 1e-12


def parts(node: Node) -> list[tuple[float, Node]]:
    """The node as a linear combination [(weight, base)], without simplifying; a number c is c times one."""
    match node:
        case Sum(operands):
            return [part for operand in operands for part in parts(operand)]
        case Scale(factor, operand):
            return [(factor, operand)]
        case Number(value):
            return [(value, ONE)]
        case _:
            return [(1.0, node)]


def simplify(node: Node) -> Node:
    """The tree after the laws above, everywhere.

    In the result a Scale never holds a Sum and never has the factor 0, and the operands of a sum, of a union
    and of an intersection are all different.  Order of first appearance is kept.
    """
    weights: dict[Node, list[float]] = {}
    _collect(node, 1.0, weights)
    terms = []
    for base, collected in weights.items():
        total = math.fsum(collected)
        if abs(total) > _CANCELLED * math.fsum(map(abs, collected)):
            terms.append(scale(total, base))
    return add(*terms)


def _collect(node: Node, factor: float, weights: dict[Node, list[float]]) -> None:
    """Add `factor * node` to the linear combination `weights`."""
    for weight, base in parts(node):
        total = factor * weight
        if total == 0.0:
            continue
        if isinstance(base, Sum):
            _collect(base, total, weights)
            continue
        for inner, simple in _simple_parts(base):
            weights.setdefault(simple, []).append(total * inner)


def _simple_parts(base: Node) -> list[tuple[float, Node]]:
    """A node that is no sum as a linear combination of simple ones."""
    match base:
        case Superseded(_, large):
            return parts(simplify(large))
        case Union(operands) | Intersection(operands):
            return parts(_simplify_join(type(base), operands))
        case Gate(condition, operand):
            simple = (
                mapped(condition, simplify) if isinstance(condition, KLIndicator) else simplify(condition)
            )
            return [(weight, Gate(simple, inner)) for weight, inner in _factored(simplify(operand))]
        case Dialled(dial, operand):
            return [(weight, Dialled(dial, inner)) for weight, inner in _factored(simplify(operand))]
        case _:
            return [(1.0, mapped(base, simplify))]


def _factored(simple: Node) -> list[tuple[float, Node]]:
    """A simple node as one factor times one node; nothing for 0."""
    if isinstance(simple, Sum):
        return [(1.0, simple)]
    return [(weight, base) for weight, base in parts(simple) if weight != 0.0]


def _simplify_join(kind: type[Union] | type[Intersection], operands: tuple[Node, ...]) -> Node:
    different: dict[Node, None] = {}
    for operand in map(simplify, operands):
        inner = operand.operands if isinstance(operand, kind) else (operand,)
        different.update(dict.fromkeys(inner))
    return next(iter(different)) if len(different) == 1 else join(kind, list(different))


def without_classifiers(root: Node) -> Node:
    """The formula whose most likely tokens its classifiers look at: each classifier's energy is 0 there.

    `root` is simple; it is itself where it has no classifier.
    """

    def silenced(node: Node) -> Node:
        return Number(0.0) if isinstance(node, Leaf) and node.classifier else mapped(node, silenced)

    return simplify(silenced(root)) if any(isinstance(n, Leaf) and n.classifier for n in walk(root)) else root


def positions(node: Node) -> list[int]:
    """Numbers of generated tokens at which a schedule in the tree changes; 0 is always one."""
    dials = [inner.dial for inner in walk(node) if isinstance(inner, Dialled)]
    starts = {start for dial in dials if isinstance(dial, Schedule) for start, _ in dial.points}
    return sorted({0} | starts)


def dial_range(node: Dialled, position: int) -> tuple[float, float]:
    """Smallest and largest factor of a dial at a position."""
    if isinstance(node.dial, Schedule):
        value = node.dial.at(position)
        return value, value
    return min(node.dial.low, node.dial.high), max(node.dial.low, node.dial.high)


def weight_range(node: Node, normalize: str, position: int = 0) -> tuple[float, float]:
    """Bounds (lo, hi) on N(x) over all tokens at a position, whatever the terms' distributions are.

    Interval arithmetic: a term weighs [1, 1], a sum adds, a factor multiplies, and a union, an intersection
    or a gate may take the N of any of its sides.  Depends on the formula alone, so that a formula that was
    accepted can never fail in the middle of a generation.
    """

    def inner(operand: Node) -> tuple[float, float]:
        return weight_range(operand, normalize, position)

    match node:
        case Leaf():
            return (0.0, 0.0) if node.classifier == "bayes" else (1.0, 1.0)
        case Uniform() | Normalized() | SelfDebias() | Mixture():
            return 1.0, 1.0
        case Number(value):
            return value, value
        case KLIndicator():
            return 0.0, 0.0
        case Scale(factor, operand):
            ends = [factor * end for end in inner(operand)]
            return min(ends), max(ends)
        case Dialled(_, operand):
            ends = [factor * end for factor in dial_range(node, position) for end in inner(operand)]
            return min(ends), max(ends)
        case Sum(operands):
            ranges = list(map(inner, operands))
            return math.fsum(lo for lo, _ in ranges), math.fsum(hi for _, hi in ranges)
        case Union(operands) | Intersection(operands):
            ranges = list(map(inner, operands))
            return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)
        case Gate(_, operand):
            lo, hi = inner(operand)
            return min(lo, 0.0), max(hi, 0.0)
        case Filtered(_, operand, _):
            return inner(operand) if normalize == "sum" else (1.0, 1.0)
        case Plausible(operand, _, _):
            return inner(operand)
        case Superseded(_, large):
            return inner(large)


def weight_bounds(node: Node, normalize: str) -> tuple[float, float]:
    """`weight_range` over all positions."""
    ranges = [weight_range(node, normalize, position) for position in positions(node)]
    return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)


def gain(node: Node, normalize: str) -> float:
    """Bound on |E(x)| for terms with |log Q(x)| <= 1: how much the formula amplifies its inputs."""

    def inner(operand: Node) -> float:
        return gain(operand, normalize)

    def distribution(operand: Node) -> float:
        """Of log softmax(E / N): as far again as the energies lie apart."""
        divisor = weight_bounds(operand, normalize)[0] if normalize == "sum" else 1.0
        return 2 * inner(operand) / divisor if divisor > 0 else math.inf

    match node:
        case Leaf() | Uniform() | KLIndicator():
            return 1.0
        case Number(value):
            return abs(value)
        case Scale(factor, operand):
            return abs(factor) * inner(operand)
        case Dialled(_, operand):
            ends = [end for position in positions(node) for end in dial_range(node, position)]
            return max(map(abs, ends)) * inner(operand)
        case Sum(operands):
            return sum(map(inner, operands))
        case Union(operands) | Intersection(operands):
            return max(map(inner, operands))
        case Gate(_, operand) | Plausible(operand, _, _) | Superseded(_, operand):
            return inner(operand)
        case Normalized(operand):
            return distribution(operand)
        case Filtered(_, operand, _):
            largest = weight_bounds(operand, normalize)[1] if normalize == "sum" else 1.0
            return largest * distribution(operand)
        case SelfDebias(operand, _, strength):
            return 2 * (distribution(operand) + strength)
        case Mixture(_, operands):
            return 2 * max(map(distribution, operands))


def distributions(node: Node) -> Iterator[Node]:
    """The operands anywhere in the tree that are read as distributions of their own."""
    for inner in walk(node):
        match inner:
            case Normalized(operand) | Filtered(_, operand, _):
                yield operand
            case Mixture(_, operands):
                yield from operands
            case SelfDebias(first, second, _) | KLIndicator(first, second):
                yield first
                yield second
            case Plausible(_, judge, _):
                yield judge

"""Laws that simplify a tree, and the range of its weight N.

`simplify` gives the form in which a formula is evaluated and lowered:

    c*(a + b) = c*a + c*b          u*a + v*a = (u + v)*a          0*a = 0
    union(a, union(b, c)) = union(a, b, c)          union(a, a) = a          and the same for intersection

Merging is part of the meaning and not only an optimisation: a token that a term forbids (-inf) is forbidden
under any non-zero weight of that term, and `a - a + b` gives `a` the weight 0.
"""

from __future__ import annotations

import math
from typing import Final

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.nodes import (
    Intersection,
    Leaf,
    Node,
    Number,
    Scale,
    Sum,
    Union,
    add,
    format_number,
    join,
    scale,
    to_text,
)

# A total weight N below this is a sum of weights that was meant to be 0: dividing by it gives noise.
SMALLEST_N: Final = 1e-9
# Weights that cancel to less than this part of their magnitudes were meant to cancel (0.3 - 0.1 - 0.2).
_CANCELLED: Final = 1e-12
# Largest factor by which a formula may amplify a log-probability.  Far beyond any method in use, and
# far enough from the largest float32 (3e38) that no backend can overflow to an infinity of the wrong sign.
LARGEST_GAIN: Final = 1e6

_ONE: Final = Number(1.0)


def parts(node: Node) -> list[tuple[float, Node]]:
    """The node as a linear combination [(weight, base)], without simplifying; a number c is c times one."""
    match node:
        case Sum(operands):
            return [part for operand in operands for part in parts(operand)]
        case Scale(factor, operand):
            return [(factor, operand)]
        case Number(value):
            return [(value, _ONE)]
        case _:
            return [(1.0, node)]


def simplify(node: Node) -> Node:
    """The tree after the laws above, everywhere.

    In the result a Scale holds a Leaf, a Union or an Intersection and never the factor 0, and the operands of
    a sum, of a union and of an intersection are all different.  Order of first appearance is kept.
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
        if factor * weight == 0.0:
            continue
        if isinstance(base, Sum):
            _collect(base, factor * weight, weights)
        elif isinstance(base, Union | Intersection):
            joined = _simplify_join(base)
            if isinstance(joined, type(base)):
                weights.setdefault(joined, []).append(factor * weight)
            else:  # all operands were the same one
                _collect(joined, factor * weight, weights)
        else:
            weights.setdefault(base, []).append(factor * weight)


def _simplify_join(node: Union | Intersection) -> Node:
    operands: list[Node] = []
    for operand in map(simplify, node.operands):
        operands.extend(operand.operands if isinstance(operand, type(node)) else (operand,))
    different = list(dict.fromkeys(operands))
    return different[0] if len(different) == 1 else join(type(node), different)


def weight_range(node: Node) -> tuple[float, float]:
    """Bounds (lo, hi) on N(x) over all tokens, whatever the terms' distributions are.

    Interval arithmetic: a term weighs [1, 1], a sum adds, a factor multiplies, and a union or an
    intersection may take the N of any operand.  Depends on the formula alone, so that a formula
    that was accepted can never fail in the middle of a generation.
    """
    match node:
        case Leaf():
            return 1.0, 1.0
        case Number(value):
            return value, value
        case Scale(factor, operand):
            ends = [factor * end for end in weight_range(operand)]
            return min(ends), max(ends)
        case Sum(operands):
            ranges = [weight_range(operand) for operand in operands]
            return math.fsum(lo for lo, _ in ranges), math.fsum(hi for _, hi in ranges)
        case Union(operands) | Intersection(operands):
            ranges = [weight_range(operand) for operand in operands]
            return min(lo for lo, _ in ranges), max(hi for _, hi in ranges)


def gain(node: Node) -> float:
    """Bound on |E(x)| for terms with |log Q(x)| <= 1: how much the formula amplifies its inputs."""
    match node:
        case Leaf():
            return 1.0
        case Number(value):
            return abs(value)
        case Scale(factor, operand):
            return abs(factor) * gain(operand)
        case Sum(operands):
            return sum(gain(operand) for operand in operands)
        case Union(operands) | Intersection(operands):
            return max(gain(operand) for operand in operands)


def check_weights(root: Node, normalize: str) -> None:
    """Refuse what no distribution can be made of: N(x) <= 0 under `normalize: sum`, and absurd weights.

    Raises:
        FormulaError: naming the weights.
    """
    simple = simplify(root)
    largest = gain(simple)
    if largest > LARGEST_GAIN:
        raise FormulaError(
            f"the weights amplify log-probabilities up to {largest:.3g} times; "
            f"{format_number(LARGEST_GAIN)} times is the most"
        )
    if normalize != "sum":
        return
    lo, hi = weight_range(simple)
    if lo >= SMALLEST_N:
        return
    weights = ", ".join(f"{_weight_text(part)}" for part in parts(simple) if part[0] != 0.0) or "none is left"
    found = (
        f"sum to {_rounded(lo)}"
        if math.isclose(lo, hi, abs_tol=1e-12)
        else (f"sum to as little as {_rounded(lo)} for some tokens")
    )
    raise FormulaError(
        f"the weights of the formula {found} ({weights}), and normalize: sum divides by that sum; "
        "give weights with a positive sum, or ask for normalize: none"
    )


def _weight_text(part: tuple[float, Node]) -> str:
    weight, base = part
    return f"{_rounded(weight)} for {'the number' if base == _ONE else to_text(base)}"


def _rounded(value: float) -> str:
    """A weight for a sentence: without the digits that only rounding put there."""
    return f"{0.0 if abs(value) < SMALLEST_N else value:.6g}"

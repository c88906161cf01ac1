"""Functions that build a formula's tree and keep it in canonical form; see `nodes` for what the nodes mean.

Every function raises `FormulaError` for operands that have no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.nodes import (
    ONE,
    Dial,
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
    Strength,
    Sum,
    Superseded,
    Union,
)
from vllm_marith.language.text import format_number

# No output is longer: a schedule's points are checked one by one.
_LAST_POSITION: Final = 1 << 24


def number(value: float) -> Number:
    """A Number; refuses infinities and NaN, which no rule of the tree could give a meaning to."""
    if not math.isfinite(value):
        raise FormulaError(f"the number {value!r} is not finite")
    return Number(value + 0.0)  # + 0.0 turns -0.0 into 0.0


def add(*nodes: Node) -> Node:
    """Sum of the nodes.  Sums of sums flatten; all numbers become one, where the first of them stood."""
    operands: list[Node] = []
    total, place = 0.0, None
    for node in nodes:
        for operand in node.operands if isinstance(node, Sum) else (node,):
            if isinstance(operand, Number):
                total += operand.value
                place = len(operands) if place is None else place
            else:
                operands.append(operand)
    if place is not None and total != 0.0:
        operands.insert(place, number(total))
    if not operands:
        return Number(0.0)
    return operands[0] if len(operands) == 1 else Sum(tuple(operands))


def scale(factor: float, node: Node) -> Node:
    """`factor * node`, with factors of factors multiplied out."""
    if isinstance(node, Number):
        return number(factor * node.value)
    if isinstance(node, Scale):
        return _scaled(factor * node.factor, node.operand)
    return _scaled(factor, node)


def divide(node: Node, divisor: float) -> Node:
    """`node / divisor`.  Divides an existing factor, so 2*a/3 has the factor 2/3 and not 2 * (1/3)."""
    if divisor == 0:
        raise FormulaError("a formula cannot be divided by zero")
    if isinstance(node, Number):
        return number(node.value / divisor)
    if isinstance(node, Scale):
        return _scaled(node.factor / divisor, node.operand)
    return _scaled(1.0 / divisor, node)


def is_factor(node: Node) -> bool:
    """Whether the node is a number, a dial, an indicator, or a product of these."""
    match node:
        case Number():
            return True
        case Scale(_, operand) | Dialled(_, operand) | Gate(_, operand):
            return is_factor(operand)
        case _:
            return False


def multiply(a: Node, b: Node) -> Node:
    """The product of two nodes, one of which must be a factor (`is_factor`)."""
    if not is_factor(a):
        a, b = b, a
    match a:
        case Number(value):
            return scale(value, b)
        case Scale(factor, operand) if is_factor(operand):
            return scale(factor, multiply(operand, b))
        case Dialled(dial, operand) if is_factor(operand):
            return dialled(dial, multiply(operand, b))
        case Gate(condition, operand) if is_factor(operand):
            return gate(condition, multiply(operand, b))
    raise FormulaError(
        "the product of two formulas has no meaning; one factor must be a number, an indicator(...), "
        "a schedule(...) or a strength(...)"
    )


def join(kind: type[Union] | type[Intersection], nodes: Sequence[Node]) -> Node:
    """Union or intersection of two or more nodes; of numbers alone it is a number."""
    if len(nodes) < 2:
        raise FormulaError(f"{function_name(kind)} needs at least two operands")
    numbers = [node.value for node in nodes if isinstance(node, Number)]
    if len(numbers) == len(nodes):
        return Number(max(numbers) if kind is Union else min(numbers))
    return kind(tuple(nodes))


def function_name(kind: type[Union] | type[Intersection]) -> str:
    """The word that the grammar has for a union or an intersection."""
    return "union" if kind is Union else "intersection"


def gate(condition: Node, operand: Node = ONE) -> Node:
    """`indicator(condition) * operand`."""
    factor, inner = _factored(operand)
    return Number(0.0) if factor == 0 and inner == ONE else _scaled(factor, Gate(condition, inner))


def dialled(dial: Dial, operand: Node = ONE) -> Node:
    """`dial * operand`."""
    factor, inner = _factored(operand)
    return Number(0.0) if factor == 0 and inner == ONE else _scaled(factor, Dialled(dial, inner))


def schedule(points: Sequence[tuple[float, float]]) -> Schedule:
    """The factor that has the value of the last (start, value) whose start has been reached."""
    if not points or points[0][0] != 0:
        raise FormulaError("the first position of schedule(...) must be 0, as in schedule(0: 1, 20: 0.5)")
    for (start, _), (following, _) in pairwise(points):
        if following <= start:
            raise FormulaError(
                f"the positions of schedule(...) must ascend; {format_number(following)} follows "
                f"{format_number(start)}"
            )
    checked = []
    for start, value in points:
        if start != int(start) or start > _LAST_POSITION:
            raise FormulaError(
                "a position of schedule(...) is a whole number of generated tokens, not "
                f"{format_number(start)}"
            )
        checked.append((int(start), number(value).value))
    return Schedule(tuple(checked))


def strength(classifier: Node, low: float = 0.0, high: float = 1.0) -> Strength:
    """The factor low + (high - low) p(y | text so far)."""
    if not isinstance(classifier, Leaf) or not classifier.classifier:
        raise FormulaError("strength(...) needs a term that has a 'classifier'")
    if low == high:
        raise FormulaError("the two bounds of strength(...) must differ; one weight is a number")
    return Strength(classifier, number(low).value, number(high).value)


def filtered(kind: Literal["topk", "topp"], operand: Node, parameter: float) -> Node:
    """`topk(operand, k)` or `topp(operand, p)`."""
    if kind == "topk" and (parameter < 1 or parameter != int(parameter) or parameter > 2**31 - 1):
        raise FormulaError(f"topk needs a whole number of at least 1, not {format_number(parameter)}")
    if kind == "topp" and not 0 < parameter <= 1:
        raise FormulaError(f"topp needs a probability above 0 and at most 1, not {format_number(parameter)}")
    return Filtered(kind, _formula(kind, operand), parameter)


def normalized(operand: Node) -> Node:
    """`normalize(operand)`."""
    return Normalized(_formula("normalize", operand))


def self_debias(operand: Node, biased: Node, by: float) -> Node:
    """`self_debias(operand, biased, by)`."""
    if by < 0:
        raise FormulaError(f"the strength of self_debias cannot be negative ({format_number(by)})")
    operands = _formula("self_debias", operand), _formula("self_debias", biased)
    return SelfDebias(*operands, number(by).value)


def mixture(pairs: Sequence[tuple[float, Node]]) -> Node:
    """`mixture(w: a, v: b, ...)`; an operand of weight 0 is left out."""
    for weight, _ in pairs:
        if weight < 0:
            raise FormulaError(
                "the weights of mixture(...) average probabilities and cannot be negative "
                f"({format_number(weight)})"
            )
    kept = [(number(weight).value, _formula("mixture", node)) for weight, node in pairs if weight != 0]
    if not kept:
        raise FormulaError("mixture(...) needs at least one operand with a positive weight")
    if len(kept) == 1:
        return Normalized(kept[0][1])
    return Mixture(tuple(weight for weight, _ in kept), tuple(node for _, node in kept))


def plausible(operand: Node, judge: Node, alpha: float) -> Node:
    """`plausible(operand, judge, alpha)`."""
    if not 0 < alpha <= 1:
        raise FormulaError(
            "plausible needs a share of the largest probability, above 0 and at most 1, not "
            f"{format_number(alpha)}"
        )
    return Plausible(operand, _formula("plausible", judge), number(alpha).value)


def superseded(small: Node, large: Node) -> Node:
    """`superseded(small, large)`."""
    return Superseded(_formula("superseded", small), _formula("superseded", large))


def kl_indicator(
    p: Node,
    q: Node,
    divergence: float = 0.0,
    top_k: float = 0,
    include_max: float = 1,
    minimize: float = 1,
) -> Node:
    """`kl_indicator(p, q, divergence, top_k, include_max, minimize)`, a factor."""
    if top_k < 0 or top_k != int(top_k) or top_k > 2**31 - 1:
        raise FormulaError(f"kl_indicator's top_k is a whole number, 0 for all, not {format_number(top_k)}")
    for name, value in (("include_max", include_max), ("minimize", minimize)):
        if value not in (0, 1):
            raise FormulaError(f"kl_indicator's {name} is 0 or 1, not {format_number(value)}")
    operands = _formula("kl_indicator", p), _formula("kl_indicator", q)
    least = number(divergence).value
    return Gate(KLIndicator(*operands, least, int(top_k), bool(include_max), bool(minimize)), ONE)


def _scaled(factor: float, node: Node) -> Node:
    factor = number(factor).value
    return node if factor == 1.0 else Scale(factor, node)


def _factored(node: Node) -> tuple[float, Node]:
    """The node as a number times what has none in front."""
    if isinstance(node, Number):
        return node.value, ONE
    return (node.factor, node.operand) if isinstance(node, Scale) else (1.0, node)


def _formula(function: str, node: Node) -> Node:
    """`node`, if it can be a distribution: a number is none, nor is a product of factors."""
    if is_factor(node):
        raise FormulaError(f"{function}(...) needs a formula with at least one term there, not a number")
    return node

"""The grammar's functions, for Python's formulas and for the parser.

topk(Term("You are a child."), 10) + 0.5 * uniform
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm_marith.language import building
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula, Operand, combine
from vllm_marith.language.nodes import Intersection, Node, Number, Uniform, Union

uniform: Final = Formula(Uniform(), {})
"""The uniform distribution: log Q = -log V, N = 1."""


def union(*operands: Operand) -> Formula:
    """Token-wise maximum of two or more operands: what any of them calls likely.

    softmax(max(log Q1, log Q2)) minimises KL^[Q1>Q2](P||Q1) + KL^[Q2>=Q1](P||Q2) over P (the paper's union,
    which is binary; this one takes any number).
    """
    return _call("union", operands)


def intersection(*operands: Operand) -> Formula:
    """Token-wise minimum of two or more operands: what all of them call likely."""
    return _call("intersection", operands)


def indicator(condition: Operand) -> Formula:
    """The factor that is 1 for tokens with E >= 0 and 0 for the others: `indicator(a - b) * (a - b)`."""
    return _call("indicator", [condition])


def kl_indicator(
    p: Operand,
    q: Operand,
    divergence: float = 0.0,
    *,
    top_k: int = 0,
    include_max: bool = True,
    minimize: bool = True,
) -> Formula:
    """The factor that is 1 for tokens whose removal from p brings it nearer to q, see `nodes.KLIndicator`."""
    return _call("kl_indicator", [p, q, divergence, top_k, int(include_max), int(minimize)])


def normalize(operand: Operand) -> Formula:
    """A formula as a distribution of its own: log P with N = 1."""
    return _call("normalize", [operand])


def topk(operand: Operand, k: int) -> Formula:
    """A formula's distribution on its k most likely tokens, renormalised, with its weight N."""
    return _call("topk", [operand, k])


def topp(operand: Operand, p: float) -> Formula:
    """A formula's distribution on its most likely tokens of mass p, renormalised, with its weight N."""
    return _call("topp", [operand, p])


def superseded(small: Operand, large: Operand) -> Formula:
    """The value of `large`; `small` may draft for it in speculative sampling."""
    return _call("superseded", [small, large])


def self_debias(operand: Operand, biased: Operand, strength: float) -> Formula:
    """log softmax(log P_a + strength min(P_a - P_b, 0)): self-debiasing as the reference has it."""
    return _call("self_debias", [operand, biased, strength])


def plausible(operand: Operand, judge: Operand, alpha: float) -> Formula:
    """`operand` on the tokens to which `judge` gives at least alpha times its largest probability."""
    return _call("plausible", [operand, judge, alpha])


def mixture(*pairs: tuple[float, Operand]) -> Formula:
    """Weighted average of probabilities: `mixture((0.5, a), (0.5, b))`."""
    weights = [weight for weight, _ in pairs]
    return _build(
        lambda *nodes: building.mixture(list(zip(weights, nodes, strict=True))), [node for _, node in pairs]
    )


def schedule(points: Mapping[int, float]) -> Formula:
    """A factor by position: `schedule({0: 1.0, 20: 0.5}) * term` halves after 20 generated tokens."""
    return Formula(building.dialled(building.schedule(list(points.items()))), {})


def strength(classifier: Operand, low: float = 0.0, high: float = 1.0) -> Formula:
    """A factor by a classifier of the text so far: low + (high - low) p(y | text)."""
    return _call("strength", [classifier, low, high])


@dataclass(frozen=True, slots=True)
class Pair:
    """`key: value` in a function's parentheses."""

    key: Node
    value: Node


Argument = Node | Pair
Build = Callable[..., Node]
# Function -> (how many formulas it takes first, how many numbers after them at least, and at most, builder).
_FIXED: Final[dict[str, tuple[int, int, int, Build]]] = {
    "indicator": (1, 0, 0, building.gate),
    "kl_indicator": (2, 0, 4, building.kl_indicator),
    "normalize": (1, 0, 0, building.normalized),
    "topk": (1, 1, 1, lambda a, k: building.filtered("topk", a, k)),
    "topp": (1, 1, 1, lambda a, p: building.filtered("topp", a, p)),
    "superseded": (2, 0, 0, building.superseded),
    "self_debias": (2, 1, 1, building.self_debias),
    "plausible": (2, 1, 1, building.plausible),
    "strength": (1, 0, 2, lambda c, *bounds: building.dialled(building.strength(c, *bounds))),
}
_JOINS: Final[dict[str, type[Union] | type[Intersection]]] = {
    "union": Union,
    "max": Union,
    "intersection": Intersection,
    "min": Intersection,
}


def apply(function: str, arguments: Sequence[Argument]) -> Node:
    """The tree of `function(arguments)`.

    Raises:
        FormulaError: wrong arguments, or operands that have no meaning there.
    """
    if function in ("mixture", "schedule"):
        return _apply_to_pairs(function, arguments)
    nodes = [argument for argument in arguments if not isinstance(argument, Pair)]
    if len(nodes) < len(arguments):
        raise FormulaError(
            f"{function}(...) has no 'weight: operand' pairs; they belong to mixture and schedule"
        )
    if function in _JOINS:
        return building.join(_JOINS[function], nodes)
    formulas, least, most, build = _FIXED[function]
    if not formulas + least <= len(nodes) <= formulas + most:
        raise FormulaError(f"{function} takes {_expected(formulas, least, most)}, not {len(nodes)} operands")
    numbers = [_number(function, node) for node in nodes[formulas:]]
    return build(*nodes[:formulas], *numbers)


def _apply_to_pairs(function: str, arguments: Sequence[Argument]) -> Node:
    example = "mixture(0.5: a, 0.5: b)" if function == "mixture" else "schedule(0: 1, 20: 0.5)"
    pairs = []
    for argument in arguments:
        if not isinstance(argument, Pair):
            raise FormulaError(f"{function}(...) takes pairs, as in {example}")
        pairs.append((_number(function, argument.key), argument.value))
    if function == "mixture":
        return building.mixture(pairs)
    points = [(key, _number(function, value)) for key, value in pairs]
    return building.dialled(building.schedule(points))


def _number(function: str, node: Node) -> float:
    if not isinstance(node, Number):
        raise FormulaError(f"{function}(...) needs a number there, not a formula")
    return node.value


def _expected(formulas: int, least: int, most: int) -> str:
    told = "one formula" if formulas == 1 else f"{formulas} formulas"
    if most == 0:
        return told
    numbers = f"{least}" if least == most else f"{least} to {most}"
    return f"{told} and {numbers} number{'s' if most > 1 else ''}"


def _call(function: str, operands: Sequence[Any]) -> Formula:
    return _build(lambda *nodes: apply(function, nodes), operands)


def _build(build: Build, operands: Sequence[Any]) -> Formula:
    formula = combine(build, *operands)
    if formula is NotImplemented:
        raise FormulaError("the operands of a function must be terms, formulas or numbers")
    return formula

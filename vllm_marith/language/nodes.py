"""The tree of a formula: immutable nodes, and the constructors that keep it in canonical form.

A node has two values per token x (paper, Theorem 1): an energy E(x) and a weight N(x).

    Leaf(name)            E = log Q_name(x)              N = 1
    Number(c)             E = c                          N = c
    Sum(a, b, ...)        E = E_a + E_b + ...            N = N_a + N_b + ...
    Scale(c, a)           E = c E_a                      N = c N_a
    Union(a, b, ...)      E = max(E_a, E_b, ...)         N = N of the winner, the first one on a tie
    Intersection(...)     E = min(E_a, E_b, ...)         N = N of the winner, the first one on a tie

Build trees with `add`, `scale`, `divide`, `join` and not with the classes: the constructors fold numbers and
flatten sums, so that Python's operators and the parser arrive at one tree for one formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_marith.language.errors import FormulaError


@dataclass(frozen=True, slots=True)
class Number:
    """A number standing as an operand.  Finite; never -0.0."""

    value: float


@dataclass(frozen=True, slots=True)
class Leaf:
    """A term, by the name it has in its formula."""

    name: str


@dataclass(frozen=True, slots=True)
class Scale:
    """`factor` times `operand`, which is neither a Number nor a Scale.

    The factor is never 1.  It may be 0: `0*base + child` has no energy from `base`, yet `base` is its leader.
    """

    factor: float
    operand: Node


@dataclass(frozen=True, slots=True)
class Sum:
    """Two or more operands, none of them a Sum, at most one of them a Number, and that one not 0."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Union:
    """Token-wise maximum of two or more operands, not all of them Numbers."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Intersection:
    """Token-wise minimum of two or more operands, not all of them Numbers."""

    operands: tuple[Node, ...]


Node = Number | Leaf | Scale | Sum | Union | Intersection


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


def _scaled(factor: float, node: Node) -> Node:
    factor = number(factor).value
    return node if factor == 1.0 else Scale(factor, node)


def children(node: Node) -> tuple[Node, ...]:
    """A node's operands, in the order they were written."""
    match node:
        case Scale(_, operand):
            return (operand,)
        case Sum(operands) | Union(operands) | Intersection(operands):
            return operands
        case _:
            return ()


def leaf_names(node: Node) -> Iterator[str]:
    """Names of the leaves from left to right, repeats included."""
    if isinstance(node, Leaf):
        yield node.name
    for child in children(node):
        yield from leaf_names(child)


def rename(node: Node, names: dict[str, str]) -> Node:
    """The same tree with every leaf's name looked up in `names`."""
    match node:
        case Leaf(name):
            return Leaf(names[name])
        case Scale(factor, operand):
            return Scale(factor, rename(operand, names))
        case Sum(operands) | Union(operands) | Intersection(operands):
            return type(node)(tuple(rename(operand, names) for operand in operands))
        case _:
            return node


def size(node: Node) -> int:
    """Terms, numbers and operators; a factor belongs to what it scales and does not count."""
    own = 0 if isinstance(node, Scale) else 1
    return own + sum(size(child) for child in children(node))


def nesting(node: Node) -> int:
    """Nested parentheses and calls in `to_text(node)`."""
    inner = max((nesting(child) for child in children(node)), default=0)
    opens = isinstance(node, Union | Intersection) or (
        isinstance(node, Scale) and isinstance(node.operand, Sum)
    )
    return inner + 1 if opens else inner


def format_number(value: float) -> str:
    """The shortest text that reads back as the same float; whole numbers without a point."""
    text = repr(value)
    return text[:-2] if text.endswith(".0") else text


def to_text(node: Node) -> str:
    """The formula as text; parsing it gives the same tree back."""
    match node:
        case Number(value):
            return format_number(value)
        case Leaf(name):
            return name
        case Scale(factor, operand):
            inner = f"({to_text(operand)})" if isinstance(operand, Sum) else to_text(operand)
            return f"-{inner}" if factor == -1.0 else f"{format_number(factor)}*{inner}"
        case Sum(operands):
            text = to_text(operands[0])
            for operand in operands[1:]:
                following = to_text(operand)
                # A text that starts with a minus is a negative factor or number: a - 0.6*b.
                text += f" - {following[1:]}" if following.startswith("-") else f" + {following}"
            return text
        case Union(operands) | Intersection(operands):
            return f"{function_name(type(node))}({', '.join(to_text(operand) for operand in operands)})"

"""Formula -> program: what a worker does for each row of logits, as plain data.

A program is a list of instructions (op, term, weight) for a small stack machine whose slots hold, for every
token, an energy E and, only where the plan divides, a weight N:

    push       new slot:  E = weight * log Q_term,  N = weight
    add        top slot:  E += weight * log Q_term,  N += weight
    max, min   top slot:  E = max(E, weight * log Q_term);  N is that of the winner, the slot's own on a tie
    scale      top slot:  E *= weight,  N *= weight
    pop_add, pop_max, pop_min
               a = pop the top slot, then as add, max, min with weight * a

For push, add, max and min the term -1 is the number one: E = 1, N = 1.  The others read no term; theirs is
always -1.  No multiplication turns -inf into anything else, whatever the weight's sign.  The first
instruction is a push, and exactly one slot remains at the end.

The result is P = softmax(E), or softmax(E / N) where the plan divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vllm_marith.language.algebra import parts, simplify, weight_range
from vllm_marith.language.expression import Formula
from vllm_marith.language.nodes import (
    Intersection,
    Leaf,
    Node,
    Number,
    Scale,
    Sum,
    Union,
    add,
    divide,
    join,
    leaf_names,
    scale,
)

Instruction = tuple[str, int, float]

# Term index of the number one, and of the instructions that read no term.
NO_TERM: Final = -1
# Bounds on N this close differ by rounding only: N is the same for every token.
_CONSTANT: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Plan:
    """A formula ready to run.  Plain data: it is pickled, and read by packages that know nothing of this one.

    Attributes:
        terms: names, leader first, the others in order of first appearance.  A term whose weights cancel is
            left out; the leader stays, because its tokens are what the client sees.
        instructions: the program; term indices point into `terms`.
        depth: largest number of slots in use at once.
        linear: no max or min.  Then E needs only the logits: a row's log-sum-exp is a constant that cancels.
        divide: E must be divided by N per token.  Only nonlinear formulas under normalize "sum" whose N is
            not the same for all tokens; everywhere else 1/N is in the weights already.
        weight: (lowest, highest) N of the formula as written, before any 1/N.
    """

    terms: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    depth: int
    linear: bool
    divide: bool
    weight: tuple[float, float]


def lower(formula: Formula) -> Plan:
    """The plan of a formula.

    Raises:
        FormulaError: the formula defines no distribution (`Formula.check`).
    """
    formula.check()
    root = simplify(formula.root)
    lo, hi = weight_range(root)
    divides = formula.normalize == "sum" and hi - lo > _CONSTANT * max(abs(lo), abs(hi))
    if not divides:
        root = _without_numbers(root)
        root = _distribute(divide(root, lo) if formula.normalize == "sum" else root)
    live = set(leaf_names(root))
    terms = tuple(name for name in formula.terms if name in live or name == formula.leader)
    compiler = _Compiler({name: index for index, name in enumerate(terms)}, keep_order=divides)
    compiler.push(root)
    return Plan(
        terms=terms,
        instructions=tuple(compiler.instructions),
        depth=compiler.deepest,
        linear=not any(op.endswith(("max", "min")) for op, _, _ in compiler.instructions),
        divide=divides,
        weight=(lo, hi),
    )


def _without_numbers(root: Node) -> Node:
    """The top-level sum without its number: a constant in E, which softmax does not see."""
    if isinstance(root, Sum):
        return add(*(operand for operand in root.operands if not isinstance(operand, Number)))
    return Number(0.0) if isinstance(root, Number) else root


def _distribute(node: Node, factor: float = 1.0) -> Node:
    """`factor * node` with positive factors moved into unions and intersections, where they cost nothing.

    c*max(a, b) = max(c*a, c*b) for c > 0.  For c < 0 it would be a min, which treats -inf differently.
    Only for plans that do not divide: a product rounded differently may decide a tie, and N, differently.
    """
    match node:
        case Sum(operands):
            return add(*(_distribute(operand, factor) for operand in operands))
        case Scale(inner, operand):
            return _distribute(operand, factor * inner)
        case Union(operands) | Intersection(operands) if factor > 0:
            return join(type(node), [_distribute(operand, factor) for operand in operands])
        case Union(operands) | Intersection(operands):
            return scale(factor, join(type(node), [_distribute(operand) for operand in operands]))
        case _:
            return scale(factor, node)


class _Compiler:
    """Emits the instructions of a simplified tree and counts the slots they use."""

    def __init__(self, indices: dict[str, int], keep_order: bool) -> None:
        self.instructions: list[Instruction] = []
        self.deepest = 0
        self._slots = 0
        self._indices = indices
        # Where N depends on who wins, the first of equal operands must stay the first.
        self._keep_order = keep_order

    def push(self, node: Node) -> None:
        """Leave the node's value in a new slot."""
        match node:
            case Union(operands):
                self._combine("max", [_weighted(operand) for operand in operands], self._keep_order)
            case Intersection(operands):
                self._combine("min", [_weighted(operand) for operand in operands], self._keep_order)
            case Sum():
                self._combine("add", parts(node), keep_order=False)
            case _:
                self._combine("add", parts(node), keep_order=True)

    def _combine(self, op: str, operands: list[tuple[float, Node]], keep_order: bool) -> None:
        # The operand that needs most slots goes first, while no other result has to be kept.
        ordered = operands if keep_order else sorted(operands, key=lambda operand: -_slots(operand[1]))
        (weight, first), *others = ordered
        if _is_leaf(first):
            self._emit("push", self._term(first), weight, slots=1)
        else:
            self.push(first)
            if weight != 1.0:
                self._emit("scale", NO_TERM, weight)
        for weight, other in others:
            if _is_leaf(other):
                self._emit(op, self._term(other), weight)
            else:
                self.push(other)
                self._emit(f"pop_{op}", NO_TERM, weight, slots=-1)

    def _emit(self, op: str, term: int, weight: float, slots: int = 0) -> None:
        self.instructions.append((op, term, weight))
        self._slots += slots
        self.deepest = max(self.deepest, self._slots)

    def _term(self, leaf: Node) -> int:
        return self._indices[leaf.name] if isinstance(leaf, Leaf) else NO_TERM


def _is_leaf(base: Node) -> bool:
    return isinstance(base, Leaf | Number)


def _weighted(operand: Node) -> tuple[float, Node]:
    """An operand of a union as (weight, base); a sum is a base of its own here."""
    return (1.0, operand) if isinstance(operand, Sum) else parts(operand)[0]


def _slots(node: Node) -> int:
    """Slots that `push` needs for a node; 0 for what one instruction combines without a slot of its own."""
    if _is_leaf(node):
        return 0
    match node:
        case Scale(_, operand):
            return max(1, _slots(operand))
        case Sum(operands) | Union(operands) | Intersection(operands):
            needed = sorted((_slots(_weighted(operand)[1]) for operand in operands), reverse=True)
            return max(needed[0], 1, *(1 + other for other in needed[1:]))
        case _:
            return 1

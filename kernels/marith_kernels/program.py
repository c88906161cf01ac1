"""A formula as a flat program.

A *program* works on a small stack. Each slot holds two values for every token of the vocabulary, as every
node of a formula does: an energy E and a weight N.

    leaf(t), t >= 0     E = log Q_t, log-probabilities of term t,  N = 1
                        E = the row as it is,                      N = 0          t in `weightless`
    leaf(-1)            E = 1,                                     N = 1          the number one
    leaf(-2)            E = -ln(size of the vocabulary),           N = 1          the uniform distribution

    push      t  w      new slot            := w * leaf(t)
    add       t  w      top                 := top + w * leaf(t)
    max, min  t  w      top                 := whichever of top and w * leaf(t) has the larger (smaller) E
    logadd    t  w      E of top            := ln(exp(E) + w * Q_t),                  w > 0
    debias    t  w      E of top            := E + w * min(exp(E) - Q_t, 0),          w >= 0
    scale     -  w      top                 := w * top
    pop_add   -  w      a = pop;  top       := top + w * a
    pop_max, pop_min    a = pop;  top       := whichever of top and w * a has the larger (smaller) E
    pop_gate  -  w      a = pop;  top       := w * a where E of top >= 0, else 0

The winner of a max or min takes its N along; on equal E the older operand (`top`) wins. logadd and debias
leave N as it is and read no number; there Q_t = exp(E of the leaf). At the end one slot is left, and the
energy of the group is E / N with `divide`, else E.

An energy of -inf stays -inf under every weight but 0, which drops the operand. logadd of two -inf is -inf,
debias leaves -inf alone, and a closed gate hides the operand's -inf.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

LEAF_OPS = ("add", "max", "min", "logadd", "debias", "push")  # they read a leaf
OPS = (*LEAF_OPS, "pop_add", "pop_max", "pop_min", "pop_gate", "scale")
ADD, MAX, MIN, LOGADD, DEBIAS, PUSH, POP_ADD, POP_MAX, POP_MIN, POP_GATE, SCALE = range(11)
OP_BITS = 15  # of an encoded operation: its number
WEIGHTLESS = 16  # of an encoded operation: its leaf is weightless
NUMBER = -1  # the leaf that is one for every token
UNIFORM = -2  # the leaf that is the uniform distribution
MAX_DEPTH = 32  # stack slots that every backend can hold

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class Instruction(NamedTuple):
    op: str  # one of OPS
    term: int  # leaf of LEAF_OPS; ignored by the others
    weight: float


class Program:
    """One formula, checked and encoded once; see the module's docstring for what the instructions mean.

    depth: stack slots in use at once, at least 1.
    linear: nothing but push, add, scale and pop_add. Such a program is encoded as a plain weighted sum of
    rows, with 1 / N folded into the weights. It works on raw logits, where the uniform distribution is a row
    of zeros and so is left out but for its N.
    divide: the energy is E / N token by token.
    weightless: leaves that are energies and not distributions, ascending.
    n_terms: terms that a group must bring; one more than the highest leaf.

    Programs of the same instructions are equal.

    Raises ValueError for an unknown operation, a weight that float32 cannot hold or that the operation does
    not take, a leaf below -2 or that the operation cannot read, an operation on an empty stack, more than
    MAX_DEPTH slots, anything but one slot at the end, or a linear program to be divided whose weights do not
    sum to a positive number.
    """

    __slots__ = ("depth", "divide", "encoded", "extended", "instructions", "linear", "n_terms", "weightless")

    def __init__(
        self,
        instructions: Sequence[tuple[str, int, float]],
        *,
        divide: bool = False,
        weightless: Collection[int] = (),
    ):
        self.instructions = tuple(Instruction(op, int(term), float(w)) for op, term, w in instructions)
        self.depth = _check_stack(self.instructions)
        self.weightless = tuple(sorted({int(t) for t in weightless}))
        if self.weightless and self.weightless[0] < 0:
            raise ValueError(f"Only terms (0, 1, ...) can be weightless, not leaf {self.weightless[0]}.")
        self.n_terms = max(max(i.term for i in self.instructions if i.op in LEAF_OPS) + 1, 0)
        self.linear = all(i.op in ("push", "add", "scale", "pop_add") for i in self.instructions)
        self.divide = divide
        code = self._weighted_sum() if self.linear else self._stack_code()
        # int32 [3, n_instructions]: operation, term, bits of the float32 weight
        self.encoded = np.empty((3, len(code)), np.int32)
        self.encoded[0] = [op for op, _, _ in code]
        self.encoded[1] = [term for _, term, _ in code]
        self.encoded[2] = np.array([w for _, _, w in code], np.float32).view(np.int32)
        # logadd, debias, pop_gate, UNIFORM or weightless leaves
        rare = (LOGADD, DEBIAS, POP_GATE)
        self.extended = any(
            op & OP_BITS in rare or op & WEIGHTLESS != 0 or term == UNIFORM for op, term, _ in code
        )

    def __repr__(self) -> str:
        steps = "; ".join(f"{i.op} {i.term} {i.weight:g}" for i in self.instructions)
        weightless = f"; weightless {', '.join(map(str, self.weightless))}" if self.weightless else ""
        return f"Program({steps}{'; divide' if self.divide else ''}{weightless})"

    def _key(self) -> tuple[object, ...]:
        return self.instructions, self.divide, self.weightless

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Program) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _stack_code(self) -> list[tuple[int, int, float]]:
        """Operation numbers; a leaf of weight 0 becomes the number 0, so that its -inf cannot ban a token."""
        code = []
        for op, term, weight in self.instructions:
            if op == "debias" and weight == 0:
                continue
            number = OPS.index(op)
            if op not in LEAF_OPS or weight == 0:
                term = NUMBER
            if term in self.weightless:
                number |= WEIGHTLESS
            code.append((number, term, weight))
        return code

    def _weighted_sum(self) -> list[tuple[int, int, float]]:
        """The same sum without a stack: a push and adds, in the order of the terms' appearance.

        A term that appears twice stays twice, whatever the sum of its weights: its -inf bans in either.
        """
        stack: list[list[tuple[int, float]]] = []
        for op, term, weight in self.instructions:
            if op == "push":
                stack.append([(term, weight)])
            elif op == "add":
                stack[-1].append((term, weight))
            else:  # scale, pop_add
                scaled = [(t, w * weight) for t, w in stack.pop()]
                if op == "scale":
                    stack.append(scaled)
                else:
                    stack[-1].extend(scaled)
        total = math.fsum(w for t, w in stack[0] if t not in self.weightless)
        if self.divide and not total > 0:
            raise ValueError(f"The weights sum to {total:g}; dividing by them needs a positive sum.")
        unit = total if self.divide else 1.0
        terms = [(t, w / unit) for t, w in stack[0] if t >= 0 and w != 0]
        number = math.fsum(w / unit for t, w in stack[0] if t == NUMBER)
        for t, w in [*terms, (NUMBER, number)]:
            if not abs(w) <= _LARGEST:
                raise ValueError(f"The weights of leaf {t} multiply to {w:g}, which float32 cannot hold.")
        if number or not terms:
            terms.append((NUMBER, number))
        return [(PUSH if i == 0 else ADD, t, w) for i, (t, w) in enumerate(terms)]


def _check_stack(instructions: Sequence[Instruction]) -> int:
    if not instructions:
        raise ValueError("A program needs at least one instruction, a push.")
    slots = depth = 0
    for at, (op, term, weight) in enumerate(instructions):
        _check_instruction(at, op, term, weight)
        needs = 2 if op.startswith("pop_") else 0 if op == "push" else 1
        if slots < needs:
            raise ValueError(f"Instruction {at}: {op} needs {needs} stack slots and finds {slots}.")
        slots += (op == "push") - op.startswith("pop_")
        depth = max(depth, slots)
    if slots != 1:
        raise ValueError(f"A program must leave one stack slot, this one leaves {slots}.")
    if depth > MAX_DEPTH:
        raise ValueError(f"A program may use {MAX_DEPTH} stack slots, this one uses {depth}.")
    return depth


def _check_instruction(at: int, op: str, term: int, weight: float) -> None:
    if op not in OPS:
        raise ValueError(f"Instruction {at}: unknown operation {op!r}; known are {', '.join(OPS)}.")
    if not abs(weight) <= _LARGEST:
        raise ValueError(f"Instruction {at}: the weight {weight} is not a finite float32 number.")
    if 0 < abs(weight) < _SMALLEST:
        raise ValueError(
            f"Instruction {at}: the weight {weight} is too small for float32; leave the term out."
        )
    if op in LEAF_OPS and term < UNIFORM:
        raise ValueError(
            f"Instruction {at}: leaf {term} is neither a term (0, 1, ...) nor the number ({NUMBER}) nor "
            f"the uniform distribution ({UNIFORM})."
        )
    if op in ("logadd", "debias") and term == NUMBER:
        raise ValueError(f"Instruction {at}: {op} reads a distribution, not the number one.")
    if op == "logadd" and weight <= 0:
        raise ValueError(f"Instruction {at}: the weight of a logadd is positive, not {weight:g}.")
    if op == "debias" and weight < 0:
        raise ValueError(f"Instruction {at}: the weight of a debias is not negative, as {weight:g} is.")

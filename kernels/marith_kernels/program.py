"""A formula as a flat program, and the programs of one step as a batch of arrays.

A *program* works on a small stack. Each slot holds two values for every token of the vocabulary, as every
node of a formula does: an energy E and a weight N.

    leaf(t), t >= 0     E = log-probabilities of term t,  N = 1
    leaf(-1)            E = 1,                            N = 1          the number one

    push      t  w      new slot            := w * leaf(t)
    add       t  w      top                 := top + w * leaf(t)
    max, min  t  w      top                 := whichever of top and w * leaf(t) has the larger (smaller) E
    scale     -  w      top                 := w * top
    pop_add   -  w      a = pop;  top       := top + w * a
    pop_max, pop_min    a = pop;  top       := whichever of top and w * a has the larger (smaller) E

The winner of a max or min takes its N along; on equal E the older operand (`top`) wins. At the end one slot
is left, and the energy of the group is E / N with `divide`, else E.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

OPS = ("add", "max", "min", "push", "pop_add", "pop_max", "pop_min", "scale")
ADD, MAX, MIN, PUSH, POP_ADD, POP_MAX, POP_MIN, SCALE = range(8)
NUMBER = -1  # the leaf that is one for every token
MAX_DEPTH = 32  # stack slots that every backend can hold

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class Instruction(NamedTuple):
    op: str  # one of OPS
    term: int  # leaf of push, add, max and min; ignored by the others
    weight: float


class Program:
    """One formula, checked and encoded once; see the module's docstring for what the instructions mean.

    depth: stack slots in use at once, at least 1.
    linear: no max and no min. Such a program is encoded as a plain weighted sum, with 1 / N folded into the
    weights.
    divide: the energy is E / N token by token.
    n_terms: terms that a group must bring; one more than the highest leaf.

    Raises ValueError for an unknown operation, a weight that float32 cannot hold, a leaf below -1, an
    operation on an empty stack, more than MAX_DEPTH slots, anything but one slot at the end, or a linear
    program to be divided whose weights do not sum to a positive number.
    """

    __slots__ = ("depth", "divide", "encoded", "instructions", "linear", "n_terms")

    def __init__(self, instructions: Sequence[tuple[str, int, float]], *, divide: bool = False):
        self.instructions = tuple(Instruction(op, int(term), float(w)) for op, term, w in instructions)
        self.depth = _check_stack(self.instructions)
        leaves = [i.term for i in self.instructions if i.op in ("push", "add", "max", "min")]
        self.n_terms = max(leaves) + 1
        self.linear = not any(i.op.endswith(("max", "min")) for i in self.instructions)
        self.divide = divide
        code = _weighted_sum(self.instructions, divide) if self.linear else _stack_code(self.instructions)
        # int32 [3, n_instructions]: operation, term, bits of the float32 weight
        self.encoded = np.empty((3, len(code)), np.int32)
        self.encoded[0] = [op for op, _, _ in code]
        self.encoded[1] = [term for _, term, _ in code]
        self.encoded[2] = np.array([w for _, _, w in code], np.float32).view(np.int32)

    def __repr__(self) -> str:
        steps = "; ".join(f"{i.op} {i.term} {i.weight:g}" for i in self.instructions)
        return f"Program({steps}{'; divide' if self.divide else ''})"


def _check_stack(instructions: Sequence[Instruction]) -> int:
    if not instructions:
        raise ValueError("A program needs at least one instruction, a push.")
    slots = depth = 0
    for at, (op, term, weight) in enumerate(instructions):
        if op not in OPS:
            raise ValueError(f"Instruction {at}: unknown operation {op!r}; known are {', '.join(OPS)}.")
        if not abs(weight) <= _LARGEST:
            raise ValueError(f"Instruction {at}: the weight {weight} is not a finite float32 number.")
        if 0 < abs(weight) < _SMALLEST:
            raise ValueError(
                f"Instruction {at}: the weight {weight} is too small for float32; leave the term out."
            )
        if op in ("push", "add", "max", "min") and term < NUMBER:
            raise ValueError(
                f"Instruction {at}: leaf {term} is neither a term (0, 1, ...) nor the number ({NUMBER})."
            )
        needs = {"push": 0, "pop_add": 2, "pop_max": 2, "pop_min": 2}.get(op, 1)
        if slots < needs:
            raise ValueError(f"Instruction {at}: {op} needs {needs} stack slots and finds {slots}.")
        slots += {"push": 1, "pop_add": -1, "pop_max": -1, "pop_min": -1}.get(op, 0)
        depth = max(depth, slots)
    if slots != 1:
        raise ValueError(f"A program must leave one stack slot, this one leaves {slots}.")
    if depth > MAX_DEPTH:
        raise ValueError(f"A program may use {MAX_DEPTH} stack slots, this one uses {depth}.")
    return depth


def _stack_code(instructions: Sequence[Instruction]) -> list[tuple[int, int, float]]:
    """Operation numbers; a term of weight 0 becomes the number 0, so that its -inf cannot ban a token."""
    return [(OPS.index(op), NUMBER if weight == 0 else term, weight) for op, term, weight in instructions]


def _weighted_sum(instructions: Sequence[Instruction], divide: bool) -> list[tuple[int, int, float]]:
    """The same sum without a stack: a push and adds, in the order of the terms' appearance.

    A term that appears twice stays twice, whatever the sum of its weights: its -inf bans in either.
    """
    stack: list[list[tuple[int, float]]] = []
    for op, term, weight in instructions:
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
    total = math.fsum(w for _, w in stack[0])
    if divide and not total > 0:
        raise ValueError(f"The weights sum to {total:g}; dividing by them needs a positive sum.")
    unit = total if divide else 1.0
    terms = [(t, w / unit) for t, w in stack[0] if t != NUMBER and w != 0]
    number = math.fsum(w / unit for t, w in stack[0] if t == NUMBER)
    for t, w in [*terms, (NUMBER, number)]:
        if not abs(w) <= _LARGEST:
            raise ValueError(f"The weights of leaf {t} multiply to {w:g}, which float32 cannot hold.")
    if number or not terms:
        terms.append((NUMBER, number))
    return [(PUSH if i == 0 else ADD, t, w) for i, (t, w) in enumerate(terms)]


@dataclass(frozen=True, eq=False)
class Batch:
    """The programs of one step. Rebuilt whenever the step's rows change, hence numpy and one transfer.

    G groups with n instructions in all. A *row* is a row of the logits handed to `fuse`, and a *term* is a
    position in one group's formula; instructions hold rows here.
    """

    programs: tuple[Program, ...]  # [G]
    rows: tuple[Sequence[int], ...]  # [G] group -> term -> row
    n_rows: int  # rows that the logits must have at least
    depth: int  # stack slots of the deepest program that is not linear; 0 if all are linear
    n_lse_rows: int
    n_longest: int  # instructions of the longest program
    any_divide: bool
    code: torch.Tensor  # int32, everything below one after the other, so that one copy moves it
    offset: torch.Tensor  # int32 [G + 1] group -> its first instruction
    flags: torch.Tensor  # int32 [G] bit 0 linear, bit 1 divide by an N that differs from token to token
    leader: torch.Tensor  # int32 [G] row of term 0; -1 where the program is linear and needs none
    op: torch.Tensor  # int32 [n] operation number
    row: torch.Tensor  # int32 [n] row of the leaf; -1 for the number one and for stack operations
    weight: torch.Tensor  # float32 [n]
    lse_row: torch.Tensor  # int32 [n_lse_rows] rows whose log-sum-exp is needed, ascending

    @property
    def n_groups(self) -> int:
        return len(self.programs)

    @property
    def linear(self) -> bool:
        return self.depth == 0

    @classmethod
    def build(
        cls,
        programs: Sequence[Program],
        rows: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Lay out `programs[g]`, whose term t reads logits row `rows[g][t]`, for every group g.

        Raises ValueError if a group has too few rows, none at all, or a negative one.
        """
        if len(programs) != len(rows):
            raise ValueError(f"{len(programs)} programs but rows for {len(rows)} groups.")
        n_groups = len(programs)
        counts = [p.encoded.shape[1] for p in programs]
        n_rows = [len(r) for r in rows]
        for g, program in enumerate(programs):
            if n_rows[g] < max(program.n_terms, 1):
                raise ValueError(f"Group {g} needs {max(program.n_terms, 1)} rows and has {n_rows[g]}.")
        of_term = np.fromiter(chain.from_iterable(rows), np.int32, sum(n_rows))
        if of_term.size and of_term.min() < 0:
            raise ValueError(f"A row is negative: {of_term.min()}.")
        op, term, bits = np.concatenate([p.encoded for p in programs] or [np.empty((3, 0), np.int32)], axis=1)
        flags = np.fromiter((1 if p.linear else 2 * p.divide for p in programs), np.int32, n_groups)

        first_row = np.zeros(n_groups + 1, np.int32)
        np.cumsum(n_rows, out=first_row[1:])
        offset = np.zeros(n_groups + 1, np.int32)
        np.cumsum(counts, out=offset[1:])
        is_term = (term >= 0) & (op <= PUSH)
        row = np.where(
            is_term, of_term[np.where(is_term, term, 0) + np.repeat(first_row[:-1], counts)], NUMBER
        )
        linear = (flags & 1).astype(bool)
        leader = np.where(linear, NUMBER, of_term[first_row[:-1]]) if n_groups else flags
        if linear.all():
            lse_row = np.empty(0, np.int32)
        else:
            used = row[np.repeat(~linear, counts)]
            lse_row = np.unique(np.concatenate([used, leader]))
            lse_row = lse_row[lse_row >= 0]

        parts = [offset, flags, leader, op, row, bits, lse_row]
        code = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
        if torch.device(device).type == "cuda":
            code = code.pin_memory().to(device, non_blocking=True)
        elif torch.device(device).type != "cpu":
            code = code.to(device)
        views = torch.split(code, [p.size for p in parts])
        return cls(
            programs=tuple(programs),
            rows=tuple(rows),
            n_rows=int(of_term.max(initial=-1)) + 1,
            depth=max((p.depth for p in programs if not p.linear), default=0),
            n_lse_rows=lse_row.size,
            n_longest=max(counts, default=0),
            any_divide=bool((flags & 2).any()),
            code=code,
            offset=views[0],
            flags=views[1],
            leader=views[2],
            op=views[3],
            row=views[4],
            weight=views[5].view(torch.float32),
            lse_row=views[6],
        )

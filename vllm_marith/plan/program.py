"""What a worker does for each formula at each step, as plain data.

A plan is a list of *stages*; each gives one row [vocab] from the rows before it, and the last one's row is
the formula's.  Rows are numbered: row t < len(terms) holds the logits of term t, row len(terms) + s is that
of stage s.  Most formulas have one stage.  What a stage does, by kind:

    fuse           run the program below on the rows it names
    top_k, top_p   the same, then keep the k likeliest tokens, or those of mass p    parameters (k,), (p,)
    plausible      0 where the source is at least alpha times as likely as its best token, else -inf (alpha,)
    kl_indicator   0 where the indicator of sources (p, q) is one, else -1
                                                     (divergence, include_max, minimize, top_k)
    classifier     a classifier's row; its candidates are the likeliest tokens of the source     (index,)

Rows of plausible and kl_indicator, and of classifiers in Bayes form, are *weightless*: energies as they are,
with N = 0.  All other rows are distributions, log Q = log_softmax(row), with N = 1.

A program is a list of instructions (op, row, weight) for a small stack machine whose slots hold, for every
token, an energy E and a weight N:

    push       new slot:  E = weight * log Q_row,  N = weight
    add        top slot:  E += weight * log Q_row,  N += weight
    max, min   top slot:  E = max(E, weight * log Q_row);  N is that of the winner, the slot's own on a tie
    logadd     top slot:  E = log(exp E + weight * Q_row);  N stays
    debias     top slot:  E += weight * min(exp E - Q_row, 0);  N stays
    scale      top slot:  E *= weight,  N *= weight
    pop_add, pop_max, pop_min
               a = pop the top slot, then as add, max, min with weight * a
    pop_gate   a = pop the top slot, then E = weight * E_a where E >= 0, else 0;  N = weight * N_a or 0 alike

For push, add, max and min row -1 is the number one, E = 1 and N = 1, and row -2 is the uniform distribution,
E = -log(vocab) and N = 1.  scale and pop_* read no row; theirs is always -1.  No multiplication by anything
but 0 turns -inf into anything else, whatever the weight's sign; a weight of 0 drops its operand.  The first
instruction is a push, and exactly one slot remains at the end.

The row is E, or E / N where the stage divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from vllm_marith.language.nodes import Dial

Instruction = tuple[str, int, float]
Kind = Literal["fuse", "top_k", "top_p", "plausible", "kl_indicator", "classifier"]

# Row of the number one, and of the instructions that read no row.
NO_ROW: Final = -1
UNIFORM_ROW: Final = -2
# Instructions after which a row's own log-sum-exp no longer cancels.
NONLINEAR: Final = frozenset({"max", "min", "pop_max", "pop_min", "logadd", "debias", "pop_gate"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One row of a plan; see the module's docstring.

    Attributes:
        kind: what it does.
        instructions: the program of fuse, top_k and top_p.
        divide: the program's E is divided by N token by token.  Only where N differs from token to token or
            from step to step under normalize "sum"; everywhere else 1/N is in the weights already.
        dialled: (instruction, dial): the instruction's weight is multiplied by the dial's value at the step.
        parameters: of the kind.
        sources: rows that the other kinds read.
        weightless: the row is an energy, not a distribution.
        depth: largest number of slots in use at once.
    """

    kind: Kind
    instructions: tuple[Instruction, ...] = ()
    divide: bool = False
    dialled: tuple[tuple[int, int], ...] = ()
    parameters: tuple[float, ...] = ()
    sources: tuple[int, ...] = ()
    weightless: bool = False
    depth: int = 0

    @property
    def linear(self) -> bool:
        """Whether E needs only the logits: a row's log-sum-exp is a constant that cancels."""
        return not any(op in NONLINEAR for op, _, _ in self.instructions)

    def at(self, dials: Sequence[float]) -> tuple[Instruction, ...]:
        """The instructions with the dials' values of one step in their weights."""
        if not self.dialled:
            return self.instructions
        instructions = list(self.instructions)
        for place, dial in self.dialled:
            op, row, weight = instructions[place]
            instructions[place] = op, row, weight * dials[dial]
        return tuple(instructions)


@dataclass(frozen=True, slots=True)
class Plan:
    """A formula ready to run.  Plain data: it is pickled, and read by packages that know nothing of this one.

    Attributes:
        terms: names of the language models, leader first, the others in order of first appearance.  A term
            whose weights cancel is left out; the leader stays, because its tokens are what the client sees.
            Or whatever `lower` was told to number rows by.
        stages: in an order in which each reads only earlier ones.
        dials: factors whose values are only known at each step.
        classifiers: names of the classifier terms that run.
        weight: (lowest, highest) N of the formula as written, before any 1/N.
    """

    terms: tuple[str, ...]
    stages: tuple[Stage, ...]
    dials: tuple[Dial, ...]
    classifiers: tuple[str, ...]
    weight: tuple[float, float]

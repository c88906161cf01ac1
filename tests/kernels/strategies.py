"""Random programs and cases for the fusion operation."""

from __future__ import annotations

from collections.abc import Collection

from hypothesis import strategies as st
from marith_kernels import Program

from .cases import DTYPES, VOCAB_SIZES, Case, ExtendedCase

Instructions = tuple[tuple[str, int, float], ...]

signs = st.sampled_from([1.0, 1.0, -1.0])
weights = st.builds(
    lambda sign, exponent, digits: sign * 10.0**exponent * digits,
    signs,
    st.sampled_from([-3, -1, 0, 0, 0, 1, 2]),
    st.sampled_from([1.0, 1.0, 1.5, 2.7, 9.99]),
) | st.sampled_from([0.0, 1.0, -1.0])


shares = st.sampled_from([1.0, 0.5, 0.01, 10.0])  # weights of logadd and debias


@st.composite
def instructions(
    draw: st.DrawFn, n_terms: int, max_slots: int, linear: bool = False, extended: bool = False
) -> Instructions:
    """A walk over the stack: at most max_slots, at most 16 leaves, one slot left."""
    leaves = st.integers(-2 if extended else -1, n_terms - 1)
    distributions = leaves.filter(lambda t: t != -1)
    walk: list[tuple[str, int, float]] = [("push", draw(st.integers(0, n_terms - 1)), draw(weights))]
    slots = 1
    combine = ["add"] if linear else ["add", "add", "max", "min"]
    for _ in range(draw(st.integers(0, 15))):
        choices = [*combine, "scale"]
        if slots < max_slots:
            choices += ["push", "push"]
        if slots > 1:
            choices += [f"pop_{op}" for op in combine]
        if extended and not linear:
            choices += ["logadd", "debias"] + ["pop_gate", "pop_gate"] * (slots > 1)
        op = draw(st.sampled_from(choices))
        if op in ("logadd", "debias"):
            walk.append((op, draw(distributions), draw(shares)))
            continue
        reads_leaf = op in ("push", "add", "max", "min")
        walk.append((op, draw(leaves) if reads_leaf else -1, draw(weights)))
        slots += (op == "push") - op.startswith("pop")
    while slots > 1:
        walk.append((f"pop_{draw(st.sampled_from(combine))}", -1, draw(weights)))
        slots -= 1
    return tuple(walk)


@st.composite
def programs(draw: st.DrawFn, n_terms: int = 4, max_slots: int = 5, extended: bool = False) -> Program:
    """Any program; where it divides, N is positive for every token."""
    walk = draw(instructions(n_terms, max_slots, linear=draw(st.booleans()), extended=extended))
    weightless = draw(st.sets(st.integers(0, n_terms - 1), max_size=2)) if extended else ()
    divide = draw(st.booleans())
    if divide:
        low, high = n_range(walk, weightless)
        if low <= 0.01 * max(1.0, abs(high)):
            walk = (*walk, ("add", -1, 0.1 * max(1.0, abs(high)) - low))
    return Program(walk, divide=divide, weightless=weightless)


def n_range(walk: Instructions, weightless: Collection[int] = ()) -> tuple[float, float]:
    """The values that N can take, whoever wins and whichever gate is open."""
    stack: list[tuple[float, float]] = []
    for op, t, w in walk:
        if op in ("logadd", "debias"):
            continue
        operand = stack.pop() if op == "scale" or op.startswith("pop") else (float(t not in weightless),) * 2
        low, high = sorted((w * operand[0], w * operand[1]))
        if op in ("push", "scale"):
            stack.append((low, high))
            continue
        a, b = stack.pop()
        if op == "pop_gate":
            stack.append((min(low, 0.0), max(high, 0.0)))
        elif op.endswith("add"):
            stack.append((a + low, b + high))
        else:
            stack.append((min(a, low), max(b, high)))
    return stack[0]


@st.composite
def cases(
    draw: st.DrawFn,
    vocab_sizes: tuple[int, ...] = VOCAB_SIZES,
    max_slots: int = 5,
    max_groups: int = 3,
    extended: bool = False,
) -> Case:
    vocab_size = draw(st.sampled_from(vocab_sizes))
    some = st.lists(programs(max_slots=max_slots, extended=extended), min_size=1, max_size=max_groups)
    return (ExtendedCase if extended else Case)(
        programs=tuple(draw(some)),
        vocab_size=vocab_size,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from([0.01, 1.0, 5.0, 50.0])),
        padding=draw(st.sampled_from([0, 0, 1, 15, 64])),
        gap=draw(st.sampled_from([0, 0, 3, 8])),
    )

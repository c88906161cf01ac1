"""Lowering: the same distribution, in the smallest program that gives it."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings

from tests.language.strategies import formulas, logits
from vllm_marith import Formula, FormulaError
from vllm_marith.plan import NO_TERM, Plan, lower

from .interpreter import run

OPS = {"push", "add", "max", "min", "scale", "pop_add", "pop_max", "pop_min"}


@settings(max_examples=400)
@given(formulas, logits())
def test_a_plan_gives_the_distribution_of_its_formula(formula, values):
    expected = formula.evaluate(values)
    result = run(lower(formula), values)
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-10)


@given(formulas)
def test_a_plan_is_well_formed_plain_data(formula):
    plan = lower(formula)
    assert plan.instructions[0][0] == "push"
    assert plan.terms[0] == formula.leader
    read = {term for _, term, _ in plan.instructions} - {NO_TERM}
    assert read | {0} == set(range(len(plan.terms)))
    for op, term, weight in plan.instructions:
        assert op in OPS
        assert type(term) is int
        assert type(weight) is float
        assert np.isfinite(weight)
        assert weight != 0 or term == NO_TERM
        if op == "scale" or op.startswith("pop_"):
            assert term == NO_TERM
    if plan.linear:
        assert not plan.divide
        assert plan.depth == 1
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    "text", ["union(a, 2*b)", "union(2*b, a)", "union(a, min(c, 2*b))", "union(min(c, 2*b), a)"]
)
def test_the_first_operand_wins_a_tie(text):
    """At the first two tokens log 1/4 and 2 * log 1/2 are the same float, under the weights 1 and 2."""
    tie = np.array([0.0, 0.0, -np.inf, -np.inf])
    values = {"a": np.zeros(4), "b": tie, "c": np.array([0.0, 0.0, -50.0, -50.0])}
    formula = Formula.parse(text)
    np.testing.assert_allclose(run(lower(formula), values), formula.evaluate(values), rtol=1e-12)


def _lower(text, normalize="sum"):
    return lower(Formula.parse(text, normalize=normalize))


@pytest.mark.parametrize(
    ("text", "terms", "program"),
    [
        ("a", "a", [("push", 0, 1)]),
        ("0.25*a", "a", [("push", 0, 1)]),
        ("a - 0.5*b", "ab", [("push", 0, 2), ("add", 1, -1)]),
        ("2*(a + 2*(b + c)) - b", "abc", [("push", 0, 2 / 9), ("add", 1, 3 / 9), ("add", 2, 4 / 9)]),
        ("a - 0.5*a", "a", [("push", 0, 1)]),
        ("a + b - b", "a", [("push", 0, 1)]),
        ("a + 1", "a", [("push", 0, 0.5)]),
        ("1 + a + 2*b", "ab", [("push", 0, 0.25), ("add", 1, 0.5)]),
        ("0*a + b", "ab", [("push", 1, 1)]),
        ("a - a + b", "ab", [("push", 1, 1)]),
        ("a - a + 3", "a", [("push", -1, 0)]),
        ("union(a, b)", "ab", [("push", 0, 1), ("max", 1, 1)]),
        ("2*union(a, b)", "ab", [("push", 0, 1), ("max", 1, 1)]),
        ("intersection(a, union(b, c))", "abc", [("push", 1, 1), ("max", 2, 1), ("min", 0, 1)]),
        ("union(a, union(b, c))", "abc", [("push", 0, 1), ("max", 1, 1), ("max", 2, 1)]),
        ("union(a, a)", "a", [("push", 0, 1)]),
        (
            "a - 0.5*union(b, a)",
            "ab",
            [("push", 1, 1), ("max", 0, 1), ("scale", -1, -1), ("add", 0, 2)],
        ),
        (
            "a - 0.5*union(b - a, 0)",
            "ab",
            [("push", 1, 1), ("add", 0, -1), ("max", -1, 0), ("scale", -1, -0.5), ("add", 0, 1)],
        ),
        (
            "union(a, b) + min(c, d)",
            "abcd",
            [("push", 0, 0.5), ("max", 1, 0.5), ("push", 2, 0.5), ("min", 3, 0.5), ("pop_add", -1, 1)],
        ),
        # N depends on the winner: order kept, numbers kept, nothing folded.
        ("union(2*a, 0.5*b)", "ab", [("push", 0, 2), ("max", 1, 0.5)]),
        (
            "2*union(a, 1 + union(b, 2*c)/2) + 3",
            "abc",
            [
                ("push", 0, 1), ("push", 1, 1), ("max", 2, 2), ("scale", -1, 0.5), ("add", -1, 1),
                ("pop_max", -1, 1), ("scale", -1, 2), ("add", -1, 3),
            ],
        ),
    ],
)  # fmt: skip
def test_programs(text, terms, program):
    plan = _lower(text)
    assert plan.terms == tuple(terms)
    assert [(op, term) for op, term, _ in plan.instructions] == [(op, term) for op, term, _ in program]
    np.testing.assert_allclose([w for _, _, w in plan.instructions], [w for _, _, w in program], rtol=1e-12)


@pytest.mark.parametrize(
    ("text", "linear", "divide", "weight", "depth"),
    [
        ("a - 0.6*b", True, False, (0.4, 0.4), 1),
        ("union(a, b) + c", False, False, (2, 2), 1),
        ("union(a, 2*b)", False, True, (1, 2), 1),
        ("union(a + b, 2*c)", False, False, (2, 2), 1),
        ("c + union(0.1*a + 0.2*b, 0.3*c)", False, False, (1.3, 1.3), 1),  # 0.1 + 0.2 is 0.3 here
        ("union(a - b, 0) + c", False, False, (1, 1), 1),
        ("union(a, intersection(b, c), intersection(c, d))", False, False, (1, 1), 2),
        ("min(a, max(b, min(c, max(d, a))))", False, False, (1, 1), 1),
        ("union(max(a, b) + min(c, d), max(a, c) + min(b, d))", False, False, (2, 2), 3),
    ],
)
def test_properties(text, linear, divide, weight, depth):
    plan = _lower(text)
    assert (plan.linear, plan.divide, plan.depth) == (linear, divide, depth)
    assert plan.weight == pytest.approx(weight)


def test_without_normalization_nothing_is_divided():
    plan = _lower("union(a, 2*b) - 3*c + 4", "none")
    assert (plan.divide, plan.weight) == (False, (2, 3))
    assert plan.instructions == (("push", 0, 1.0), ("max", 1, 2.0), ("add", 2, -3.0))
    assert _lower("a - a", "none").instructions == (("push", NO_TERM, 0.0),)


def test_a_long_sum_needs_one_slot():
    text = " + ".join(f"min(t{i}, union(t{i + 1}, 0.5*t{i + 2} - t{i}))" for i in range(20))
    assert _lower(text, "none").depth <= 3


@pytest.mark.parametrize("text", ["a - b", "-a", "union(a, 0)"])
def test_formulas_without_a_distribution_are_not_lowered(text):
    formula = Formula.parse(text, normalize="none")
    assert isinstance(lower(formula), Plan)
    with pytest.raises(FormulaError, match="the weights of the formula sum to"):
        lower(formula.with_normalize("sum"))

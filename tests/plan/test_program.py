"""Lowering: the same distribution, in the smallest program that gives it."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.language.strategies import CLASSIFIERS, STEP, formulas, generic_logits, logits, operator_formulas
from vllm_marith import Formula, FormulaError
from vllm_marith.plan import NO_ROW, UNIFORM_ROW, Plan, lower

from .interpreter import run

READ = {"push", "add", "max", "min", "logadd", "debias"}
OPS = READ | {"scale", "pop_add", "pop_max", "pop_min", "pop_gate"}
KINDS = {"fuse", "top_k", "top_p", "plausible", "kl_indicator", "classifier"}


@settings(max_examples=400)
@given(formulas, logits())
def test_a_plan_gives_the_distribution_of_its_formula(formula, values):
    expected = formula.evaluate(values)
    result = run(lower(formula), values)
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=400)
@given(operator_formulas, generic_logits())
def test_a_plan_of_the_whole_algebra_gives_the_distribution_of_its_formula(formula, values):
    expected = formula.evaluate(values, **STEP)
    result = run(lower(formula), values, **STEP)
    np.testing.assert_array_equal(np.isneginf(result), np.isneginf(expected))
    np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9)


@given(st.one_of(formulas, operator_formulas))
def test_a_plan_is_well_formed_plain_data(formula):
    plan = lower(formula)
    terms = len(plan.terms)
    assert plan.terms[0] == formula.leader
    read = {0}
    for number, stage in enumerate(plan.stages):
        rows = [row for op, row, _ in stage.instructions if op in READ and row >= 0] + [*stage.sources]
        assert all(row < terms + number for row in rows), "a stage reads earlier rows only"
        read.update(rows)
        assert stage.kind in KINDS
        assert bool(stage.instructions) == (stage.kind in ("fuse", "top_k", "top_p"))
        assert not stage.instructions or stage.instructions[0][0] == "push"
        for op, row, weight in stage.instructions:
            assert op in OPS
            assert type(row) is int
            assert type(weight) is float
            assert np.isfinite(weight)
            assert weight != 0 or row == NO_ROW or op == "debias"
            assert op in READ or row == NO_ROW
            assert row >= UNIFORM_ROW
        if stage.linear and not stage.dialled:
            assert not stage.divide
        for place, dial in stage.dialled:
            assert 0 <= place < len(stage.instructions)
            assert 0 <= dial < len(plan.dials)
    assert not plan.stages[-1].weightless
    assert plan.stages[-1].instructions
    assert read == set(range(terms + len(plan.stages) - 1)), "every row is read by something"
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
    return lower(Formula.parse(text, CLASSIFIERS, normalize=normalize))


def _only(plan):
    (stage,) = plan.stages
    return stage


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
    assert [(op, term) for op, term, _ in _only(plan).instructions] == [(op, term) for op, term, _ in program]
    np.testing.assert_allclose(
        [w for _, _, w in _only(plan).instructions], [w for _, _, w in program], rtol=1e-12
    )


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
    assert (_only(plan).linear, _only(plan).divide, _only(plan).depth) == (linear, divide, depth)
    assert plan.weight == pytest.approx(weight)


def test_without_normalization_nothing_is_divided():
    plan = _lower("union(a, 2*b) - 3*c + 4", "none")
    assert (_only(plan).divide, plan.weight) == (False, (2, 3))
    assert _only(plan).instructions == (("push", 0, 1.0), ("max", 1, 2.0), ("add", 2, -3.0))
    assert _only(_lower("a - a", "none")).instructions == (("push", NO_ROW, 0.0),)


def test_a_long_sum_needs_one_slot():
    text = " + ".join(f"min(t{i}, union(t{i + 1}, 0.5*t{i + 2} - t{i}))" for i in range(20))
    assert _only(_lower(text, "none")).depth <= 3


@pytest.mark.parametrize("text", ["a - b", "-a", "union(a, 0)"])
def test_formulas_without_a_distribution_are_not_lowered(text):
    formula = Formula.parse(text, normalize="none")
    assert isinstance(lower(formula), Plan)
    with pytest.raises(FormulaError, match="the weights of the formula sum to"):
        lower(formula.with_normalize("sum"))


ONE, TWO = 2, 3  # the first two stages' rows in a formula with the terms a and b


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("normalize(a) + b", [("fuse", [("push", 0, 0.5), ("add", 1, 0.5)])]),
        (
            "normalize(a - 0.5*b) + b",
            [("fuse", [("push", 0, 2), ("add", 1, -1)]), ("fuse", [("push", ONE, 0.5), ("add", 1, 0.5)])],
        ),
        ("3*topk(2*a - b, 5)", [("top_k", [("push", 0, 2), ("add", 1, -1)])]),
        # A filter's operand keeps its weight: 1 and 2 of 3.
        (
            "a + topk(2*b, 5)",
            [("top_k", [("push", 1, 1)]), ("fuse", [("push", 0, 1 / 3), ("add", ONE, 2 / 3)])],
        ),
        ("topp(topk(a, 5), 0.5)", [("top_k", [("push", 0, 1)]), ("top_p", [("push", 1, 1)])]),
        ("superseded(b, a)", [("fuse", [("push", 0, 1)])]),
        ("self_debias(a, b, 10)", [("fuse", [("push", 0, 1), ("debias", 1, 10)])]),
        ("mixture(1: a, 3: b)", [("fuse", [("push", 0, 1), ("logadd", 1, 3)])]),
        ("mixture(1: a, 3: uniform)", [("fuse", [("push", 0, 1), ("logadd", UNIFORM_ROW, 3)])]),
        (
            "a + b + plausible(a, b, 0.5)",
            [
                ("plausible", []),
                ("fuse", [("push", 0, 1), ("add", ONE, 1), ("scale", -1, 1 / 3), ("add", 0, 1 / 3),
                          ("add", 1, 1 / 3)]),
            ],
        ),
        # One stage, however often its distribution is read.
        (
            "union(normalize(a + b), b) + normalize(b + a) - normalize(a + b)/2",
            [
                ("fuse", [("push", 0, 0.5), ("add", 1, 0.5)]),
                ("fuse", [("push", 1, 0.5), ("add", 0, 0.5)]),
                ("fuse", [("push", ONE, 2 / 3), ("max", 1, 2 / 3), ("add", TWO, 2 / 3),
                          ("add", ONE, -1 / 3)]),
            ],
        ),
        # What a classifier looks at is the larger part of the result, and is not fused again.
        (
            "2*a + 0.5*y",
            [("classifier", []), ("fuse", [("push", 0, 1), ("add", 1, 0.25)])],
        ),
        (
            "a - 0.5*b + y",
            [
                ("fuse", [("push", 0, 2), ("add", 1, -1)]),
                ("classifier", []),
                ("fuse", [("push", ONE, 1), ("add", TWO, 2)]),
            ],
        ),
    ],
)  # fmt: skip
def test_stages(text, stages):
    plan = _lower(text)
    assert [stage.kind for stage in plan.stages] == [kind for kind, _ in stages]
    for stage, (_, program) in zip(plan.stages, stages, strict=True):
        assert [(op, row) for op, row, _ in stage.instructions] == [(op, row) for op, row, _ in program]
        np.testing.assert_allclose([w for _, _, w in stage.instructions], [w for _, _, w in program])


def test_dials_multiply_the_weights_of_a_step():
    plan = _lower("a + schedule(0: 2, 5: 1)*(b - a)", "none")
    (stage,) = plan.stages
    weights = {
        position: [w for _, _, w in stage.at([dial.at(position) for dial in plan.dials])]
        for position in (0, 5)
    }
    assert [op for op, _, _ in stage.instructions] == ["push", "add", "scale", "add"]
    assert weights == {0: [1, -1, 2, 1], 5: [1, -1, 1, 1]}


def test_a_drafter_is_never_the_leader_and_does_not_run():
    plan = _lower("superseded(small, large) + small2")
    assert plan.terms == ("large", "small2")


def test_weights_are_checked_at_every_position():
    lower(Formula.parse("schedule(0: 1, 9: 0)*a + schedule(0: 0, 9: 1)*b"))
    with pytest.raises(FormulaError, match="sum to 0 from position 9 on"):
        Formula.parse("schedule(0: 1, 9: 0)*a")

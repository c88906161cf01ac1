"""Plans on their way to the worker."""

from hypothesis import given
from hypothesis import strategies as st

from tests.language.strategies import operator_formulas
from vllm_marith import Formula
from vllm_marith.plan import decode, encode, lower, without_rows


@given(operator_formulas)
def test_a_plan_comes_back_as_it_was(formula):
    plan = lower(formula)
    routine = decode(encode(plan, range(len(plan.terms))))
    assert (routine.terms, routine.stages, routine.dials) == (len(plan.terms), plan.stages, plan.dials)


@given(operator_formulas, st.data())
def test_terms_that_share_a_row(formula, data):
    plan = lower(formula)
    terms = len(plan.terms)
    rows = data.draw(st.integers(1, terms))
    members = [*range(rows), *(data.draw(st.integers(0, rows - 1)) for _ in range(terms - rows))]
    routine = decode(encode(plan, members))
    assert routine.terms == rows
    for before, after in zip(plan.stages, routine.stages, strict=True):
        assert len(before.instructions) == len(after.instructions)
        pairs = [(a[1], b[1]) for a, b in zip(before.instructions, after.instructions, strict=True)]
        for old, new in [*pairs, *zip(before.sources, after.sources, strict=True)]:
            assert new == (old if old < 0 else members[old] if old < terms else old - terms + rows)


def test_equal_plans_are_equal_texts():
    one, other = (lower(Formula.parse(text)) for text in ("2*a - b", "a + a - b"))
    assert (
        encode(one, [0, 1])
        == encode(other, [0, 1])
        == (
            '{"terms":2,"stages":[{"kind":"fuse","instructions":[["push",0,2.0],["add",1,-1.0]],"depth":1}],"dials":[]}'
        )
    )


@given(operator_formulas, st.integers(1, 3))
def test_rows_that_no_stage_reads_can_be_dropped(formula, spare):
    plan = lower(formula)
    terms = len(plan.terms)
    members = range(terms)
    with_drafters = encode(
        lower(formula, (*plan.terms, *(f"drafter{i}" for i in range(spare)))), range(terms + spare)
    )
    assert without_rows(with_drafters, terms) == encode(plan, members)
    read = {row for stage in plan.stages for _, row, _ in stage.instructions}
    read |= {row for stage in plan.stages for row in stage.sources}
    if terms - 1 in read:
        assert without_rows(with_drafters, terms - 1) is None

"""The definition against the paper's public reference implementation; see tests/data/golden/README.md."""

import pytest

from tests.support.golden import CASES, expected, logits
from vllm_marith import Formula


def test_all_cases_are_there():
    assert len(CASES) == 32


@pytest.mark.parametrize("name", CASES)
def test_reference_implementation(name):
    case = CASES[name]
    formula = Formula.parse(case["formula"], normalize=case["normalize"])
    assert set(formula.terms) == set(case["terms"])
    expected(name).assert_equals(formula.evaluate(logits(name)))

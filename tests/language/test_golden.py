"""The definition against the paper's public reference implementation; see tests/data/golden/README.md."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vllm_marith import Formula, FormulaError
from vllm_marith.language.names import RESERVED

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = {case["case"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
# Formulas with an operator that the grammar only reserves so far.
UNSUPPORTED = {name for name, case in CASES.items() if RESERVED & set(re.findall(r"\w+", case["formula"]))}


@pytest.mark.parametrize("name", sorted(CASES.keys() - UNSUPPORTED))
def test_reference_implementation(name):
    case = CASES[name]
    formula = Formula.parse(case["formula"], normalize=case["normalize"])
    assert set(formula.terms) == set(case["terms"])
    with np.load(GOLDEN / "vectors.npz") as vectors:
        logits = {term: vectors[f"{name}/in/{term}"] for term in case["terms"]}
        expected = vectors[f"{name}/out"]
    np.testing.assert_allclose(formula.evaluate(logits), expected, rtol=0, atol=case["tolerance"])


def test_cases_that_wait_for_their_operators():
    assert {
        "flat/indicator",
        "flat/selfdebias",
        "flat/toppk",
        "flat/superseded",
        "flat/normalize_op",
        "sharp/superseded",
    } == UNSUPPORTED
    assert len(CASES) == 32
    for name in UNSUPPORTED:
        with pytest.raises(FormulaError, match="is not supported yet"):
            Formula.parse(CASES[name]["formula"])

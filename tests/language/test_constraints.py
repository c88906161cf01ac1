"""The JSON form of constraints, and what is wrong with it."""

from __future__ import annotations

import json

import pytest

from vllm_marith.language import Constraints, Formula, FormulaError, parse_request, read_request

FULL = {
    "forbid": ["damn", "shut up"],
    "forbid_regex": ["[0-9]{4}"],
    "ignore_case": False,
    "whole_words": True,
    "max_backoffs": 7,
    "window": 30,
}


def request(constraints: object) -> str:
    return json.dumps({"formula": "base", "constraints": constraints})


def test_a_request_carries_constraints_beside_its_formula() -> None:
    asked = read_request(request(FULL))
    assert asked.formula == parse_request("base")
    assert asked.constraints == Constraints.from_json(FULL)
    assert asked.constraints.to_dict() == FULL
    assert parse_request(request(FULL)) == asked.formula


def test_a_request_without_constraints_has_none() -> None:
    assert read_request("base").constraints is None
    assert read_request(json.dumps({"formula": "base", "constraints": None})).constraints is None


def test_defaults() -> None:
    found = Constraints(forbid=("a",))
    assert found.to_dict() == {
        "forbid": ["a"],
        "forbid_regex": [],
        "ignore_case": True,
        "whole_words": False,
        "max_backoffs": 64,
        "window": 256,
    }


@pytest.mark.parametrize("given", [FULL, Constraints.from_json(FULL)])
def test_a_formula_is_sent_with_constraints(given: object) -> None:
    formula = Formula.parse("base - 0.5*a", {"a": {"system": "A."}})
    sent = formula.to_json(given)
    assert read_request(sent).formula == parse_request(formula.to_json())
    assert read_request(sent).constraints == Constraints.from_json(FULL)


@pytest.mark.parametrize(
    ("constraints", "sentence"),
    [
        ({}, "'constraints' forbid nothing; give 'forbid' or 'forbid_regex'"),
        ({"forbid": []}, "'constraints' forbid nothing"),
        ({"forbid": "damn"}, "'constraints': 'forbid' must be a list, not 'damn'"),
        ({"forbid": [1]}, "'constraints': 'forbid.0' must be a string, not the number 1"),
        ({"forbid": [""]}, "'constraints': 'forbid.0'"),
        ({"forbid": ["a" * 257]}, "'constraints': 'forbid.0'"),
        ({"forbid": ["a"] * 1025}, "'constraints': 'forbid'"),
        ({"forbid": ["a"], "ignore_case": 1}, "'constraints': 'ignore_case' must be true or false"),
        ({"forbid": ["a"], "max_backoffs": -1}, "'constraints': 'max_backoffs' must be at least 0"),
        ({"forbid": ["a"], "max_backoffs": 10**6}, "'constraints': 'max_backoffs' must be at most 1024"),
        ({"forbid": ["a"], "max_backoffs": 1.5}, "'constraints': 'max_backoffs' must be a whole number"),
        ({"forbid": ["a"], "window": 0}, "'constraints': 'window' must be at least 1"),
        ({"forbit": ["a"]}, "'constraints': unknown key 'forbit'.*did you mean 'forbid'"),
        ({"forbid_regex": ["("]}, "the regular expression '\\(' is wrong"),
        ({"forbid": ["\ud800"]}, "'forbid.0' must be valid text"),
        ([], "'constraints' must be a mapping, not a list"),
        ("damn", "'constraints' must be a mapping, not 'damn'"),
    ],
)
def test_refusals(constraints: object, sentence: str) -> None:
    with pytest.raises(FormulaError, match=sentence):
        read_request(request(constraints))

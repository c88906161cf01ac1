"""Hostile requests, a few of those that `make fuzz` sends, and the worst that the limits let in."""

from __future__ import annotations

import json
import random
import resource
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import hostile
from vllm_marith import FormulaError, Term
from vllm_marith.language import Limits
from vllm_marith.language.constraints import MAX_WORD_CHARS, Constraints


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(hostile.values, st.integers(0, 2**32))
def test_every_value_is_accepted_or_refused_with_a_sentence(value: object, number: int) -> None:
    with hostile.nothing_runs():
        hostile.examine(value)
        if isinstance(value, str):
            hostile.examine(hostile.mutated(random.Random(number), value))


def test_the_watch_sees_what_it_watches_for() -> None:
    for code in ("eval('1')", "__import__('this_is_no_module')", "open('/dev/null')"):
        with pytest.raises(hostile.BrokenError), hostile.nothing_runs(), suppress(ImportError):
            exec(code)


def test_seeds_are_requests() -> None:
    outcomes = [hostile.examine(seed) for seed in hostile.SEEDS]
    assert outcomes.count("accepted") >= 5


def test_the_largest_formulas_that_are_let_in() -> None:
    """Each of the limits reached; what they cost is bounded by them, whatever the shape."""
    limits = Limits()
    deep = "union(" * (limits.max_depth - 1) + "base, child" + ", adult)" * (limits.max_depth - 1)
    wide = " + ".join(["0.001*union(base, child)"] * (limits.max_nodes // 6 - 1)) + " + base"
    many = {f"t{i}": {"system": "x" * limits.max_template_chars} for i in range(limits.max_terms)}
    full = json.dumps({"formula": " + ".join(many), "terms": many})
    for value in (deep, wide, full):
        assert hostile.examine(value) == "accepted"


def test_a_template_cannot_multiply_its_input() -> None:
    Term(prompt="{input}" * 16)
    with pytest.raises(FormulaError, match=r"has \{input\} 17 times; 16 is the most"):
        Term(prompt="{input}" * 17)


def test_words_of_constraints_are_bounded_together() -> None:
    longest = ["".join(random.Random(i).choices("abcdefgh", k=256)) for i in range(MAX_WORD_CHARS // 256)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Constraints(tuple(longest)).searches()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    with pytest.raises(FormulaError, match="16385 characters together; 16384 is the most"):
        Constraints.from_json({"forbid": [*longest, "x"]})

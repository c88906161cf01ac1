"""The grammar, its error sentences, and what hostile text costs."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_marith import (
    Formula,
    FormulaError,
    indicator,
    intersection,
    kl_indicator,
    mixture,
    normalize,
    plausible,
    schedule,
    self_debias,
    superseded,
    topk,
    topp,
    uniform,
    union,
)
from vllm_marith.language import Limits

from .strategies import TERMS

A, B, C = (TERMS[name] for name in "abc")


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("a", A + 0),
        (" a\n+\tb\r\n", A + B),
        ("a+b*2", A + 2 * B),
        ("(a+b)*2", 2 * (A + B)),
        ("a - b - c", A - B - C),
        ("a - (b - c)", A - (B - C)),
        ("2*3*a/4", 1.5 * A),
        ("6/3/2*a", A + 0),
        ("a/2/2", A / 4),
        ("-a*2 + 3*b", -2 * A + 3 * B),
        ("2*-a + 3*b", -2 * A + 3 * B),
        ("--a + +b", A + B),
        ("a - -b", A + B),
        (".5*a + 1.*b + 1e-3*c + 2E+1*a", 0.5 * A + B + 0.001 * C + 20 * A),
        ("(2 - 1)*a", A + 0),
        ("max(a, b)", union(A, B)),
        ("min(a, b, 0) + 2*c", intersection(A, B, 0) + 2 * C),
        ("union(max(1, 2), a) + a", union(2, A) + A),
        ("union(a, b)/2", union(A, B) / 2),
        ("((((a))))", A + 0),
        ("0*a + b", 0 * A + B),
        ("indicator(a - b)*(a - b)*2 + a", 2 * indicator(A - B) * (A - B) + A),
        ("a*indicator(b)/2 + b", indicator(B) * A / 2 + B),
        ("indicator(a)*indicator(b)*c + a", indicator(A) * (indicator(B) * C) + A),
        ("indicator(a) + a", indicator(A) + A),
        ("kl_indicator(a, b)*(a - b) + a", kl_indicator(A, B) * (A - B) + A),
        (
            "kl_indicator(a, b, 0.1, 5, 0, 1)*b + a",
            kl_indicator(A, B, 0.1, top_k=5, include_max=False) * B + A,
        ),
        ("normalize(a - 0.6*b) + c", normalize(A - 0.6 * B) + C),
        ("topk(a, 10) + topp(b, .9)", topk(A, 10) + topp(B, 0.9)),
        ("superseded(a, b)", superseded(A, B)),
        ("self_debias(a, b, 10)", self_debias(A, B, 10)),
        ("plausible(2*a - b, a, 0.1)", plausible(2 * A - B, A, 0.1)),
        ("mixture(0.5: a, 1.5: b - 0.5*c, 0: c)", mixture((0.5, A), (1.5, B - 0.5 * C))),
        ("mixture(2: a)", normalize(A)),
        ("a + 0.1*uniform", A + 0.1 * uniform),
        ("b + schedule(0: 1, 20: 0.5)*2*a", B + schedule({0: 1, 20: 0.5}) * (2 * A)),
        ("b + schedule(0: 1, 20: 0.5)", B + schedule({0: 1, 20: 0.5})),
    ],
)
def test_grammar(text, formula):
    assert Formula.parse(text, TERMS, "none") == formula.with_normalize("none")


def test_names_without_an_entry_are_plain_terms():
    formula = Formula.parse("base_1 + _x", {"unused": {"system": "y"}})
    assert {name: term.to_dict() for name, term in formula.terms.items()} == {"base_1": {}, "_x": {}}


ERRORS = [
    ("child - *adult", "expected a term or a number", 9),
    ("", "the formula is empty", None),
    (" \n", "the formula is empty", None),
    ("a -", "expected a term or a number", 4),
    ("a b", "expected an operator (+ - * /)", 3),
    ("2 a", "expected an operator (+ - * /)", 3),
    ("2(a)", "expected an operator (+ - * /)", 2),
    ("a**b", "expected a term or a number", 3),
    ("0.6adult", "expected an operator after the number 0.6, as in 2*name", 4),
    ("1.2.3*a", "expected an operator after the number 1.2, as in 2*name", 4),
    ("1e*a", "expected an operator after the number 1, as in 2*name", 2),
    ("1e999*a", "the number is too large", 1),
    ("1e300*1e300*a", "the number inf is not finite", 6),
    ("(a", "this parenthesis is never closed", 1),
    ("union(a, (b)", "this parenthesis is never closed", 6),
    ("a)", "this parenthesis was never opened", 2),
    ("()", "expected a term or a number", 2),
    ("a, b", "a comma only separates the operands of a function", 2),
    ("union(a,)", "expected a term or a number", 9),
    ("union()", "expected a term or a number", 7),
    ("a + union(b)", "union needs at least two operands", 5),
    ("max(a)", "union needs at least two operands", 1),
    ("a*b", "the product of two formulas has no meaning", 2),
    ("2/a", "a formula can only be divided by a number", 2),
    ("a/0", "a formula cannot be divided by zero", 2),
    ("a^2", "unexpected character '^'", 2),
    ("a − b", "unexpected character '−'", 3),
    ("a + 'b'", 'unexpected character "\'"', 5),
    ("unoin(a, b)", "unknown function 'unoin'", 1),
    ("__import__(a)", "unknown function '__import__'", 1),
    ("a + topk(b)", "topk takes one formula and 1 number, not 1 operands", 5),
    ("topk(b, c)", "topk(...) needs a number there, not a formula", 1),
    ("topk(2, 3)", "topk(...) needs a formula with at least one term there, not a number", 1),
    ("topk(a, 1.5)", "topk needs a whole number of at least 1, not 1.5", 1),
    ("topp(a, 0)", "topp needs a probability above 0 and at most 1, not 0", 1),
    ("plausible(a, b, 1.5)", "plausible needs a share of the largest probability", 1),
    ("self_debias(a, b, -1)", "the strength of self_debias cannot be negative (-1)", 1),
    ("mixture(a, b)", "mixture(...) takes pairs, as in mixture(0.5: a, 0.5: b)", 1),
    ("mixture(-1: a, 2: b)", "the weights of mixture(...) average probabilities", 1),
    ("mixture(0: a)", "mixture(...) needs at least one operand with a positive weight", 1),
    ("schedule(1, 2)*a", "schedule(...) takes pairs, as in schedule(0: 1, 20: 0.5)", 1),
    ("schedule(1: 2)*a", "the first position of schedule(...) must be 0", 1),
    ("schedule(0: 1, 0: 2)*a", "the positions of schedule(...) must ascend; 0 follows 0", 1),
    ("schedule(0: 1, 1.5: 2)*a", "a position of schedule(...) is a whole number of generated tokens", 1),
    ("strength(a)*b", "strength(...) needs a term that has a 'classifier'", 1),
    ("kl_indicator(a, b, 0, 0.5)*a", "kl_indicator's top_k is a whole number, 0 for all, not 0.5", 1),
    ("kl_indicator(a, b, 0, 0, 2)*a", "kl_indicator's include_max is 0 or 1, not 2", 1),
    ("union(a: b, c)", "union(...) has no 'weight: operand' pairs", 1),
    ("a : b", "a colon only stands in mixture(weight: operand, ...)", 3),
    ("uniform(a)", "unknown function 'uniform'", 1),
    ("union + a", "'union' is an operator and cannot name a term", 1),
    ("x" * 65, "the name 'xxxxxxxxxxxxxxxx…' is longer than 64 characters", 1),
]


@pytest.mark.parametrize(("text", "sentence", "column"), ERRORS, ids=[text[:20] for text, _, _ in ERRORS])
def test_errors_point_at_the_place(text, sentence, column):
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text)
    error = caught.value
    assert error.message.startswith(sentence)
    if column is None:
        assert str(error) == sentence
        return
    assert (error.text, error.position) == (text, column - 1)
    said, shown, caret = str(error).split("\n")
    fault = error.message.partition("; ")[0]
    assert said.startswith(f"{fault} at column {column}")
    assert shown == f"  {text}"
    assert caret == " " * (column + 1) + "^"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("unoin(a, b)", "; did you mean 'union'?"),
        ("foo(a, b)", "strength, superseded, topk, topp, union"),
        ("a − b", "; did you mean '-'?"),
        ("2×a", None),
        ("a ∪ b", "; did you mean 'union'?"),
    ],
)
def test_hints(text, hint):
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text)
    assert caught.value.message.endswith(hint or "unexpected character '×'; did you mean '*'?")


def test_the_whole_text_of_an_error():
    with pytest.raises(FormulaError) as caught:
        Formula.parse("child - *adult")
    assert str(caught.value) == (
        "expected a term or a number at column 9\n  child - *adult\n          ^"  # as a terminal shows it
    )


def test_an_error_on_another_line_shows_that_line():
    with pytest.raises(FormulaError) as caught:
        Formula.parse("a\n  + b\n  + $\n")
    assert str(caught.value) == "unexpected character '$' at line 3, column 5\n    + $\n      ^"


def test_an_error_in_a_long_line_shows_its_surroundings():
    text = "a + " * 200 + "? + b" + " + a" * 200
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text)
    _, shown, caret = str(caught.value).split("\n")
    assert shown.startswith("  …")
    assert shown.endswith("…")
    assert len(shown) < 110
    assert shown[len(caret) - 1] == "?"


@pytest.mark.parametrize(
    "text",
    [
        "a - topk(b, 3)",
        "2*a - union(b, topp(a, 0.5))",
        "a - 0.5*normalize(topk(b, 3))",
        "a + schedule(0: 1, 4: -0.5)*topk(b, 3)",
    ],
)
def test_filters_do_not_stand_under_negative_weights(text):
    with pytest.raises(FormulaError, match=r"stands under a negative weight.*plausible\(\.\.\.\)"):
        Formula.parse(text)


def test_filters_stand_elsewhere():
    for text in ("topk(a - 0.5*b, 3)", "a - 0.5*self_debias(b, topk(a, 3), 1)", "a - -topk(b, 3)"):
        assert str(Formula.parse(text))


def test_options_that_are_the_usual_ones_are_not_written():
    assert str(Formula.parse("a + kl_indicator(a, b, 0.5, 0, 1, 1)*b")) == "a + kl_indicator(a, b, 0.5)*b"


WEIGHT_ERRORS = [
    ("a - b", "sum to 0 (1 for a, -1 for b)"),
    ("-a", "sum to -1 (-1 for a)"),
    ("0.1*a + 0.2*b - 0.3*c", "sum to 0 (0.1 for a, 0.2 for b, -0.3 for c)"),
    ("a - a", "sum to 0 (none is left)"),
    ("a - 2", "sum to -1 (1 for a, -2 for the number)"),
    ("a - 1.5*union(b, c)", "sum to -0.5 (1 for a, -1.5 for union(b, c))"),
    ("union(a, 0)", "sum to as little as 0 for some tokens (1 for union(a, 0))"),
    ("a - union(b, 2*c)", "sum to as little as -1 for some tokens (1 for a, -1 for union(b, 2*c))"),
]


@pytest.mark.parametrize(("text", "found"), WEIGHT_ERRORS)
def test_weights_must_have_a_positive_sum(text, found):
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text)
    assert str(caught.value) == (
        f"the weights of the formula {found}, and normalize: sum divides by that sum; "
        "give weights with a positive sum, or ask for normalize: none"
    )
    assert Formula.parse(text, normalize="none").normalize == "none"


def test_weights_are_bounded():
    with pytest.raises(FormulaError, match=r"amplify log-probabilities up to 1e\+07 times; 1000000 times is"):
        Formula.parse("1e7*a")
    with pytest.raises(FormulaError, match="amplify"):
        Formula.parse("1000*union(a, 1000*union(b, 1000*c))")
    with pytest.raises(FormulaError, match="amplify"):
        Formula.parse("union(a, 1e300) + a")


HOSTILE = {
    "parentheses": "(" * 10**5,
    "closed parentheses": "(" * 2000 + "a" + ")" * 2000,
    "calls": "union(" * 10**4,
    "calls of pairs": "max(a," * 600,
    "minus signs": "-" * 10**5,
    "minus signs that fit": "-" * 4000,
    "a megabyte of name": "a" * 2**20,
    "a megabyte of sum": "a+" * 2**19,
    "a megabyte of digits": "1" * 2**20,
    "digits that fit": "1" * 4000,
    "sums that fit": "a+" * 2000,
    "products": "2*" * 2000 + "a",
    "names": "+".join(f"n{i}" for i in range(1100)),
    "zeros": "0" * 4000 + "*",
    "spaces": " " * 4095 + "!",
    "commas": "union(a" + ",a" * 5000 + ")",
    "null": "a + \0",
    "surrogate": "a + \ud800",
    "other digits": "٣*a",
    "other letters": "а - b",  # a Cyrillic letter
    "python": "().__class__.__bases__[0]",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize("limits", [Limits(), None], ids=["request", "trusted"])
def test_hostile_text_is_refused_quickly(text, limits):
    started = time.thread_time()
    with pytest.raises(FormulaError) as caught:
        Formula.parse(text, limits=limits)
    assert time.thread_time() - started < 2
    assert len(str(caught.value)) < 1000
    assert str(caught.value).encode()  # a server can send it


@given(st.text(max_size=60) | st.text(alphabet="ab12.e+-*/():, union\n", max_size=60))
def test_any_text_is_a_formula_or_a_formula_error(text):
    said, formula = "", None
    try:
        formula = Formula.parse(text, limits=Limits(), normalize="none")
    except FormulaError as error:
        said = str(error)
    assert said or Formula.parse(str(formula), formula.terms, "none") == formula


@pytest.mark.parametrize(
    ("limits", "accepted", "refused", "sentence"),
    [
        (Limits(max_terms=2), "a + b + a", "a + b + c", "the formula has more than 2 terms at column 9"),
        (
            Limits(max_nodes=5),
            "a + b + c",
            "a + b + c + a",
            "the formula has more than 5 terms, numbers and op",
        ),
        (Limits(max_depth=2), "((a))", "(((a)))", "nested more than 2 deep at column 3"),
        (Limits(max_depth=1), "union(a, b)", "union(a, (b))", "nested more than 1 deep at column 10"),
        (Limits(max_formula_chars=5), "a + b", "a  + b", "the formula has 6 characters; 5 is the most"),
    ],
)
def test_limits_are_inclusive(limits, accepted, refused, sentence):
    Formula.parse(accepted, limits=limits)
    with pytest.raises(FormulaError) as caught:
        Formula.parse(refused, limits=limits)
    assert str(caught.value).startswith(sentence)


def test_the_text_must_be_text():
    with pytest.raises(FormulaError, match="a formula must be a string, not a int"):
        Formula.parse(3)

"""Operators, names of terms, text and the other forms of a formula."""

import json
import pickle
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given

from vllm_marith import Formula, FormulaError, Term, intersection, union
from vllm_marith.language import parse_request
from vllm_marith.language.limits import TRUSTED
from vllm_marith.language.names import FREE_DRAFTERS

from .strategies import TERMS, expressions, formulas

A, B, C = (TERMS[name] for name in "abc")


@given(expressions)
def test_text_parses_back_to_the_same_formula(formula):
    unnormalised = formula.with_normalize("none")
    assert Formula.parse(str(formula), formula.terms, "none") == unnormalised
    assert hash(Formula.parse(str(formula), formula.terms, "none")) == hash(unnormalised)


@given(formulas)
def test_the_server_reads_the_same_formula_from_json(formula):
    assert parse_request(formula.to_json(), limits=TRUSTED) == formula


@given(formulas)
def test_pickle(formula):
    assert pickle.loads(pickle.dumps(formula)) == formula


@given(expressions)
def test_canonical_form_is_a_fixed_point_of_the_operators(formula):
    assert formula + 0 == formula
    assert 1 * formula == formula
    assert -1 * -formula == formula
    assert formula / 1 == formula


@pytest.mark.parametrize(
    ("built", "text"),
    [
        (A - 0.6 * B, "a - 0.6*b"),
        (A + B - C, "a + b - c"),
        (A + (B + C), "a + b + c"),
        (A - (B + C), "a - (b + c)"),
        (-A + 2 * B, "-a + 2*b"),
        (-(A + B), "-(a + b)"),
        (0.5 * 2 * A, "a"),
        (0.5 * (2 * A) * 3, "3*a"),
        (2 * A / 3, "0.6666666666666666*a"),
        (A / 4, "0.25*a"),
        (1 + A + 2, "3 + a"),
        (A + 1 - 1, "a"),
        (3 - A, "3 - a"),
        (A - 3, "a - 3"),
        (0 * A + B, "0*a + b"),
        (1e-7 * A + 123456.5 * B, "1e-07*a + 123456.5*b"),
        (sum([A, B, C]), "a + b + c"),
        (2 * union(A, B - C), "2*union(a, b - c)"),
        (intersection(A, 0, -B), "intersection(a, 0, -b)"),
        (union(1, A) * -1, "-union(1, a)"),
        (+A, "a"),
    ],
)
def test_operators_and_text(built, text):
    assert str(built) == text
    assert Formula.parse(text, TERMS, "none") == built.with_normalize("none")


@pytest.mark.parametrize("half", [0.5, np.float64(0.5), np.float32(0.5), Fraction(1, 2)])
def test_kinds_of_numbers(half):
    assert half * A == A * half == A / 2
    assert str(half + A) == "0.5 + a"
    assert str(half - A) == "0.5 - a"


def test_anonymous_terms_are_named_in_order_of_appearance():
    child, adult = Term("child"), Term("adult")
    formula = child - 0.6 * adult + 2 * union(child, Term("magic"))
    assert str(formula) == "t1 - 0.6*t2 + 2*union(t1, t3)"
    assert [term.system for term in formula.terms.values()] == ["child", "adult", "magic"]
    assert formula.leader == "t1"
    # Joined the other way round, the same terms are numbered anew.
    assert str((adult + 0) - formula) == "t1 - (t2 - 0.6*t1 + 2*union(t2, t3))"


def test_equal_terms_are_the_same_term():
    assert str(Term("x") + Term("x") + Term("y")) == "t1 + t1 + t2"
    assert str(Term("x") + Term("x", name="named")) == "named + named"
    assert Term("x", name="one") == Term("x", name="two")
    assert list((Term("x", name="one") + Term("x", name="two")).terms) == ["one", "two"]


def test_names_given_by_hand_are_never_given_again():
    assert str(Term("x") + Term("y", name="t1") + Term("z")) == "t2 + t1 + t3"


def test_terms_of_a_parsed_formula_keep_their_names():
    formula = Formula.parse("child - 0.6*adult", {"child": Term("x"), "adult": {"system": "y"}})
    assert str(2 * formula + Term("z")) == "2*(child - 0.6*adult) + t1"
    assert formula.terms["child"].name == "child"


def test_formula_is_immutable():
    formula = A + B
    with pytest.raises(AttributeError, match="immutable"):
        formula.normalize = "none"
    with pytest.raises(AttributeError, match="immutable"):
        del formula.root
    with pytest.raises(TypeError):
        formula.terms["a"] = B


def test_repr_is_python():
    formula = (A - 0.6 * B).with_normalize("none")
    assert eval(repr(formula), {"Formula": Formula}) == formula


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: A * B,
            "the product of two formulas has no meaning; one factor must be a number, an indicator(...)",
        ),
        (lambda: A / B, "a formula can only be divided by a number"),
        (lambda: 2 / A, "a formula can only be divided by a number, not be a divisor"),
        (lambda: A / 0, "a formula cannot be divided by zero"),
        (lambda: float("nan") * A, "the number nan is not finite"),
        (lambda: 1e200 * (1e200 * A), "the number inf is not finite"),
        (lambda: 10**400 * A, "a number in the formula is too large for a float"),
        (lambda: A / 1e-320, "the number inf is not finite"),
        (lambda: union(A), "union needs at least two operands"),
        (lambda: intersection(), "intersection needs at least two operands"),
        (lambda: union(A, "b"), "the operands of a function must be terms, formulas or numbers"),
        (lambda: A + Term("other", name="a"), "the name 'a' stands for two different terms"),
        (
            lambda: A + (B - C).with_normalize("none") + 2 * A,
            "formulas with normalize 'sum' and 'none' cannot",
        ),
        (lambda: (A + B).with_normalize("mean"), "normalize must be 'sum' or 'none', not 'mean'"),
        (lambda: union(1, 2).leader, "a formula needs at least one term that is a language model"),
        (lambda: union(1, 2).check(), "a formula needs at least one term"),
        (lambda: Formula.parse("a", {"b c": Term()}), "'b c' cannot name a term; names have letters"),
        (lambda: Formula((A + B).root, {"a": A}), "the term 'b' is not defined"),
    ],
)
def test_refusals(make, sentence):
    with pytest.raises(FormulaError) as caught:
        make()
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("other", ["a", None, True, [1.0], 1j])
def test_operands_of_other_kinds(other):
    for make in (lambda: A + other, lambda: other - A, lambda: A * other, lambda: (A + B) / other):
        with pytest.raises((TypeError, FormulaError)):
            make()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"system": 3}, "'system' of a term must be a string, not a int"),
        ({"system": "x", "prompt": "y"}, "a term has either 'system' or 'prompt', not both"),
        ({"model": "../weights"}, "'model' of a term must be a name that the server knows"),
        ({"adapter": "org/adapter"}, "'adapter' of a term must be a name that the server knows"),
        ({"model": ".."}, "'model' of a term must be a name that the server knows"),
        ({"prompt": "\ud800"}, "'prompt' of a term has half of a surrogate pair"),
        ({"classifier": ""}, "'classifier' of a term must be a name that the server knows"),
        ({"model": "x" * 65}, "'model' of a term must be a name that the server knows"),
        ({"model": "m\n"}, "'model' of a term must be a name that the server knows"),
        ({"speculative_factor": 0}, "'speculative_factor' of a term must be a whole number of at least 1"),
        ({"speculative_factor": True}, "'speculative_factor' of a term must be a whole number of at least 1"),
        ({"model": "ngram", "system": ""}, "'system' belongs to a language model, and the model 'ngram' is"),
        (
            {"model": "suffix", "system": ""},
            "'system' belongs to a language model, and the model 'suffix' is",
        ),
        ({"model": "ngram", "prompt": "x"}, "'prompt' belongs to a language model"),
        ({"model": "ngram", "adapter": "x"}, "'adapter' belongs to a language model"),
        ({"model": "ngram", "speculative_factor": 2}, "'speculative_factor' belongs to a language model"),
        ({"name": "2x"}, "'2x' cannot name a term"),
        ({"name": "union"}, "'union' is an operator and cannot name a term"),
        ({"name": "topk"}, "'topk' is an operator and cannot name a term"),
        ({"name": "x" * 65}, "the name 'xxxxxxxxxxxxxxxx…' is longer than 64 characters"),
        ({"name": 3}, "a term's name must be a string, not a int"),
    ],
)
def test_term_fields(fields, sentence):
    with pytest.raises(FormulaError) as caught:
        Term(**fields)
    assert str(caught.value).startswith(sentence)


def test_needs():
    terms = {
        "plain": {},
        "big": {"model": "big", "speculative_factor": 4},
        "tuned": {"adapter": "tuned"},
        "judge": {"classifier": "judge"},
    }
    formula = Formula.parse("plain + big + tuned + judge", terms)
    assert formula.needs == {
        "big": ("model", "speculative_factor"),
        "tuned": ("adapter",),
        "judge": ("classifier",),
    }


@pytest.mark.parametrize("model", FREE_DRAFTERS)
@pytest.mark.parametrize("text", ["n", "a + n", "0*n + a", "superseded(a, n)", "superseded(2*n, a)"])
def test_earlier_text_only_drafts(text, model):
    with pytest.raises(FormulaError, match=f"the term 'n' has the model '{model}', which has no probab"):
        Formula.parse(text, {"n": {"model": model}})


@pytest.mark.parametrize("model", FREE_DRAFTERS)
def test_what_drafts_from_earlier_text_needs_nothing_and_has_no_logits(model):
    formula = Formula.parse("superseded(n, superseded(n, a)) + b", {"n": {"model": model}})
    assert (formula.needs, formula.leader) == ({}, "a")
    logits = {name: np.arange(4.0) ** i for i, name in enumerate("ab")}
    expected = Formula.parse("a + b").evaluate(logits)
    np.testing.assert_array_equal(formula.evaluate(logits), expected)


def test_render():
    assert Term().render("hi") == "hi"
    assert Term("Be kind.").render("hi") == "Be kind.\nhi"
    assert Term(prompt='{"q": "{input}"} {x} %s').render("{input}!") == '{"q": "{input}!"} {x} %s'
    assert Term("").render("hi") == "\nhi"


def test_nesting_is_bounded_however_a_formula_is_made():
    formula = A + B
    for _ in range(64):
        formula = union(formula, C)
    with pytest.raises(FormulaError, match="nested more than 64 deep"):
        union(formula, C)


def test_sampling_params(monkeypatch):
    class SamplingParams:
        def __init__(self, **kwargs):
            self.__dict__.update(kwargs)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SamplingParams))
    formula = A - 0.6 * B
    mine = {"other": 1}
    params = formula.sampling_params(max_tokens=5, extra_args=mine)
    assert params.max_tokens == 5
    assert params.extra_args["other"] == 1
    assert json.loads(params.extra_args["marith"]) == {
        "formula": "a - 0.6*b",
        "terms": {"a": {"system": "You are a."}, "b": {"system": "You are b."}},
        "normalize": "sum",
    }
    assert mine == {"other": 1}
    with pytest.raises(FormulaError, match="extra_args already carry a formula"):
        formula.sampling_params(extra_args={"marith": "a"})
    with pytest.raises(FormulaError, match="the weights of the formula sum to 0"):
        (A - B).sampling_params()


def test_sampling_params_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vLLM cannot be imported here; install it with"):
        (A + B).sampling_params()

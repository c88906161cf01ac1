"""What `formula.explain()` shows."""

from hypothesis import given

from tests.language.strategies import operator_formulas
from vllm_marith import Formula

TERMS = {
    "child": {"system": "You are a child."},
    "adult": {"system": "You are an adult. " * 10},
    "magic": {"prompt": "Always talk about magic.\n{input}", "model": "small"},
}


def test_a_formula_with_a_constant_sum():
    assert Formula.parse("child - 0.6*adult + 2*union(child, magic)", TERMS).explain() == (
        "formula    child - 0.6*adult + 2*union(child, magic)\n"
        "normalize  sum: softmax(E / N), N = 2.4\n"
        "weights      0.416667  child\n"
        "                -0.25  adult\n"
        "             0.833333  union(child, magic)\n"
        "terms      child  system 'You are a child.'  (leader)\n"
        "           adult  system 'You are an adult. You are an adult. You are an adult. You a…'\n"
        "           magic  prompt 'Always talk about magic.\\n{input}', model small\n"
        "forward    3 rows a token, one for each term\n"
        "fusion     nonlinear, log-sum-exp of every term first; 1 slot\n"
        "program    push     0.833333 * child\n"
        "           max      0.833333 * magic\n"
        "           add      0.416667 * child\n"
        "           add      -0.25 * adult"
    )


def test_a_formula_that_divides_per_token():
    text = Formula.parse("union(2*child, 0.5*magic) + 1", TERMS).explain()
    assert "sum: softmax(E / N), N from 1.5 to 3 from token to token" in text
    assert "; divides by N per token" in text
    assert text.endswith("add      1")


def test_terms_that_do_no_work():
    text = Formula.parse("0*a - b + b + child", TERMS).explain()
    assert "a      the request as it is  (leader, weight 0)" in text
    assert "b      the request as it is  (not run: it only drafts, or its weights cancel)" in text
    assert "forward    2 rows a token" in text
    assert "fusion     linear, one pass over the logits; 1 slot" in text


def test_stages():
    terms = TERMS | {"judge": {"classifier": "formality", "label": "formal"}}
    text = "topk(child, 5) + 0.5*schedule(0: 1, 9: 2)*(adult - child) + judge"
    assert Formula.parse(text, terms).explain() == (
        "formula    topk(child, 5) + 0.5*schedule(0: 1, 9: 2)*(adult - child) + judge\n"
        "normalize  sum: softmax(E / N), N = 1\n"
        "weights             1  topk(child, 5)\n"
        "                  0.5  schedule(0: 1, 9: 2)*(adult - child)\n"
        "                    1  judge\n"
        "terms      child  system 'You are a child.'  (leader)\n"
        "           adult  system 'You are an adult. You are an adult. You are an adult. You a…'\n"
        "           judge  classifier formality, label formal\n"
        "forward    2 rows a token, one for each term; classifiers on the likeliest tokens: judge\n"
        "fusion     4 stages, each a row of its own; 1 slot\n"
        "stage 1    push     child\n"
        "           top_k    5\n"
        "stage 2    push     adult\n"
        "           add      -1 * child\n"
        "           scale    0.5 * schedule(0: 1, 9: 2)\n"
        "           add      (stage 1)\n"
        "stage 3    judge on the likeliest tokens of (stage 2)\n"
        "stage 4    push     (stage 2)\n"
        "           add      (stage 3)"
    )


def test_unnormalized():
    text = Formula.parse("child - adult", TERMS, normalize="none").explain()
    assert "normalize  none: softmax(E)" in text
    assert "                -1  adult" in text


def test_drafts():
    terms = {
        "big": {"model": "big", "speculative_factor": 3},
        "warm": {"system": "warm", "model": "big", "speculative_factor": 9},
        "recent": {"model": "ngram"},
        "early": {"model": "suffix"},
    }

    def lines(text):
        return [line for line in Formula.parse(text, terms).explain().splitlines() if not line.isspace()]

    explained = lines("superseded(small, big) + 0.5*warm")
    assert "           small  the request as it is  (only drafts)" in explained
    assert "forward    2 rows a token, one for each term" in explained
    first = explained.index("drafts     2 tokens of small, tested by big")
    assert explained[first + 1] == "           8 tokens of big, tested by the formula"
    explained = lines("superseded(recent, big)")
    assert "           recent  model ngram  (only drafts)" in explained
    assert "drafts     2 tokens of n-grams, tested by the formula" in explained
    explained = lines("superseded(early, big)")
    assert "           early  model suffix  (only drafts)" in explained
    assert "drafts     2 tokens of suffixes, of earlier answers, too, tested by the formula" in explained
    assert any(
        line.startswith("drafts     none: what runs for every token, -small, makes no distribution")
        for line in lines("2*big - small")
    )
    assert not any(line.startswith("drafts") for line in lines("small"))


@given(operator_formulas)
def test_every_formula_can_be_explained(formula):
    lines = formula.explain().splitlines()
    assert all(len(line) > 11 for line in lines)
    assert not any(line != line.rstrip() for line in lines)

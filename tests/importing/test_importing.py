"""Files of the reference implementation become presets with the same numbers, or a sentence."""

import numpy as np
import pytest

from tests.support import golden
from tests.support.saved_formulas import (
    INPUT,
    SYSTEM,
    autocomplete,
    classifier,
    classifier_strength,
    intersection,
    kl_indicator,
    max_,
    min_,
    model,
    plain,
    saved,
    self_debias,
    superseded,
    top_p_top_k,
    union,
)
from vllm_marith import Presets, Term
from vllm_marith.importing import preset_name, read_saved
from vllm_marith.plan import Speculation, speculate

A, B, M = model("A"), model("B"), plain()
CHILD, ADULT, MAGIC, TOXIC, NONE = model("child"), model("adult"), model("magic"), model("toxic"), plain()
OTHER_ADULT, BIG = model("adult", "hub/other"), plain("hub/other")
# The golden cases' formulas, in the reference's classes; see each case's "reference".
GOLDEN = {
    "single": CHILD,
    "scaled_single": 0.25 * CHILD,
    "sub_readme": CHILD - 0.6 * ADULT,
    "add_half": CHILD + 0.5 * ADULT,
    "weights_not_1": 0.3 * CHILD + 0.2 * ADULT,
    "union": union(CHILD, MAGIC),
    "intersection": intersection(CHILD, MAGIC),
    "union_weighted": union(2 * CHILD, 0.5 * MAGIC),
    "nested_readme": CHILD - 0.6 * ADULT + 2 * union(CHILD, MAGIC),
    "toxic_union": NONE - 0.96 * union(TOXIC, NONE),
    "toxic_linear": NONE - 0.6 * TOXIC,
    "max_zero": NONE - 0.9 * max_(TOXIC - NONE, 0),
    "indicator": NONE - 0.9 * saved("Indicator", formula=TOXIC - NONE) * (TOXIC - NONE),
    "selfdebias": self_debias(NONE, TOXIC, 10),
    "toppk": top_p_top_k(CHILD, top_k=10) + ADULT,
    "superseded": superseded(CHILD, OTHER_ADULT),
    "two_models": CHILD + 0.5 * OTHER_ADULT,
    "proxy_tuning": BIG + (CHILD - NONE),
    "proxy_tuning_scaled": 2 * BIG + 1.0 * (CHILD - NONE),
    "abs_sum5": NONE + 0.2 * CHILD + 0.5 * ADULT + 0.05 * MAGIC - 0.1 * TOXIC,
    "normalize_op": saved("Normalize", formula=CHILD - 0.6 * ADULT) + MAGIC,
}
# What the golden vectors call the terms that are called otherwise here.
GOLDEN_NAMES = {"base": "none"}


def reloaded(imported, tmp_path, name="f"):
    """The preset that a server reads from the file that was written."""
    (tmp_path / f"{name}.yaml").write_text(imported.to_yaml(name), encoding="utf-8")
    return Presets.load(tmp_path).formulas[name]


@pytest.mark.parametrize("case", golden.CASES)
def test_the_golden_formulas(case, tmp_path):
    file = GOLDEN[case.partition("/")[2]]
    imported = read_saved(file.text(), base="hub/big")
    formula = reloaded(imported, tmp_path)
    assert formula == imported.formula
    inputs = golden.logits(case)
    # In proxy_tuning, hub/other is the golden vectors' big, a plain term of another model.
    names = {name: "big" if term == Term(model="other") else name for name, term in formula.terms.items()}
    assert {GOLDEN_NAMES.get(name, name) for name in names.values()} == set(inputs)
    result = formula.evaluate({name: inputs[GOLDEN_NAMES.get(told, told)] for name, told in names.items()})
    golden.expected(case).assert_equals(result)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


TERMS = {
    "a": Term(prompt="A\n{input}"),
    "b": Term(prompt="B\n{input}"),
    "base": Term(),
    "ngram": Term(model="ngram"),
}


@pytest.mark.parametrize(
    ("file", "formula"),
    [
        (A + 1, "a + 1"),
        (3 - A, "-a + 3"),
        (A * 2 * 0.25, "0.5*a"),
        (saved("Sum", terms=[A, 0.5]), "a + 0.5"),
        (saved("Sum", terms=[A, saved("OptimizableConstant", init_val=0.5, use_norm=True) * B]), "a + 0.5*b"),
        (saved("AddNorm", formula=A - 0.5 * B, anything="else"), "a - 0.5*b"),
        (A + 0.5 * saved("Uniform", model_name="hub/big"), "a + 0.5*uniform"),
        (min_(A, B), "intersection(a, b)"),
        # On a tie the reference gives the minimum the weight of the second operand, and we of the first.
        (min_(2 * A, B), "intersection(b, 2*a)"),
        (max_(2 * A, B), "union(2*a, b)"),
        (M + max_(A, B, include_norm=False), "base + union(a, b)"),
        (kl_indicator(A, B) * (B - A) + M, "kl_indicator(a, b)*(b - a) + base"),
        (
            M + kl_indicator(A, B, divergence=0.1, include_max=False, minimize=False, top_k=5) * B,
            "base + kl_indicator(a, b, 0.1, 5, 0, 0)*b",
        ),
        (top_p_top_k(A + B, top_p=0.8, top_k=7), "topp(topk(a + b, 7), 0.8)"),
        (top_p_top_k(A, top_p=0.8) + B, "topp(a, 0.8) + b"),
        (top_p_top_k(A + B) + M, "topp(a + b, 1) + base"),
        (
            top_p_top_k(A + B, top_k=7, temperature=0.5) + M,
            "2*topk(normalize(2*normalize(a + b) - uniform), 7) + base",
        ),
        (superseded(A, B) + 0.5 * M, "superseded(a, b) + 0.5*base"),
        (superseded(A, B + M), "superseded(a, b + base)"),
        (superseded(autocomplete(), B) + 0.5 * M, "superseded(ngram, b) + 0.5*base"),
        (
            self_debias(superseded(A, B), top_p_top_k(M, top_k=5), 50),
            "self_debias(superseded(a, b), topk(base, 5), 50)",
        ),
    ],
)
def test_every_operator(file, formula, tmp_path):
    found = reloaded(read_saved(file.text()), tmp_path)
    assert str(found) == formula
    assert dict(found.terms) == {name: TERMS[name] for name in found.terms}
    assert found.normalize == "sum"


def test_a_temperature_is_that_of_the_filtered_distribution():
    """E = N log softmax(log P / T), which is what the reference adds to the other term."""
    formula = read_saved((top_p_top_k(A + B, temperature=0.5) + M).text()).formula
    random = np.random.default_rng(7)
    logits = {name: 2 * random.standard_normal((3, 50)) for name in ("a", "b", "base")}
    a, b, m = (log_softmax(x) for x in logits.values())
    tempered = log_softmax((a + b) / 2 / 0.5)
    expected = log_softmax((2 * tempered + m) / 3)
    np.testing.assert_allclose(formula.evaluate(logits), expected, rtol=1e-10)


def test_weights_that_cancel_are_not_divided_by(tmp_path):
    imported = read_saved((A - B).text())
    assert imported.formula.normalize == "none"
    assert reloaded(imported, tmp_path) == imported.formula
    assert any("sum to 0" in note for note in imported.notes)


def test_terms_are_what_the_models_read(tmp_path):
    file = (
        model("You are a child.", factor=3)
        + model("You are a child.", template=f"[{SYSTEM}] {INPUT} [{SYSTEM}]: {{}}")
        + model("Größe", template=f"{INPUT}{SYSTEM}")
        + model("", template="")
        + plain(factor=2)
        + plain()
        + plain("hub/x.y/Llama 2")
        + model("Union")
        + model("7 dwarfs")
    )
    imported = read_saved(file.text(), base="hub/big", name="plain")
    assert dict(reloaded(imported, tmp_path).terms) == {
        "you_are_a_child": Term(prompt="You are a child.\n{input}", speculative_factor=3),
        "you_are_a_child_2": Term(prompt="[You are a child.] {input} [You are a child.]: {}"),
        "gr_e": Term(prompt="{input}Größe"),
        "plain_2": Term(prompt=""),
        "plain_3": Term(speculative_factor=2),
        "base": Term(),
        "llama_2": Term(model="Llama-2"),
        "union_2": Term(prompt="Union\n{input}"),
        "term_7_dwarfs": Term(prompt="7 dwarfs\n{input}"),
    }
    notes = " ".join(imported.notes)
    assert "Needs a constituent model 'Llama-2' on the server: hub/x.y/Llama 2." in notes
    assert "runs terms with different templates as one" in notes


@pytest.mark.parametrize(
    ("file", "base", "models"),
    [
        (A + B, None, [None, None]),
        (model("A", None) + B, None, [None, "big"]),
        (model("A", "x/one") + model("B", "y/two"), None, [None, "two"]),
        (model("A", "x/one") + model("B", "y/two"), "y/two", ["one", None]),
        (model("A", "x/one") + model("B", "y/one"), "y/one", ["one", None]),
        (model("A", "x/one") + model("B", "y/one") + model("C", "z"), "z", ["one", "one_2", None]),
        (saved("any", formula=A + model("B", None), default_model="x/one"), None, ["big", None]),
        (saved("any", formula=A + model("B", None), default_model=None), None, [None, None]),
        # What only drafts is not what the client sees.
        (superseded(model("A", "x/small"), model("B", "y/large")), None, [None, "small"]),
    ],
)
def test_which_model_is_the_base(file, base, models):
    if file["class"] == "any":  # what save_pretrained writes has no class of its own
        del file["class"]
    assert [term.model for term in read_saved(file.text(), base=base).formula.terms.values()] == models


def test_classifiers(tmp_path):
    toxic = classifier(M, index=2, minimize=True, n_runs_per_sample=20)
    whole = M + 0.5 * toxic + 0.1 * min_(classifier(M, "hub/other", use_bayes=False), B)
    imported = read_saved(whole.text())
    assert dict(reloaded(imported, tmp_path).terms) == {
        "base": Term(),
        "judge": Term(classifier="judge", label=2, minimize=True, top_k=20),
        "other": Term(classifier="other", form="plain"),
        "b": TERMS["b"],
    }
    assert str(imported.formula) == "base + 0.5*judge + 0.1*intersection(other, b)"
    assert any("likeliest tokens of the formula without its classifiers" in note for note in imported.notes)
    assert not any(
        "hub/unused" in note for note in read_saved((M + classifier(plain("hub/unused"))).text()).notes
    )
    imported = read_saved((M - 0.5 * B + classifier(M - 0.5 * B) * 0.04).text())
    assert not any("likeliest tokens" in note for note in imported.notes)
    imported = read_saved((M + classifier_strength() * A + 0.1 * classifier(M)).text())
    assert str(reloaded(imported, tmp_path)) == "base + strength(judge)*a + 0.1*judge"


def test_factors_that_nothing_drafts_for():
    imported = read_saved((plain(factor=4) + 0.5 * model("B", factor=2)).text())
    assert {term.speculative_factor for term in imported.formula.terms.values()} == {1}
    assert any("none could draft" in note for note in imported.notes)


def test_n_grams_draft_where_an_autocomplete_did(tmp_path):
    imported = read_saved((superseded(autocomplete(), plain(factor=4)) + 0.5 * model("B", factor=9)).text())
    formula = reloaded(imported, tmp_path)
    assert formula.terms["ngram"] == Term(model="ngram")
    assert {name: term.speculative_factor for name, term in formula.terms.items()} == {
        "plain": 4,
        "ngram": 1,
        "b": 9,
    }
    speculation = speculate(formula)
    assert isinstance(speculation, Speculation)
    assert (speculation.free, speculation.lengths) == ("ngram", (3, 8))
    assert any("drafts from a corpus" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my formula", "my_formula"),
        ("7b", "f_7b"),
        ("union", "f_union"),
        ("base", "f_base"),
        ("é", "imported"),
    ],
)
def test_a_presets_name_is_an_identifier(text, name):
    assert preset_name(text) == name

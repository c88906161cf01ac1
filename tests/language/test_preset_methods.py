"""The shipped presets against their methods: numpy formulas from the papers, in the papers' own words.

Nothing here uses a formula's tree.  Arguments are logits [..., vocab]; of a classifier, `energy` is
log p(y | text + x) - log p(y | text).  Results are probabilities.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.plan.interpreter import run
from vllm_marith import FormulaError, Presets, parse_request
from vllm_marith.plan import lower

SHIPPED = Path(__file__).parents[2] / "configs" / "presets"
FOLDERS = (SHIPPED, SHIPPED / "experts", SHIPPED / "classifiers")
PRESETS = Presets.load(*FOLDERS)
VOCABULARY = 64


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def proportional(weights):
    return weights / weights.sum(-1, keepdims=True)


def guided(conditional, unconditional, guidance):
    """2306.17806: log P = log P(w) + guidance (log P(w | c) - log P(w)), up to a constant."""
    p, q = softmax(conditional), softmax(unconditional)
    return proportional(q * (p / q) ** guidance)


def context_aware(in_context, base, alpha):
    """2305.14739, equation 1: softmax((1 + alpha) logits(y | c, x) - alpha logits(y | x))."""
    return softmax((1 + alpha) * in_context - alpha * base)


def preadd(base, toxic, strength):
    """2307.03214: log P(x) + a (log P(x | prefix) - log P(x)), with a = -strength / (1 - strength)."""
    alpha = -strength / (1 - strength)
    return softmax(base + alpha * (toxic - base))


def detox_union(base, toxic, strength):
    """2311.14479: P minimises KL(P || M) - strength * union(T, M), divided by the weights that are left."""
    p, q = softmax(base), softmax(toxic)
    return proportional((p / np.maximum(p, q) ** strength) ** (1 / (1 - strength)))


def detox_classifier(base, toxic, energy, strength, classifier_strength):
    """2311.14479: as above, and p(y | text + x) / p(y | text) to the power of its strength."""
    p, q = softmax(base), softmax(toxic)
    weighted = p / np.maximum(p, q) ** strength * np.exp(energy) ** classifier_strength
    return proportional(weighted ** (1 / (1 - strength)))


def self_debiasing(base, biased, strength):
    """2103.00453: alpha(D) p with D = p - p_biased, alpha(D) = 1 where D >= 0, exp(strength D) elsewhere."""
    p, q = softmax(base), softmax(biased)
    return proportional(np.where(p >= q, 1.0, np.exp(strength * (p - q))) * p)


def experts(base, expert, anti, alpha):
    """2105.03023, equation 2: softmax(z + alpha (z+ - z-)); 2401.08565 and 2310.12962 have the same form."""
    return softmax(base + alpha * (expert - anti))


def proportional_change(base, tuned, untuned, strength):
    """2310.12962: P ∝ big * (tuned / untuned), the ratio to the power of the strength."""
    return proportional(softmax(base) * (softmax(tuned) / softmax(untuned)) ** strength)


def contrastive(expert, amateur, alpha, amateur_temperature):
    """2210.15097, equations 2 to 4: log (p_exp / p_ama) where p_exp >= alpha max p_exp, else -inf."""
    p, q = softmax(expert), softmax(amateur / amateur_temperature)
    return proportional(np.where(p >= alpha * p.max(-1, keepdims=True), p / q, 0.0))


def realigned(reference, aligned, realignment):
    """2402.02992: the geometric mean of the two policies, aligned^lambda reference^(1 - lambda)."""
    return proportional(softmax(aligned) ** realignment * softmax(reference) ** (1 - realignment))


def objectives(first, second, helpfulness, harmlessness):
    """2406.18853: the product of the policies to the power of their weights, which sum to 1."""
    total = helpfulness + harmlessness
    p, q = softmax(first), softmax(second)
    return proportional(p ** (helpfulness / total) * q ** (harmlessness / total))


def product(first, second):
    """Hinton 2002, equation 1: the product of the experts' probabilities, normalised."""
    return proportional(softmax(first) * softmax(second))


def average(first, second, weight):
    """2502.01662: the weighted average of probabilities."""
    return weight * softmax(first) + (1 - weight) * softmax(second)


def drafted(large, draft):
    """2211.17192: what is sampled is distributed as the large model has it."""
    return softmax(large)


def fudge(base, energy, strength):
    """2104.05218, equation 2: P(x | a) ∝ P(a | x_1..i) P(x_i | x_1..i-1), the classifier's by its power."""
    return proportional(softmax(base) * np.exp(energy) ** strength)


# Preset -> (method, terms in the method's order, parameters other than the defaults).
METHODS = {
    "cfg": (guided, ("base", "unprompted"), {"guidance": 4.0}),
    "cfg_negative": (guided, ("base", "unwanted"), {"guidance": 1.25}),
    "cad": (context_aware, ("in_context", "base"), {"alpha": 1.0}),
    "preadd": (preadd, ("base", "toxic"), {"strength": 0.5}),
    "detox_linear": (preadd, ("base", "toxic"), {"strength": 0.3}),
    "detox_union": (detox_union, ("base", "toxic"), {"strength": 0.9}),
    "self_debiasing": (self_debiasing, ("base", "toxic"), {"strength": 100.0}),
    "dera": (realigned, ("base", "aligned"), {"realignment": 1.5}),
    "mod": (objectives, ("helpful", "harmless"), {"helpfulness": 0.9, "harmlessness": 0.3}),
    "poe": (product, ("formal", "easy"), {}),
    "ensemble": (average, ("formal", "easy"), {"weight": 0.8}),
    "contrastive_prompt": (contrastive, ("base", "misled"), {"alpha": 0.3, "amateur_temperature": 0.5}),
    "contrastive": (contrastive, ("base", "draft"), {"alpha": 0.02, "amateur_temperature": 0.5}),
    "dexperts": (experts, ("base", "expert", "anti"), {"alpha": 3.2}),
    "proxy_tuning": (experts, ("base", "expert", "draft"), {"alpha": 0.4}),
    "emulated_fine_tuning": (proportional_change, ("base", "expert", "draft"), {"strength": 0.7}),
    "ensemble_models": (average, ("base", "expert"), {"weight": 0.25}),
    "poe_models": (product, ("base", "expert"), {}),
    "speculative": (drafted, ("large", "draft"), {}),
    "fudge": (fudge, ("base", "legal_class"), {"strength": 3.0}),
    "detox_classifier": (
        detox_classifier,
        ("base", "toxic", "not_code_class"),
        {"strength": 0.9, "classifier_strength": 0.2},
    ),
}


def test_every_preset_has_its_method():
    assert METHODS.keys() == PRESETS.presets.keys()
    for name, (_, _, changed) in METHODS.items():
        assert changed.keys() == PRESETS.presets[name].parameters.keys(), name


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("name", METHODS)
def test_its_numbers_are_those_of_the_paper(name, changed):
    method, terms, values = METHODS[name]
    parameters = {**PRESETS.presets[name].parameters, **(values if changed else {})}
    formula = PRESETS.formula(name, values if changed else {})
    assert set(formula.terms) == set(terms)
    random = np.random.default_rng(2026)
    inputs = {term: 2 * random.standard_normal((5, VOCABULARY)) for term in terms}
    expected = method(*(inputs[term] for term in terms), **parameters)
    for result in (formula.evaluate(inputs), run(lower(formula), inputs)):
        np.testing.assert_allclose(np.exp(result), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_request_changes_its_parameters(name):
    values = METHODS[name][2]
    request = f'{{"formula": "{name}", "parameters": {str(values).replace(chr(39), chr(34))}}}'
    assert parse_request(request, presets=PRESETS) == PRESETS.formula(name, values)


def test_numbers_made_of_parameters_are_numbers():
    assert str(PRESETS.formula("cfg", {"guidance": 3})) == "3*base - 2*unprompted"
    assert str(PRESETS.formula("ensemble", {"weight": 1})) == "normalize(formal)"
    with pytest.raises(FormulaError, match="average probabilities and cannot be negative"):
        PRESETS.formula("ensemble", {"weight": 1.5})
    with pytest.raises(FormulaError, match="the weights of the formula sum to 0"):
        PRESETS.formula("preadd", {"strength": 1})
    with pytest.raises(FormulaError, match="cannot be divided by zero"):
        PRESETS.formula("contrastive_prompt", {"amateur_temperature": 0})


@pytest.mark.parametrize("folders", [FOLDERS[:1], FOLDERS[:2], (FOLDERS[0], FOLDERS[2]), FOLDERS[::-1]])
def test_folders_are_named_in_any_combination(folders):
    presets = Presets.load(*folders)
    assert set(presets.presets) == {
        name for name in METHODS if any((folder / f"{name}.yaml").is_file() for folder in folders)
    }


def test_what_the_folders_need():
    needs = {
        folder.name: {
            (field, getattr(term, field))
            for name in METHODS
            if (folder / f"{name}.yaml").is_file()
            for term in PRESETS.formulas[name].terms.values()
            for field in term.needs
        }
        for folder in FOLDERS
    }
    assert needs == {
        "presets": set(),
        "experts": {("model", "draft"), ("model", "expert"), ("model", "anti"), ("speculative_factor", 4)},
        "classifiers": {("classifier", "judge")},
    }

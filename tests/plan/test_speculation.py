"""Partial formulas, levels, and the law of what speculative sampling with them gives."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.language.strategies import TERMS, generic_logits, operator_formulas
from tests.support.enumeration import enumerate_paths
from tests.support.speculation import drafted, generated, law, models_of, random_terms, sampled, verified
from vllm_marith import Formula, FormulaError
from vllm_marith.language.algebra import simplify
from vllm_marith.language.building import add, scale
from vllm_marith.language.nodes import Superseded, leaf_names, walk
from vllm_marith.plan import best_length, decode, encode, lower, partial, speculate

from .interpreter import run

VOCAB, COUNT = 3, 2


def formula_of(text, normalize="sum", **factors):
    """Over the terms a .. f; `b=3` gives b the speculative factor 3, `g` is an n-gram."""
    terms = {name: {"system": name, "speculative_factor": factors.get(name, 1)} for name in "abcdef"}
    terms |= {"g": {"model": "ngram"}, "judge": {"classifier": "judge"}}
    return Formula.parse(text, terms, normalize)


def speculation_of(text, normalize="sum", length=None, limit=None, **factors):
    return speculate(formula_of(text, normalize, **factors), length, limit)


# --- The law ----------------------------------------------------------------------------------------------

# Every operator with its lagging terms in each of its places, and what drafts for it.
DRAFTED = [
    ("a + 0.6*b", "a"),
    ("b - 0.4*a + a", "-0.4*a + a"),
    ("(a - 0.6*b)/4 + 1", "0.25*a + 1"),
    ("a + union(a, b)", "a"),
    ("2*a - union(b, c - a)", "2*a"),
    ("a + intersection(b, 2*a) + 0.5*uniform", "a + 0.5*uniform"),
    ("a + 0.5*indicator(a - c)*(b + c)", "a + 0.5*indicator(a - c)*c"),
    ("a + 0.5*indicator(b - c)*c", "a"),
    ("a + 0.5*kl_indicator(b, a, 0.01)*(a - c)", "a"),
    ("normalize(a + b) + a", "normalize(a) + a"),
    ("topk(a + b, 2)", "topk(a, 2)"),
    ("2*topp(a + b, 0.7) + c", "2*topp(a, 0.7) + c"),
    ("self_debias(a, b, 5)", "normalize(a)"),
    ("self_debias(a + b, c, 5)", "self_debias(a, c, 5)"),
    ("mixture(1: a, 2: b, 0.5: uniform)", "mixture(1: a, 0.5: uniform)"),
    ("a + plausible(c, b, 0.2)", "a + c"),
    ("plausible(a + b, a, 0.2)", "plausible(a, a, 0.2)"),
    ("superseded(c, b)", "c"),
    ("superseded(c, a)", "c"),
    ("a + union(superseded(c, b), a)", "a + union(c, a)"),
    ("a + schedule(0: 0.5, 1: 2)*b + schedule(0: 1, 1: 0.5)*c", "a + schedule(0: 1, 1: 0.5)*c"),
]


@pytest.mark.parametrize(("text", "expected"), DRAFTED)
def test_partial_formulas(text, expected):
    speculation = speculation_of(text, b=3, length=2)
    assert [str(level.formula) for level in speculation.levels] == [expected]
    assert speculation.lengths == (2,)


def _enumerated(formula, temperature, top_k, seed=0):
    logits = random_terms("abcdef", VOCAB, seed)
    speculation = speculate(formula, length=2)
    models = models_of(formula, speculation, logits, temperature, top_k)
    found = enumerate_paths(lambda chooser: generated(chooser, models, speculation.lengths, COUNT))
    return found, law(models[-1], VOCAB, COUNT)


def _distance(found, expected):
    return max(abs(found.get(tokens, 0) - expected.get(tokens, 0)) for tokens in {*found, *expected})


@pytest.mark.parametrize("text", [text for text, _ in DRAFTED])
@pytest.mark.parametrize(("temperature", "top_k"), [(1, 0), (0.7, 2), (0, 0)])
def test_what_is_drafted_has_the_law_of_the_formula(text, temperature, top_k):
    found, expected = _enumerated(formula_of(text, b=3), temperature, top_k, seed=len(text))
    assert _distance(found, expected) <= 1e-9
    assert abs(sum(found.values()) - 1) <= 1e-9


@pytest.mark.parametrize(
    ("text", "factors", "levels"),
    [
        ("a + 0.6*b - 0.4*c", dict(b=2, c=3), ["a", "a + 0.6*b"]),
        ("a + union(b, a) + c", dict(b=2, c=3), ["a", "a + union(b, a)"]),
        ("superseded(d, a) + 0.5*c", dict(a=2, c=3), ["d", "a"]),
        ("superseded(e, superseded(d, a))", dict(d=2, a=3), ["e", "d"]),
        ("mixture(1: a, 1: b, 2: c)", dict(b=2, c=3), ["normalize(a)", "mixture(1: a, 1: b)"]),
        ("a + topk(b + c, 2)", dict(b=2, c=3), ["a", "a + topk(b, 2)"]),
    ],
)
@pytest.mark.parametrize(("temperature", "top_k"), [(1, 0), (0.7, 2), (0, 0)])
def test_levels_nest(text, factors, levels, temperature, top_k):
    formula = formula_of(text, **factors)
    speculation = speculate(formula)
    assert [str(level.formula) for level in speculation.levels] == levels
    assert [level.factor for level in speculation.levels] == [1, 2]
    assert speculation.lengths == (1, 2)
    found, expected = _enumerated(formula, temperature, top_k, seed=3)
    assert _distance(found, expected) <= 1e-9


def test_formulas_that_are_not_normalized():
    formula = formula_of("plausible(a - b, a, 0.1)", "none", b=3)
    found, expected = _enumerated(formula, 1, 0)
    assert _distance(found, expected) <= 1e-9


NESTED = dict(text="a + 0.6*b - 0.4*c", b=2, c=3)


def _at_another_temperature(chooser, prefix, drafts, model):
    drafts = [(token, sampled(np.log(q), 0.7)) for token, q in drafts]
    return verified(chooser, prefix, drafts, model)


def _without_the_residual(chooser, prefix, drafts, model):
    return verified(chooser, prefix, drafts, model, residual=lambda p, q: p)


def _with_two_softmaxes(chooser, prefix, drafts, model):
    """The reference's mistake from its third stage on: probabilities taken for log-probabilities."""
    return verified(chooser, prefix, [(token, sampled(q)) for token, q in drafts], model)


def _one_position_late(chooser, prefix, drafts, model):
    return verified(chooser, prefix, drafts, lambda tokens: model(tokens[:-1]))


def _without_the_last_test(chooser, prefix, drafts, model):
    kept = [token for token, _ in drafts]
    return [*kept[:-1], *verified(chooser, (*prefix, *kept[:-1]), drafts[-1:], model)]


@pytest.mark.parametrize(
    "rule",
    [
        _at_another_temperature,
        _without_the_residual,
        _with_two_softmaxes,
        _one_position_late,
        _without_the_last_test,
    ],
)
def test_the_enumeration_notices(rule):
    formula = formula_of(**NESTED)
    speculation = speculate(formula)
    models = models_of(formula, speculation, random_terms("abc", VOCAB, seed=3))
    found = enumerate_paths(lambda chooser: generated(chooser, models, speculation.lengths, COUNT, rule))
    assert _distance(found, law(models[-1], VOCAB, COUNT)) > 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_drafts_are_told_with_what_they_were_drawn_from(count):
    """Given the tokens before it and what is told of them, a draft is distributed as is told of it."""
    formula = formula_of(**NESTED)
    speculation = speculate(formula)
    models = models_of(formula, speculation, random_terms("abc", VOCAB, seed=5))

    def told(chooser):
        drafts = drafted(chooser, (), models[:2], speculation.lengths[:1], count)
        return tuple((token, tuple(q)) for token, q in drafts)

    paths = enumerate_paths(told)
    levels = set()
    for place in range(count):
        found = {}
        for path, probability in paths.items():
            before, (token, q) = path[:place], path[place]
            found.setdefault((before, q), np.zeros(VOCAB))[token] += probability
        for (before, q), counted in found.items():
            assert np.abs(counted / counted.sum() - q).max() <= 1e-9
            tokens = tuple(token for token, _ in before)
            levels.add(next(level for level in (0, 1) if np.array_equal(models[level](tokens), q)))
    assert levels == {0, 1}  # the last one may be the first level's


# --- Partial formulas ---------------------------------------------------------------------------------------

names = st.sets(st.sampled_from([*TERMS]))


def _has_classifier(formula):
    return any(term.classifier for term in formula.terms.values())


def _has_distribution(formula):
    try:
        return bool(formula.check())
    except FormulaError:
        return False


@given(operator_formulas)
def test_of_all_terms_the_partial_formula_is_the_formula(formula):
    if not _has_classifier(formula):
        assert simplify(partial(formula.root, set(formula.terms))) == simplify(formula.root)


@given(operator_formulas, names)
def test_a_partial_formula_is_over_what_is_available(formula, available):
    root = partial(formula.root, available)
    assert set(leaf_names(root)) <= available
    assert not any(isinstance(node, Superseded) for node in walk(root))
    assert partial(root, available) == root
    assert available or not _has_distribution(Formula(root, formula.terms, formula.normalize))


@given(operator_formulas, operator_formulas, names)
def test_sums_and_factors_leave_out_what_is_missing(one, other, available):
    whole = add(scale(0.5, one.root), scale(-2.0, other.root))
    parts = [partial(formula.root, available) for formula in (one, other)]
    assert partial(whole, available) == add(scale(0.5, parts[0]), scale(-2.0, parts[1]))


@settings(max_examples=200)
@given(operator_formulas, names, generic_logits())
def test_a_levels_plan_gives_the_partial_formula_on_the_groups_rows(formula, available, logits):
    found = Formula(partial(formula.root, available), formula.terms, formula.normalize)
    if not _has_distribution(found):
        return
    rows = tuple(reversed(TERMS))
    plan = lower(found, rows)
    assert plan.terms == rows
    np.testing.assert_allclose(
        run(plan, logits, position=2), found.evaluate(logits, position=2), rtol=1e-9, atol=1e-9
    )


def test_plans_of_one_group_number_its_members_alike():
    formula = formula_of("superseded(d, a) + 0.5*c", a=2, c=3)
    speculation = speculate(formula)
    rows = lower(formula).terms + speculation.drafters
    assert rows == ("a", "c", "d")
    members = [0, 1, 1]  # c and d may have the same prompt
    routines = [decode(encode(lower(one, rows), members)) for one in (formula, *_formulas(speculation))]
    read = [[row for _, row, _ in routine.stages[-1].instructions] for routine in routines]
    assert read == [[0, 1], [1], [0]]
    assert {routine.terms for routine in routines} == {2}


def test_a_plan_needs_rows_for_its_terms():
    with pytest.raises(ValueError, match="no rows for the terms b of a \\+ b"):
        lower(formula_of("a + b"), ("a", "c"))


# --- Who drafts ---------------------------------------------------------------------------------------------


def _formulas(speculation):
    return [level.formula for level in speculation.levels]


@pytest.mark.parametrize(
    ("text", "options", "levels", "lengths", "drafters"),
    [
        ("a + b", dict(b=9), ["a"], (8,), ()),
        ("a + b", dict(b=9, length=3), ["a"], (3,), ()),
        ("a + b", dict(b=9, length=12), ["a"], (12,), ()),
        ("a + b", dict(b=9, limit=5), ["a"], (5,), ()),
        ("a + b", dict(b=3, limit=5), ["a"], (2,), ()),
        ("superseded(d, a)", {}, ["d"], (4,), ("d",)),
        ("superseded(d, a)", dict(limit=8), ["d"], (8,), ("d",)),
        ("superseded(d, a)", dict(a=6), ["d"], (5,), ("d",)),
        ("superseded(d, a) + b", dict(b=6), ["d"], (5,), ("d",)),  # a lags with b: it has no factor
        ("superseded(d, a) + b", {}, ["d + b"], (4,), ("d",)),
        ("superseded(d, a) + 0.1*d", {}, ["d + 0.1*d"], (4,), ()),
        ("a + b + c + d", dict(b=3, c=3, d=7), ["a", "a + b + c"], (2, 6), ()),
        ("a + b + c", dict(b=3, c=7, length=2), ["a"], (2,), ()),
        ("a + b + c", dict(b=3, c=7, length=3), ["a", "a + b"], (2, 3), ()),
        ("a - b + c", dict(b=3, c=7), ["a"], (6,), ()),  # a - b is no distribution
        ("a + union(b, c) + c", dict(b=3, c=7), ["a"], (6,), ()),  # nothing new with b alone
        ("superseded(g, a)", {}, [], (4,), ()),
        ("superseded(g, a) + b", dict(a=3, b=9), ["a"], (2, 8), ()),
        ("superseded(g, a) + b", dict(b=9), [], (8,), ()),
    ],
)
def test_levels(text, options, levels, lengths, drafters):
    found = speculation_of(text, **options)
    assert [str(formula) for formula in _formulas(found)] == levels
    assert (found.lengths, found.longest, found.drafters) == (lengths, lengths[-1], drafters)
    assert found.free == ("ngram" if "g" in text else None)


@pytest.mark.parametrize(
    "text", ["superseded(s, a)", "superseded(s, superseded(g, a))", "superseded(g, a) + superseded(s, b)"]
)
def test_suffixes_read_what_ngrams_read(text):
    terms = {"g": {"model": "ngram"}, "s": {"model": "suffix"}}
    found = speculate(Formula.parse(text, terms), 3)
    assert (found.free, found.levels, found.lengths, found.drafters) == ("suffix", (), (3,), ())


@pytest.mark.parametrize(
    ("text", "factors", "reason"),
    [
        ("a - 0.5*b", {}, "no term has a 'speculative_factor' above 1 and the formula has no superseded"),
        ("a + b - b", dict(b=3), "no term has a 'speculative_factor' above 1"),
        ("b", dict(b=3), "without the lagging terms nothing is left"),
        ("b + 0.5*uniform", dict(b=3), "without the lagging terms nothing is left"),
        ("union(a, b)", dict(b=3), r"nothing is left; union\(a, b\) needs 'b' as well"),
        ("indicator(a - b)*a + c", dict(b=3, c=3), r"indicator\(a - b\)\*a needs 'b' as well"),
        (
            "b - 0.6*a",
            dict(b=3),
            r"-0.6\*a, makes no distribution: the weights .* sum to -0.6 \(-0.6 for a\)",
        ),
        ("2*b - a + union(a, b)", dict(b=3), r"sum to -1 .*union\(a, b\) needs 'b' as well"),
        ("a + b + judge", dict(b=3), "the classifier 'judge' reads every token"),
        ("a + strength(judge)*b", dict(b=3), "the classifier 'judge' reads every token"),
    ],
)
def test_reasons(text, factors, reason):
    found = speculation_of(text, **factors)
    assert isinstance(found, str)
    assert re.search(reason, found)


@given(operator_formulas, st.fixed_dictionaries({name: st.sampled_from([1, 1, 3, 7]) for name in TERMS}))
def test_levels_are_formulas_over_what_has_run(formula, factors):
    terms = {
        name: replace(term, speculative_factor=1 if term.classifier else factors[name])
        for name, term in formula.terms.items()
    }
    formula = Formula(formula.root, terms, formula.normalize)
    found = speculate(formula)
    if isinstance(found, str):
        assert found
        return
    run_anyway = lower(formula).terms
    assert len(found.levels) == len(found.lengths) >= 1
    assert list(found.lengths) == sorted(set(found.lengths))
    assert [level.factor for level in found.levels] == sorted({level.factor for level in found.levels})
    for level in found.levels:
        level.formula.check()
        assert set(level.terms) <= {*run_anyway, *found.drafters}
        assert set(lower(level.formula, level.terms).terms) == set(level.terms)
    assert not set(found.drafters) & set(run_anyway)
    assert all(any(name in level.terms for level in found.levels) for name in found.drafters)


# --- The best length ----------------------------------------------------------------------------------------


def _cost_of_a_token(acceptance, draft, check, length):
    """As the paper has it, with the factor k = K + 1."""
    k = length + 1
    tokens = (1 - acceptance**k) / (1 - acceptance) if acceptance < 1 else k
    return ((k - 1) * draft + check(length)) / tokens


@given(st.floats(0, 1), st.floats(0, 2), st.floats(0.1, 5), st.floats(0, 1), st.integers(0, 12))
def test_the_best_length_costs_least(acceptance, draft, fixed, each, longest):
    def check(length):
        return fixed + each * length

    best = best_length(acceptance, draft, check, longest)
    costs = [_cost_of_a_token(acceptance, draft, check, length) for length in range(longest + 1)]
    assert 0 <= best <= longest
    assert costs[best] <= min(costs) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("acceptance", "draft", "each", "best"),
    [(0.0, 0.0, 0.0, 0), (1.0, 0.0, 0.0, 8), (1.0, 2.0, 0.0, 0), (0.8, 0.05, 0.0, 8), (0.5, 0.1, 0.0, 2)],
)
def test_lengths(acceptance, draft, each, best):
    assert best_length(acceptance, draft, lambda length: 1 + each * length, 8) == best

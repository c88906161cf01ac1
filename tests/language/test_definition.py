"""`Formula.evaluate` against its laws and against an oracle that walks the tree as it is written."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_marith import Formula, FormulaError, intersection, union
from vllm_marith.language.algebra import simplify
from vllm_marith.language.definition import log_softmax
from vllm_marith.language.nodes import (
    Dialled,
    Filtered,
    Gate,
    Intersection,
    KLIndicator,
    Leaf,
    Mixture,
    Normalized,
    Number,
    Plausible,
    Scale,
    Schedule,
    SelfDebias,
    Sum,
    Superseded,
    Uniform,
    Union,
)

from .strategies import (
    NAMES,
    STEP,
    TERMS,
    expressions,
    formulas,
    generic_logits,
    is_decided,
    logits,
    operator_formulas,
)

A, B, C = (TERMS[name] for name in "abc")
INF = float("inf")


def _log_softmax(x):
    peak = x.max(-1, keepdims=True)
    x = x - np.where(np.isneginf(peak), 0, peak)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(x).sum(-1, keepdims=True))
    return x - np.where(np.isneginf(total), 0, total)


def _times(factor, energy):
    """-inf stays -inf under every factor but 0."""
    finite = np.where(np.isneginf(energy), 0, energy)
    return np.where(np.isneginf(energy) & (factor != 0), -INF, factor * finite)


def _change_without_each(p, q):
    """KL(p || q) without a token, both renormalised, minus KL(p || q); token by token."""

    def divergence(p, q):
        return np.where(p > 0, p * np.log(p / q), 0).sum(-1)

    change = np.zeros_like(p)
    with np.errstate(all="ignore"):
        for token in range(p.shape[-1]):
            left_p, left_q = np.delete(p, token, -1), np.delete(q, token, -1)
            without = divergence(
                left_p / left_p.sum(-1, keepdims=True), left_q / left_q.sum(-1, keepdims=True)
            )
            change[:, token] = without - divergence(p, q)
    return change


POSITION, PROBABILITY = STEP["position"], STEP["probabilities"]["y"]


def _oracle(node, log_q, normalize="sum"):
    """(E, N) exactly as the table of nodes says, without any simplification.  For finite logits."""

    def value(operand):
        return _oracle(operand, log_q, normalize)

    def distribution(operand):
        energy, weight = value(operand)
        return _log_softmax(energy / weight if normalize == "sum" else energy)

    one = np.ones_like(next(iter(log_q.values())))
    match node:
        case Leaf(name, "bayes"):
            return log_q[name], 0 * one
        case Leaf(name):
            return log_q[name], one
        case Uniform():
            return np.log(one / one.shape[-1]), one
        case Normalized(operand):
            return distribution(operand), one
        case Filtered(kind, operand, parameter):
            weight = value(operand)[1] if normalize == "sum" else one
            log_p = distribution(operand)
            kept = np.zeros(log_p.shape, bool)
            for row, keep in zip(log_p, kept, strict=True):
                order = np.argsort(-row, kind="stable")
                mass = np.cumsum(np.exp(row[order]))
                last = parameter - 1 if kind == "topk" else np.argmax(mass >= parameter * (1 - 1e-12))
                keep[:] = row >= row[order[min(int(last), len(row) - 1)]]
            kept |= kind == "topp" and parameter == 1
            return _times(weight, _log_softmax(np.where(kept, log_p, -INF))), weight
        case SelfDebias(operand, biased, by):
            log_p, log_b = distribution(operand), distribution(biased)
            return _log_softmax(log_p + by * np.minimum(np.exp(log_p) - np.exp(log_b), 0)), one
        case Mixture(weights, operands):
            p = sum(w * np.exp(distribution(o)) for w, o in zip(weights, operands, strict=True))
            with np.errstate(divide="ignore"):
                return np.log(p / p.sum(-1, keepdims=True)), one
        case Superseded(_, large):
            return value(large)
        case Plausible(operand, judge, alpha):
            (energy, weight), p = value(operand), np.exp(distribution(judge))
            return np.where(p >= alpha * p.max(-1, keepdims=True), energy, -INF), weight
        case KLIndicator(p, q, divergence, top_k, include_max, minimize):
            p, q = np.exp(distribution(p)), np.exp(distribution(q))
            change = np.nan_to_num(_change_without_each(p, q) * (-1 if minimize else 1), nan=-INF)
            passes = (change > divergence) & ((p < q) | (not include_max))
            if top_k:
                passes &= change >= np.sort(change, -1)[:, -min(top_k, change.shape[-1]), None]
            return passes - 1.0, 0 * one
        case Gate(condition, operand):
            is_open = value(condition)[0] >= 0
            energy, weight = value(operand)
            return np.where(is_open, energy, 0), np.where(is_open, weight, 0)
        case Dialled(dial, operand):
            factor = dial.at(POSITION) if isinstance(dial, Schedule) else 0.2 + 0.7 * PROBABILITY
            energy, weight = value(operand)
            return _times(factor, energy), factor * weight
        case Number(number):
            return number * one, number * one
        case Scale(factor, operand):
            energy, weight = value(operand)
            return _times(factor, energy), factor * weight
        case Sum(operands):
            values = [value(operand) for operand in operands]
            return sum(energy for energy, _ in values), sum(weight for _, weight in values)
        case Union(operands) | Intersection(operands):
            energies, weights = (np.stack(values) for values in zip(*map(value, operands), strict=True))
            winner = (energies.argmax(0) if isinstance(node, Union) else energies.argmin(0))[None]
            return np.take_along_axis(energies, winner, 0)[0], np.take_along_axis(weights, winner, 0)[0]
    raise AssertionError(node)


@given(formulas, logits(masks=False))
def test_agrees_with_the_table_of_nodes(formula, values):
    # log Q to the last bit as the definition has it: at a tie, rounding would decide which N wins.
    log_q = {name: log_softmax(torch.from_numpy(x)).numpy() for name, x in values.items()}
    energy, weight = _oracle(formula.root, log_q)
    expected = _log_softmax(energy / weight if formula.normalize == "sum" else energy)
    np.testing.assert_allclose(formula.evaluate(values), expected, rtol=1e-9, atol=1e-9)


@given(operator_formulas, generic_logits())
def test_operators_agree_with_the_table_of_nodes(formula, values):
    assume(is_decided(formula, values))
    log_q = {name: log_softmax(torch.from_numpy(x)).numpy() for name, x in values.items()} | {
        "y": values["y"]
    }
    # Simplified, because a filter's -inf goes where its weights cancel.
    energy, weight = _oracle(simplify(formula.root), log_q, formula.normalize)
    expected = _log_softmax(energy / weight if formula.normalize == "sum" else energy)
    np.testing.assert_allclose(formula.evaluate(values, **STEP), expected, rtol=1e-7, atol=1e-7)


@given(operator_formulas, logits())
def test_operators_give_a_log_distribution(formula, values):
    result = formula.evaluate(values, **STEP)
    assert not np.isnan(result).any()
    empty = np.isneginf(result).all(-1)
    np.testing.assert_allclose(np.exp(result[~empty]).sum(-1), 1, rtol=1e-9)


@given(formulas, logits())
def test_is_a_log_distribution(formula, values):
    result = formula.evaluate(values)
    assert result.shape == (3, 12)
    assert not np.isnan(result).any()
    empty = np.isneginf(result).all(-1)
    np.testing.assert_allclose(np.exp(result[~empty]).sum(-1), 1, rtol=1e-12)


@given(expressions, logits(), st.floats(-50, 50))
def test_logits_have_no_origin(formula, values, shift):
    formula = formula.with_normalize("none")  # E is continuous; at a tie, rounding would decide which N wins
    shifted = {name: x + shift for name, x in values.items()}
    np.testing.assert_allclose(formula.evaluate(shifted), formula.evaluate(values), rtol=1e-7, atol=1e-7)


@given(formulas, logits())
def test_one_row_is_evaluated_like_many(formula, values):
    row = formula.evaluate({name: x[1:2] for name, x in values.items()})
    np.testing.assert_allclose(row, formula.evaluate(values)[1:2], rtol=1e-12, atol=1e-12)


@given(logits())
def test_laws(values):
    def same(one, other):
        assert one.normalize == other.normalize
        np.testing.assert_allclose(one.evaluate(values), other.evaluate(values), rtol=1e-12, atol=1e-12)

    everything = 0 * A + 0 * B + 0 * C
    same(0.25 * A, A + 0)
    same(A + 0.5 * B - 0.5 * B, A + 0 * B)
    same(union(A, A), A + 0)
    same(union(A, union(B, C)), union(A, B, C))
    same(2 * (A + B) - 3 * (A - C) + 2 * A, A + 2 * B + 3 * C)
    same(everything + 1, everything + 2)
    same(A + B + 2, 0.5 * (A + B) + 1)
    same(intersection(A, B), intersection(B, A))


def _evaluate(text, normalize="sum", **rows):
    values = {name: np.array(row, np.float64) for name, row in rows.items()}
    return Formula.parse(text, normalize=normalize).evaluate(values)


def test_a_forbidden_token_stays_forbidden_under_a_negative_weight():
    result = _evaluate("a - 0.6*b", a=[0, 0, 0], b=[0, -INF, 0])
    assert np.isneginf(result).tolist() == [False, True, False]
    result = _evaluate("a - 0.6*union(b, c)", a=[0, 0, 0], b=[0, -INF, 0], c=[0, -INF, -INF])
    assert np.isneginf(result).tolist() == [False, True, False]


def test_minus_infinity_is_an_ordinary_value_in_unions_and_intersections():
    rows = {"a": [0, -INF, 0], "b": [0, 0, -INF]}
    assert np.isneginf(_evaluate("union(a, b)", **rows)).tolist() == [False, False, False]
    assert np.isneginf(_evaluate("intersection(a, b)", **rows)).tolist() == [False, True, True]


@pytest.mark.parametrize("text", ["0*b + a", "b - b + a", "0.3*b - 0.1*b - 0.2*b + a", "2*(b + a) - 2*b"])
def test_a_term_whose_weight_is_zero_forbids_nothing(text):
    assert not np.isneginf(_evaluate(text, a=[0, 0], b=[-INF, 0])).any()


def test_a_row_without_an_allowed_token_is_all_minus_infinity():
    result = _evaluate("a + b", a=[[0, -INF], [0, 0]], b=[[-INF, 0], [0, 0]])
    assert np.isneginf(result[0]).all()
    np.testing.assert_allclose(result[1], np.log([0.5, 0.5]))
    assert np.isneginf(_evaluate("-a + 2*b", a=[-INF, -INF], b=[0, 0])).all()


def test_weight_of_the_winner():
    """union(2*a, 0.5*b) divides by 2 where a won and by 0.5 where b won; the first operand wins a tie."""
    a, b = np.log([0.9, 0.1]), np.log([0.5, 0.5])
    energy = np.maximum(2 * a, 0.5 * b)
    weight = np.where(2 * a >= 0.5 * b, 2.0, 0.5)
    np.testing.assert_allclose(_evaluate("union(2*a, 0.5*b)", a=a, b=b), _log_softmax(energy / weight))


def test_the_first_operand_wins_a_tie():
    """At the first two tokens log 1/4 and 2 * log 1/2 are the same float, under the weights 1 and 2."""
    rows = {"a": [0, 0, 0, 0], "b": [0, 0, -INF, -INF]}
    np.testing.assert_allclose(_evaluate("union(a, 2*b)", **rows), np.log([1 / 4] * 4))
    np.testing.assert_allclose(_evaluate("union(2*b, a)", **rows), np.log([1 / 3, 1 / 3, 1 / 6, 1 / 6]))
    np.testing.assert_allclose(_evaluate("min(a, 2*b)", **rows)[:2], np.log([1 / 2, 1 / 2]))


def test_normalizations():
    a, b = np.log([0.7, 0.2, 0.1]), np.log([0.2, 0.3, 0.5])
    np.testing.assert_allclose(_evaluate("a + b", a=a, b=b), _log_softmax((a + b) / 2))
    np.testing.assert_allclose(_evaluate("a + b", "none", a=a, b=b), _log_softmax(a + b))
    np.testing.assert_allclose(_evaluate("a - b", "none", a=a, b=b), _log_softmax(a - b))


def test_kinds_and_dtypes():
    formula = Formula.parse("a - 0.5*b")
    arrays = {"a": np.zeros((2, 4), np.float32), "b": np.ones((2, 4), np.float32)}
    tensors = {name: torch.from_numpy(x) for name, x in arrays.items()}
    assert formula.evaluate(arrays).dtype == np.float64
    assert formula.evaluate(arrays, dtype=torch.float32).dtype == np.float32
    assert formula.evaluate(arrays, dtype=np.float32).dtype == np.float32
    assert formula.evaluate(arrays, dtype="float16").dtype == np.float16
    result = formula.evaluate(tensors)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float64
    assert formula.evaluate(tensors, dtype=torch.bfloat16).dtype == torch.bfloat16
    half = {name: x.to(torch.bfloat16) for name, x in tensors.items()}
    np.testing.assert_allclose(formula.evaluate(half).numpy(), formula.evaluate(arrays))
    assert arrays["a"].sum() == 0  # the inputs are not written to


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        ({"a": np.zeros(3)}, {}, "no logits for the term 'b'; the formula has a, b"),
        (
            {"a": np.zeros(3), "b": np.zeros(4)},
            {},
            "the logits of 'b' have shape [4] and those of 'a' [3]; all",
        ),
        (
            {"a": np.zeros((2, 3)), "b": np.zeros(3)},
            {},
            "the logits of 'b' have shape [3] and those of 'a' [2, 3]",
        ),
        ({"a": [0.0], "b": [0.0]}, {}, "the logits of 'a' must be a torch tensor or numpy array, not a list"),
        (
            {"a": np.zeros(3), "b": torch.zeros(3)},
            {},
            "the logits must be all torch tensors or all numpy arrays",
        ),
        (
            {"a": np.float64(1), "b": np.zeros(3)},
            {},
            "the logits of 'a' must be a torch tensor or numpy array, not",
        ),
        (
            {"a": np.zeros(()), "b": np.zeros(())},
            {},
            "the logits of 'a' have no vocabulary dimension: shape []",
        ),
        (
            {"a": np.zeros((2, 0)), "b": np.zeros((2, 0))},
            {},
            "the logits of 'a' have no vocabulary dimension",
        ),
        ({"a": np.array([0, np.nan]), "b": np.zeros(2)}, {}, "the logits of 'a' contain NaN or +inf"),
        ({"a": np.zeros(2), "b": np.array([0, INF])}, {}, "the logits of 'b' contain NaN or +inf"),
        ({"a": np.zeros(2, complex), "b": np.zeros(2)}, {}, "the logits of 'a' are complex numbers"),
        ({"a": np.zeros(2), "b": np.zeros(2)}, {"dtype": torch.int64}, "dtype must be a floating point type"),
        ({"a": np.zeros(2), "b": np.zeros(2)}, {"dtype": "nonsense"}, "dtype must be a floating point type"),
        ({"a": np.zeros(2), "b": np.zeros(2)}, {"dtype": torch.bfloat16}, "numpy has no bfloat16"),
    ],
)
def test_refusals(values, options, sentence):
    with pytest.raises(FormulaError) as caught:
        Formula.parse("a + b").evaluate(values, **options)
    assert str(caught.value).startswith(sentence)


def test_only_formulas_with_a_distribution_are_evaluated():
    with pytest.raises(FormulaError, match="the weights of the formula sum to 0"):
        (A - B).evaluate({name: np.zeros(2) for name in NAMES})


def test_tensors_may_have_any_number_of_dimensions():
    values = {name: torch.randn(2, 3, 4, 5) for name in NAMES}
    assert (A - 0.5 * B).evaluate(values).shape == (2, 3, 4, 5)
    assert (A + B).evaluate({name: torch.zeros(0, 5) for name in NAMES}).shape == (0, 5)

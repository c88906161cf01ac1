"""Random formulas and logits."""

import numpy as np
from hypothesis import strategies as st

from vllm_marith import (
    Formula,
    FormulaError,
    Term,
    indicator,
    intersection,
    kl_indicator,
    mixture,
    normalize,
    plausible,
    schedule,
    self_debias,
    strength,
    superseded,
    topk,
    topp,
    uniform,
    union,
)
from vllm_marith.language.building import add
from vllm_marith.language.nodes import Gate, KLIndicator, Node, Number, mapped

NAMES = ("a", "b", "c", "d")
TERMS = {name: Term(f"You are {name}.", name=name) for name in NAMES}
CLASSIFIERS = {
    "y": Term(classifier="judge", name="y"),
    "z": Term(classifier="judge", form="plain", label=0, name="z"),
}

# Round weights and ragged ones, of both signs; sums of them that cancel do so to rounding.
weights = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.6, 2.0, -0.96, 3.0]),
    st.floats(-4, 4, allow_nan=False).filter(lambda weight: abs(weight) > 0.01),
)


def _extend(inner: st.SearchStrategy) -> st.SearchStrategy:
    operands = st.lists(st.one_of(inner, inner, weights), min_size=1, max_size=2)
    return st.one_of(
        st.tuples(weights, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(weights, inner).map(lambda pair: pair[0] - pair[1]),
        st.tuples(inner, weights.filter(bool)).map(lambda pair: pair[0] / pair[1]),
        inner.map(lambda formula: -formula),
        st.tuples(inner, operands).map(lambda pair: union(pair[0], *pair[1])),
        st.tuples(operands, inner).map(lambda pair: intersection(*pair[0], pair[1])),
    )


def _distribution(formula: Formula) -> Formula:
    """The formula, or one like it that has a distribution whatever the normalisation."""
    try:
        return formula.with_normalize("sum").check()
    except FormulaError:
        return 5.0 * TERMS["b"] + 0.01 * formula if _is_small(formula) else Formula.of(TERMS["b"])


def _is_small(formula: Formula) -> bool:
    try:
        (5.0 * TERMS["b"] + 0.01 * formula).check()
    except FormulaError:
        return False
    return True


def _extend_with_operators(inner: st.SearchStrategy) -> st.SearchStrategy:
    of = inner.map(_distribution)
    full = st.sampled_from(
        [*map(Formula.of, TERMS.values()), 2 * TERMS["a"] - TERMS["b"], TERMS["a"] + TERMS["c"]]
    )
    share = st.sampled_from([0.05, 0.3, 0.7, 1.0])
    counts = st.integers(1, 12)
    dials = st.sampled_from(
        [schedule({0: 1.0, 2: 0.5}), schedule({0: 0, 1: 2, 3: -0.1}), strength(CLASSIFIERS["y"], 0.2, 0.9)]
    )
    return st.one_of(
        _extend(inner),
        st.tuples(inner, inner).map(lambda pair: indicator(pair[0]) * pair[1]),
        # Of distributions without -inf: with it divergences are infinite, and which of two infinite ones is
        # larger, rounding decides.
        st.tuples(full, full, st.sampled_from([0, 3]), st.booleans(), st.booleans(), inner).map(
            lambda v: kl_indicator(v[0], v[1], 0.01, top_k=v[2], include_max=v[3], minimize=v[4]) * v[5]
        ),
        of.map(normalize),
        st.tuples(of, counts).map(lambda pair: topk(normalize(pair[0]), pair[1])),
        st.tuples(of, share).map(lambda pair: topp(normalize(pair[0]), pair[1])),
        st.tuples(of, of).map(lambda pair: self_debias(*pair, 5)),
        st.tuples(of, of).map(lambda pair: superseded(*pair)),
        st.tuples(st.floats(0.1, 3), of, of).map(lambda v: mixture((v[0], v[1]), (1, v[2]), (0.5, uniform))),
        st.tuples(inner, of, share).map(lambda v: plausible(*v)),
        st.tuples(dials, inner).map(lambda pair: pair[0] * pair[1]),
        inner.map(lambda formula: formula + 0.5 * uniform),
    )


# Any expression that operators can make, whether or not it defines a distribution.
expressions = st.recursive(
    st.sampled_from(NAMES).map(lambda name: Formula.of(TERMS[name])), _extend, max_leaves=10
)


def _made_valid(formula: Formula, lift: float) -> Formula:
    """The formula itself, or with enough of one term added, or unnormalised: never thrown away."""
    for candidate in (formula, formula + lift * TERMS["a"]):
        try:
            return candidate.check()
        except FormulaError:
            continue
    return formula.with_normalize("none").check()


def _made_valid_with_operators(formula: Formula, lift: float, normalize: str) -> Formula:
    if normalize == "sum":
        candidates = [formula, formula + lift * TERMS["a"], 0.1 * formula + lift * TERMS["a"]]
    else:
        candidates = [formula, formula + 1.0 * TERMS["a"]]
    for candidate in [*candidates, TERMS["a"] + 0 * formula, Formula.of(TERMS["a"])]:
        try:
            return candidate.with_normalize(normalize).check()
        except FormulaError:
            continue
    raise AssertionError("a term alone is valid")


# The whole algebra: also filters, gates, mixtures, dials and classifiers.
operator_expressions = st.recursive(
    st.sampled_from([*TERMS.values(), *CLASSIFIERS.values()]).map(Formula.of),
    _extend_with_operators,
    max_leaves=8,
)

# Formulas that define a distribution, under both normalisations.
formulas = st.one_of(
    st.tuples(expressions, st.sampled_from([5.0, 40.0])).map(lambda pair: _made_valid(*pair)),
    expressions.map(lambda formula: formula.with_normalize("none")),
)


operator_formulas = st.builds(
    _made_valid_with_operators,
    operator_expressions,
    st.sampled_from([5.0, 40.0]),
    st.sampled_from(["sum", "none"]),
)


# The step at which formulas with dials are evaluated.
STEP = {"position": 2, "probabilities": {"y": 0.3}}


@st.composite
def generic_logits(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """float64 [3, 12] without ties: rounding decides nothing at a gate or at a filter's edge."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([1.0, 4.0]))
    return {name: random.normal(size=(3, 12)) * scale for name in (*NAMES, *CLASSIFIERS)}


def is_decided(formula: Formula, values: dict[str, np.ndarray]) -> bool:
    """Whether rounding decides nothing: logits that differ by float32's rounding give the same distribution.

    A gate or a filter compares numbers that a formula may bring arbitrarily close to each other.
    """
    random = np.random.default_rng(0)
    wanted = formula.evaluate(values, **STEP)
    scale = 1 + np.abs(wanted[np.isfinite(wanted)]).max(initial=0)
    for _ in range(4):
        near = {name: row + 2e-7 * random.normal(size=row.shape) for name, row in values.items()}
        found = formula.evaluate(near, **STEP)
        if not np.allclose(found, wanted, rtol=0, atol=1e-5 * scale):
            return False
    # All logits may give a gate the same 0, as where topk leaves one token: to float32 it may be less.
    found = Formula(_shifted(formula.root), formula.terms, formula.normalize).evaluate(values, **STEP)
    return np.allclose(found, wanted, rtol=0, atol=1e-5 * scale)


def _shifted(node: Node) -> Node:
    """Every gate closed a little."""
    node = mapped(node, _shifted)
    if isinstance(node, Gate) and not isinstance(node.condition, KLIndicator):
        return Gate(add(node.condition, Number(-1e-6)), node.operand)
    return node


@st.composite
def logits(draw: st.DrawFn, masks: bool = True) -> dict[str, np.ndarray]:
    """float64 [3, 12] for each of NAMES: flat or peaked, and with `masks` some -inf, up to whole rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (3, 12)
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    share = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0])) if masks else 0.0
    values = {name: random.normal(size=shape) * scale for name in NAMES}
    masked = {name: np.where(random.random(shape) < share, -np.inf, x) for name, x in values.items()}
    return masked | {name: random.normal(size=shape) for name in CLASSIFIERS}

"""Random formulas and logits."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from vllm_marith import Formula, FormulaError, Term, intersection, union

# No deadline for one example: on a busy machine it measures the other processes.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

NAMES = ("a", "b", "c", "d")
TERMS = {name: Term(f"You are {name}.", name=name) for name in NAMES}

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


# Formulas that define a distribution, under both normalisations.
formulas = st.one_of(
    st.tuples(expressions, st.sampled_from([5.0, 40.0])).map(lambda pair: _made_valid(*pair)),
    expressions.map(lambda formula: formula.with_normalize("none")),
)


@st.composite
def logits(draw: st.DrawFn, masks: bool = True) -> dict[str, np.ndarray]:
    """float64 [3, 12] for each of NAMES: flat or peaked, and with `masks` some -inf, up to whole rows."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (3, 12)
    scale = draw(st.sampled_from([0.0, 1.0, 30.0]))
    share = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0])) if masks else 0.0
    values = {name: random.normal(size=shape) * scale for name in NAMES}
    return {name: np.where(random.random(shape) < share, -np.inf, x) for name, x in values.items()}

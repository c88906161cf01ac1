"""Filters over rows against the definition, which looks at one token after the other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from marith_kernels import filters

from . import definition
from .test_fuse import ROUNDS

SMALL = settings(ROUNDS, max_examples=150)
NEVER = 1e-6  # a decision closer than this may fall either way in float32

values = st.sampled_from([-math.inf, -math.inf, -3.0, 0.0, 0.0, 1.0, 7.5, 40.0]) | st.floats(
    -20, 20, width=32
)
sizes = st.shared(st.integers(1, 40), key="size")
row = sizes.flatmap(lambda size: st.lists(values, min_size=size, max_size=size))
matrices = st.integers(1, 4).flatmap(lambda n: st.lists(row, min_size=n, max_size=n)).map(torch.tensor)
seeds = st.integers(0, 2**31)


def lse_of(rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor([definition.log_sum_exp(row) for row in rows.double().numpy()], dtype=torch.float32)


def check_kept(name: str, rows: torch.Tensor, parameters: list[float], *arguments: torch.Tensor) -> None:
    """The filter keeps the tokens that it should, and says what their log-sum-exp is."""
    masks = [getattr(definition, name)(r, p) for r, p in zip(rows.double().numpy(), parameters, strict=True)]
    assume(all(mask.margin > NEVER for mask in masks))
    want = np.where([mask.kept for mask in masks], rows.numpy(), -np.inf)
    wide = torch.full((len(rows), rows.shape[1] + 3), 1e4)
    got = wide[:, : rows.shape[1]]
    got.copy_(rows)
    lse = getattr(filters, name)(got, lse_of(rows), *arguments)
    assert np.array_equal(got.numpy(), want), "in place, other tokens, or the row has changed"
    assert torch.all(wide[:, rows.shape[1] :] == 1e4)
    torch.testing.assert_close(lse, lse_of(got), rtol=2e-6, atol=4e-6)


@given(rows=matrices, k=st.lists(st.integers(1, 50), min_size=4, max_size=4))
@SMALL
def test_top_k(rows, k):
    k = k[: len(rows)]
    check_kept("top_k", rows, k, torch.tensor(k))


@given(rows=matrices, p=st.lists(st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]), min_size=4, max_size=4))
@SMALL
def test_top_p(rows, p):
    p = p[: len(rows)]
    check_kept("top_p", rows, p, torch.tensor(p, dtype=torch.float64))


def test_ties():
    rows = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]]).repeat(2, 1)
    filters.top_k(rows, lse_of(rows), torch.tensor([2, 4]), largest=4)
    assert (rows > -math.inf).tolist() == [[False, True, True, True, False], [True, True, True, True, False]]
    rows = torch.zeros(3, 4)
    filters.top_p(rows, lse_of(rows), torch.tensor([0.2, 0.3, 0.7]))
    assert (rows == 0).sum(-1).tolist() == [1, 2, 3]
    assert torch.all(rows.sort(descending=True).values == rows), "the first of equals stay"


def test_rows_of_nothing_but_minus_infinity():
    for narrow, parameter in ((filters.top_k, torch.tensor([3])), (filters.top_p, torch.tensor([0.5]))):
        rows = torch.full((1, 6), -math.inf)
        assert narrow(rows, torch.zeros(1), parameter).tolist() == [0.0]
        assert torch.all(rows == -math.inf)
    assert torch.all(filters.plausible(rows, torch.tensor([0.5])) == 0)


@given(rows=matrices, alpha=st.lists(st.sampled_from([1e-9, 0.1, 0.5, 1.0]), min_size=4, max_size=4))
@SMALL
def test_plausible(rows, alpha):
    alpha = alpha[: len(rows)]
    masks = [definition.plausible(r, a) for r, a in zip(rows.double().numpy(), alpha, strict=True)]
    assume(all(mask.margin > NEVER for mask in masks))
    got = filters.plausible(rows, torch.tensor(alpha, dtype=torch.float64))
    assert np.array_equal(got.numpy(), np.where([mask.kept for mask in masks], 0.0, -np.inf))


@given(
    pair=sizes.flatmap(lambda size: st.tuples(*[st.lists(row, min_size=3, max_size=3)] * 2)),
    divergence=st.sampled_from([0.0, 0.01, 0.5, -0.1]),
    flags=st.tuples(st.booleans(), st.booleans()),
    k=st.sampled_from([0, 0, 1, 3, 100]),
)
@SMALL
def test_kl_indicator(pair, divergence, flags, k):
    rows, constraint = map(torch.tensor, pair)
    every = [(divergence, *flags, k), (divergence + 0.2, *flags, 0), (divergence, False, True, 2)]
    with np.errstate(all="ignore"):
        both = zip(rows.double().numpy(), constraint.double().numpy(), every, strict=True)
        masks = [definition.kl_indicator(p, q, *parameters) for p, q, parameters in both]
    columns = zip(*every, strict=True)
    dtypes = (torch.float64, torch.bool, torch.bool, torch.int64)
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    got = filters.kl_indicator(rows, constraint, *tensors, largest=max(k, 2))
    assert not got.isnan().any()
    for g, mask in enumerate(masks):
        if mask.margin > 1e-9:
            assert np.array_equal(got[g].numpy(), np.where(mask.kept, 0.0, -1.0))
    alone = filters.kl_indicator(rows[:1], constraint[:1], *(t[:1] for t in tensors[:3]))
    if k == 0:
        assert torch.equal(alone[0], got[0])


def test_kl_indicator_where_almost_all_mass_is_on_one_token():
    """1 - p is 1e-14 here, below what float64 leaves of 1 - exp(ln p)."""
    rows = torch.tensor([[33.0, 0.0, -2.0]])
    constraint = torch.tensor([[30.0, 31.0, -4.0]])
    for divergence, minimize in ((1e-3, False), (1.0, False), (1e-3, True)):
        with np.errstate(all="ignore"):
            want = definition.kl_indicator(
                rows[0].numpy(), constraint[0].numpy(), divergence, False, minimize, 0
            )
        got = filters.kl_indicator(
            rows, constraint, torch.tensor([divergence]), torch.tensor([False]), torch.tensor([minimize])
        )
        assert want.margin > 1e-9
        assert (got[0] == 0).tolist() == want.kept.tolist()


@pytest.mark.parametrize("minimize", [False, True])
def test_kl_indicator_of_infinite_divergence(minimize):
    """A token that the constraint forbids makes KL infinite; without that token it would be finite."""
    rows = torch.tensor([[1.0, 0.0, 0.5]])
    constraint = torch.tensor([[0.0, -math.inf, 1.0]])
    got = filters.kl_indicator(
        rows, constraint, torch.tensor([0.0]), torch.tensor([False]), torch.tensor([minimize])
    )
    assert (got[0] == 0).tolist() == [False, minimize, False]

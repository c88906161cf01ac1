"""`StagedBatch.replace`: what `run` gives, over the leaders' rows, with a peak that says what was wrong."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marith_kernels import Pipeline, Stage, StagedBatch, numba_replace

from .cases import DTYPES
from .pipelines import NAMED, SUM, TERM, fuse_stage, pipelines
from .test_fuse import DIVIDED, ROUNDS, UNION

HERE = ("numba", "torch", "reference")
SIMPLE = [TERM, SUM, *(Pipeline(3, (Stage("fuse", program),)) for program in (UNION, DIVIDED))]


def external(which, source, source_lse, out):
    """Some row for every external stage, the same whoever asks."""
    out.copy_(0.5 * source.nan_to_num(posinf=0, neginf=-3))
    return torch.logsumexp(out, -1)


def rows_of(groups, order):
    """A row for every term, in some order; some rows belong to nobody."""
    order = iter(order)
    return [[next(order) for _ in range(group.n_terms)] for group in groups]


@pytest.mark.parametrize("backend", HERE)
@given(data=st.data())
@settings(ROUNDS, max_examples=100)
def test_any_groups(backend, data):
    """In place or not, one group's bad logit or none: the same rows as of `run`, all others untouched."""
    groups = data.draw(st.lists(st.sampled_from(SIMPLE) | pipelines(), min_size=1, max_size=5))
    n_rows = sum(group.n_terms for group in groups) + 2
    rows = rows_of(groups, data.draw(st.permutations(range(n_rows))))
    dtype = data.draw(st.sampled_from(DTYPES))
    vocab_size = data.draw(st.sampled_from([2, 17, 130, 2049]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    wide = 3 * torch.randn(n_rows, vocab_size + 3, generator=generator)
    logits = wide.to(dtype)[:, :vocab_size]
    logits[:, 0] = -math.inf
    batch = StagedBatch.build(groups, rows)
    want = batch.run(logits, external=external, backend=backend).logits

    bad = data.draw(st.none() | st.integers(0, len(groups) - 1))
    if bad is not None:
        row = data.draw(st.sampled_from(rows[bad]))
        logits[row, data.draw(st.integers(0, vocab_size - 1))] = data.draw(
            st.sampled_from([math.nan, math.inf])
        )
    before = logits.float().clone()
    in_place = dtype == torch.float32 and data.draw(st.booleans())
    into = logits if in_place else logits.float()
    peaks = batch.replace(logits, into, external=external, backend=backend)
    leaders = [row[0] for row in rows]
    for g, leader in enumerate(leaders):
        if g == bad:
            assert peaks[g].isnan()
            assert (into[leader] < math.inf).all()
        else:
            assert torch.equal(into[leader], want[g])
            assert peaks[g] == want[g].max()
    others = [row for row in range(n_rows) if row not in leaders]
    assert torch.equal(into[others].nan_to_num(), before[others].nan_to_num())


@pytest.mark.parametrize("backend", HERE)
def test_what_is_wrong(backend):
    """Energies beyond float32, a formula that forbids everything, and a bad row that the formula skips."""
    beyond = Pipeline(2, (fuse_stage(("push", 0, 1e5), ("add", 1, -99999.0)),))
    second = Pipeline(2, (fuse_stage(("push", 1, 1.0)),))
    batch = StagedBatch.build([beyond, SUM, second, TERM, beyond], [[0, 1], [2, 3, 4], [5, 6], [7], [8, 9]])
    logits = torch.ones(10, 40)
    logits[8:] = 1e34 * torch.arange(1, 41)  # both terms overflow, their difference is NaN
    logits[0] = 1e34 * torch.arange(40)
    logits[2, ::2] = -math.inf
    logits[3, 1::2] = -math.inf
    logits[5, 7] = math.nan
    peaks = batch.replace(logits, logits, backend=backend)
    assert peaks[0] == math.inf
    assert peaks[1] == -math.inf
    assert peaks[2].isnan()
    assert peaks[3] == 1
    assert peaks[4] == math.inf or backend == "reference"  # float64 holds the products
    assert (logits[[0, 2, 5, 7, 8]] < math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_take_groups_or_parts_of_them_to_the_same_bits(dtype, monkeypatch):
    groups = [*SIMPLE, *SIMPLE]
    rows = rows_of(groups, range(100))
    vocab_size = 3 * numba_replace.LSE_CHUNK // 2 + 5
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(rows[-1][-1] + 1, vocab_size, generator=generator)).to(dtype)
    logits[rows[5][1], -1] = math.nan
    batch = StagedBatch.build(groups, rows)
    found = []
    for enough, below in ((0, 1 << 40), (0, 0), (1 << 40, 0)):
        monkeypatch.setattr(numba_replace, "ENOUGH", enough)
        monkeypatch.setattr(numba_replace, "SERIAL_BELOW", below)
        into = logits.float().clone()
        found.append((batch.replace(logits, into).nan_to_num(nan=-7), into.nan_to_num(nan=-7)))
    assert all(torch.equal(a, b) for one in found[1:] for a, b in zip(one, found[0], strict=True))
    assert found[0][0].eq(-7).tolist() == [g == 5 for g in range(len(groups))]


def test_minus_zero_and_other_bits_are_kept():
    logits = torch.tensor([[-0.0, 1.0, -3.5e-40, -math.inf]])
    batch = StagedBatch.build([TERM], [[0]])
    into = torch.zeros_like(logits)
    batch.replace(logits, into)
    assert torch.equal(into.view(torch.int32), logits.view(torch.int32))


def test_no_groups():
    logits = torch.randn(2, 10)
    assert StagedBatch.build([], []).replace(logits, logits).shape == (0,)


def test_refused_calls():
    logits = torch.zeros(3, 16)
    batch = StagedBatch.build([SUM], [[0, 1, 2]])
    for into in (logits.double(), logits[:2], torch.zeros(16, 3).T):
        with pytest.raises(ValueError, match=r"into must be float32 \(3, 16\) of stride 1"):
            batch.replace(logits, into)
    with pytest.raises(ValueError, match="reads row 2 and the logits have 2 rows"):
        batch.replace(logits[:2], logits[:2].clone())
    with pytest.raises(ValueError, match="external stages"):
        StagedBatch.build([NAMED["a + classifier"]], [[0]]).replace(logits, logits)

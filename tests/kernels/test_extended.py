"""logadd, debias, pop_gate, the uniform distribution, weightless leaves and extra rows, on every backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from marith_kernels import UNIFORM, Batch, Extra, Program, fuse

from .cases import DTYPES, VOCAB_SIZES, Case, ExtendedCase, check
from .strategies import cases, programs
from .test_fuse import ROUNDS

HERE = ("numba", "torch", "reference")

MIXTURE = Program([("push", 0, 0.5), ("logadd", 1, 0.5), ("logadd", UNIFORM, 0.01)])
DEBIASED = Program([("push", 0, 1.0), ("debias", 1, 10.0)])
DIFFERENCE = (("push", 1, 1.0), ("add", 0, -1.0))
GATED = Program(  # a - 0.9 * indicator(b - a) * 2 (b - a)
    [("push", 0, 1.0), *DIFFERENCE, *DIFFERENCE, ("pop_gate", -1, 2.0), ("pop_add", -1, -0.9)]
)
WEIGHED = Program([*GATED.instructions, ("add", 2, 0.5), ("add", UNIFORM, 2.0)], divide=True, weightless=(2,))


def run(case: ExtendedCase, backend: str) -> None:
    logits, batch, extra = case.logits(), case.batch(), case.extra()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan)
    fused = fuse(logits, batch, extra=extra, vocab_size=case.vocab_size, out=out, backend=backend)
    check(case, fused, logits, batch, extra)


@pytest.mark.parametrize("backend", HERE)
@given(case=cases(vocab_sizes=VOCAB_SIZES[:-1], extended=True))
@settings(ROUNDS, max_examples=120)
def test_any_program_on_any_rows(backend, case):
    run(case, backend)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_size_and_dtype(backend, dtype, vocab_size):
    every = (MIXTURE, DEBIASED, GATED, WEIGHED)
    run(ExtendedCase(every, vocab_size, dtype, seed=vocab_size, padding=3, gap=1), backend)


@given(program=programs(n_terms=16, extended=True))
@settings(ROUNDS, max_examples=30)
def test_sixteen_terms(program):
    run(ExtendedCase((program,), 5003, torch.float32, seed=1), "numba")


@pytest.mark.parametrize("backend", HERE)
def test_mixture_is_the_mean_of_probabilities(backend):
    logits = torch.randn(2, 3000) * 4
    program = Program([("push", 0, 1.0), ("scale", -1, 1.0), ("logadd", 1, 3.0)])
    fused = fuse(logits, Batch.build([program], [[0, 1]]), backend=backend)
    q0, q1 = torch.softmax(logits.double(), -1)
    got = (fused.logits - fused.lse).exp()[0].double()
    torch.testing.assert_close(got, 0.25 * q0 + 0.75 * q1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", HERE)
def test_debias_lowers_only_what_the_other_prefers(backend):
    logits = torch.randn(2, 3000) * 4
    fused = fuse(logits, Batch.build([DEBIASED], [[0, 1]]), backend=backend)
    p, q = torch.softmax(logits.double(), -1)
    want = torch.softmax(logits[0].double() + 10 * (p - q).clamp_max(0), -1)
    torch.testing.assert_close((fused.logits - fused.lse).exp()[0].double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("divide", [False, True])
def test_minus_infinity(backend, divide):
    check_minus_infinity(backend, divide)


def check_minus_infinity(backend: str, divide: bool) -> None:
    """Nothing leaks out of a closed gate; -inf is no mass in logadd, and stays in debias."""
    inf = math.inf
    logits = torch.tensor([[1.0, -inf, 3.0, -inf], [0.0, 1.0, -inf, -inf]])
    gate = torch.tensor([[0.0, 0.0, -1.0, -inf]])
    read_gate, tail = ("push", 2, 1.0), [("add", -1, 3.0)] * divide
    walks = [
        [("push", 0, 1.0), ("logadd", 1, 0.5)],
        [("push", 0, 1.0), ("debias", 1, 3.0)],
        [("push", 1, 1.0), ("debias", 0, 3.0)],
        [read_gate, ("push", 0, 1.0), ("pop_gate", -1, -2.0), *tail],
        [read_gate, ("push", 1, 1.0), ("pop_gate", -1, 1.0), *tail],
        [read_gate, ("push", 0, 1.0), ("pop_gate", -1, 0.0), *tail],
        [("push", 0, 1.0), ("push", 1, 1.0), ("pop_gate", -1, 1.0), *tail],
        [("push", 0, 1.0), ("push", 0, 1.0), ("debias", 1, 0.0), ("pop_max", -1, 1.0)],
    ]
    every = [Program(walk, divide=divide, weightless=(2,)) for walk in walks]
    batch = Batch.build(every, [[0, 1, 2]] * len(every), first_extra=2)
    fused = fuse(logits, batch, extra=Extra(gate, torch.zeros(1)), backend=backend)
    assert (fused.logits == -inf).tolist() == [
        [False, False, False, True],
        [False, True, False, True],
        [False, False, True, True],
        [False, True, False, False],
        [False, False, False, False],
        [False, False, False, False],
        [False, False, False, False],
        [False, True, False, True],
    ]
    assert not fused.logits.isnan().any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("program", [MIXTURE, DEBIASED, GATED], ids=["mixture", "debiased", "gated"])
def test_rows_of_nothing_but_minus_infinity(backend, program):
    logits = torch.full((3, 5000), -math.inf)
    fused = fuse(logits, Batch.build([program], [[0, 1, 2]]), backend=backend)
    assert not fused.logits.isnan().any()
    if program is not MIXTURE:
        assert fused.lse.tolist() == [0.0]
        assert fused.argmax.tolist() == [0]


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extra_rows_are_read_as_logits_rows_are(backend, dtype):
    """A float32 row is the same row on either side, bit for bit."""
    logits = torch.randn(4, 3001) * 5
    union = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.9)])
    total = Program([("push", 0, 1.0), ("add", 1, 0.5), ("add", 2, 0.25), ("add", 3, -1.0)])
    for program in (union, total, Program([("push", 0, 1.0)])):
        want = fuse(logits, Batch.build([program], [[0, 1, 2, 3]]), backend=backend)
        beside = Extra(logits, torch.logsumexp(logits, -1))
        batch = Batch.build([program], [[1, 2, 3, 4]], first_extra=1)
        got = fuse(torch.zeros(1, 3001, dtype=dtype), batch, extra=beside, backend=backend)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-6, atol=2e-5)
        if program.n_terms == 1:
            assert torch.equal(got.logits, logits[:1])


@pytest.mark.parametrize("backend", HERE)
def test_the_log_sum_exp_of_an_extra_row_is_taken_as_given(backend):
    rows = torch.zeros(2, 10)
    batch = Batch.build([Program([("push", 0, 1.0), ("max", 1, 1.0)])], [[1, 2]], first_extra=1)
    assert batch.lse_rows == ()
    fused = fuse(rows, batch, extra=Extra(rows, torch.tensor([5.0, 3.0])), backend=backend)
    assert torch.all(fused.logits == -3.0 + 5.0)


def test_uniform_is_a_constant_of_a_sum():
    program = Program([("push", UNIFORM, 3.0), ("add", 0, 1.0)], divide=True)
    assert program.linear
    assert program.n_terms == 1
    assert program.encoded[2].view("float32").tolist() == [0.25]
    case = Case((program, Program([("push", UNIFORM, 1.0)])), 100, torch.float32, 3)
    for backend in HERE:
        check(case, fuse(case.logits(), case.batch(), backend=backend), case.logits(), case.batch())


def test_without_extra_rows_a_batch_is_what_it_was():
    plain = Program([("push", 0, 1.0), ("max", 1, 1.0)])
    assert not Batch.build([plain], [[0, 1]]).extended
    assert not Batch.build([plain], [[0, 1]], first_extra=2).extended
    assert Batch.build([plain], [[0, 1]], first_extra=1).extended
    for program in (MIXTURE, DEBIASED, GATED, Program(plain.instructions, weightless=(1,))):
        assert Batch.build([program], [[0, 1, 2]]).extended


READS_EXTRA = Batch.build([DEBIASED], [[0, 2]], first_extra=1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (None, "reads 2 extra rows and extra is None"),
        (Extra(torch.zeros(1, 16), torch.zeros(1)), "reads 2 extra rows; there are 1"),
        (Extra(torch.zeros(2, 16), torch.zeros(3)), "there are 2, and 3 lse"),
        (Extra(torch.zeros(2, 15), torch.zeros(2)), r"\[rows, >= 16\] of stride 1"),
        (Extra(torch.zeros(16, 2).T, torch.zeros(2)), r"\[rows, >= 16\] of stride 1"),
        (Extra(torch.zeros(2, 16).double(), torch.zeros(2)), "extra.logits must be float32"),
        (Extra(torch.zeros(2, 16), torch.zeros(2, 1)), "extra.lse must be float32 of 1 dimensions"),
    ],
)
def test_refused_extra_rows(extra, message):
    with pytest.raises(ValueError, match=message):
        fuse(torch.zeros(1, 16), READS_EXTRA, extra=extra)

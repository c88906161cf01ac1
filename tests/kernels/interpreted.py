"""The Triton kernels through Triton's interpreter. Not collected by itself: `test_triton.py` runs it in a
child,

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py

because the variable must be set before triton is imported and would change every other test of the process.
The interpreter runs one block after the other in numpy: it shows what a kernel computes, and neither races
nor what the compiler makes of it.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from marith_kernels import Batch, Program, Verified, fuse, residual, triton_combine, warmup

from .cases import DTYPES, Case, ExtendedCase, check, check_ties
from .decoding_laws import Requests, check_residual, check_sample, check_verify, output_distribution
from .pipelines import NAMED, Step, check_step, steps
from .strategies import cases
from .test_extended import DEBIASED, GATED, MIXTURE, WEIGHED, check_minus_infinity
from .test_fuse import DIVIDED, SUM, TERM, UNION

assert os.environ["TRITON_INTERPRET"] == "1"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on -inf - -inf under a mask

FEW = settings(max_examples=40, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
SIZES = (1, 17, 128, 2047, 2048, 2049, 5003)


def run(case: Case) -> None:
    logits, batch = case.logits(), case.batch()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan)
    check(case, fuse(logits, batch, vocab_size=case.vocab_size, out=out, backend="triton"), logits, batch)


@given(case=cases(vocab_sizes=SIZES))
@FEW
def test_any_program_on_any_logits(case):
    run(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", ["linear", "mixed", "divided"])
def test_every_size_and_dtype(kind, dtype, vocab_size):
    programs = {"linear": (SUM, TERM), "mixed": (SUM, UNION, TERM), "divided": (SUM, UNION, DIVIDED)}[kind]
    run(Case(programs, vocab_size, dtype, seed=vocab_size, padding=3, gap=1))


@pytest.mark.parametrize("slots", triton_combine.SLOTS)
@pytest.mark.parametrize("divide", [False, True])
def test_every_number_of_slots(slots, divide):
    ops = ["pop_max", "pop_add", "pop_min"]
    deep = [("push", i % 3, 1.0 + i / 10) for i in range(slots)] + [("max", 2, 1.1)]
    deep += [(ops[i % 3], -1, 0.7) for i in range(slots - 1)]
    run(Case((Program([*deep, ("add", -1, 99.0)], divide=divide), UNION), 1100, torch.float32, 5))


def run_extended(case: ExtendedCase) -> None:
    logits, batch, extra = case.logits(), case.batch(), case.extra()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan)
    fused = fuse(logits, batch, extra=extra, vocab_size=case.vocab_size, out=out, backend="triton")
    check(case, fused, logits, batch, extra)


@given(case=cases(vocab_sizes=SIZES, extended=True))
@settings(FEW, max_examples=60)
def test_any_extended_program_on_any_rows(case):
    run_extended(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 17, 2049])
def test_extended_programs_of_every_dtype(dtype, vocab_size):
    every = (MIXTURE, DEBIASED, GATED, WEIGHED, SUM)
    run_extended(ExtendedCase(every, vocab_size, dtype, seed=vocab_size, padding=3, gap=1))
    run_extended(ExtendedCase((SUM, TERM), vocab_size, dtype, seed=vocab_size))


@pytest.mark.parametrize("slots", triton_combine.EXTENDED_SLOTS)
@pytest.mark.parametrize("divide", [False, True])
def test_every_number_of_extended_slots(slots, divide):
    ops = ["pop_gate", "pop_max", "pop_add", "pop_min"]
    deep = [("push", i % 3, (-1.0) ** i * (1.0 + i / 10)) for i in range(slots)] + [("logadd", 2, 1.1)]
    deep += [(ops[i % 4], -1, 0.7) for i in range(slots - 1)] + [("debias", 1, 2.0), ("add", -1, 99.0)]
    program = Program(deep, divide=divide, weightless=(1,) if divide else ())
    run_extended(ExtendedCase((program, GATED), 1100, torch.float32, 5))


@given(step=steps)
@settings(FEW, max_examples=25)
def test_any_pipelines(step):
    assume(check_step(step, "triton"))


def test_named_pipelines():
    step = Step(tuple(NAMED.values()), 40, torch.bfloat16, seed=3, masked=0.05)
    assert check_step(step.decided(), "triton")


def test_minus_infinity_in_extended_programs():
    check_minus_infinity("triton", False)
    check_minus_infinity("triton", True)


@pytest.mark.parametrize("n_terms", [1, 2, 3, 5, 8, 9, 16])
def test_every_number_of_terms(n_terms):
    terms = [("push", 0, 1.0)] + [("add", t, (-1) ** t / t) for t in range(1, n_terms)]
    run(Case((Program(terms), TERM), 2500, torch.bfloat16, 5))


def test_one_term_returns_its_row_bit_for_bit():
    logits = torch.randn(4, 3000).mul_(7)
    logits[0, 0], logits[0, 7] = -0.0, -math.inf
    for batch in (Batch.build([TERM], [[0]]), Batch.build([TERM, SUM], [[0], [1, 2, 3]])):
        fused = fuse(logits, batch, backend="triton")
        assert torch.equal(fused.logits[0].view(torch.int32), logits[0].view(torch.int32))
    mixed = fuse(logits, Batch.build([TERM, UNION], [[0], [1, 2, 3]]), backend="triton")
    assert torch.equal(mixed.logits[0].view(torch.int32), logits[0].view(torch.int32))


def test_rows_of_nothing_but_minus_infinity():
    logits = torch.full((3, 5000), -math.inf)
    batch = Batch.build([TERM, UNION, DIVIDED], [[0], [0, 1, 2], [0, 1, 2]])
    fused = fuse(logits, batch, backend="triton")
    assert torch.all(fused.logits == -math.inf)
    assert fused.lse.tolist() == [0.0] * 3
    assert fused.argmax.tolist() == [0] * 3


def test_the_first_wins_ties():
    check_ties("triton")


def test_counters_are_zero_again():
    from marith_kernels.triton_blocks import _zeroed

    fuse(torch.randn(3, 9000), Batch.build([UNION], [[0, 1, 2]]), backend="triton")
    assert _zeroed
    assert not any(counters.any() for counters in _zeroed.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 300, 4097, 9000])
def test_sample_inverts_the_distribution(dtype, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(8, vocab_size + 3, generator=generator) * 3).to(dtype)
    logits[:, vocab_size:] = 1e4
    logits[2, : vocab_size // 2] = -math.inf
    logits[3, :vocab_size] = -math.inf
    logits[4, : min(vocab_size - 1, 4096)] = -math.inf
    temperature = torch.tensor([1.0, 0.0, 0.3, 2.0] * 2)
    check_sample(logits, torch.rand(8, 2, generator=generator), temperature, "triton", vocab_size)
    edge = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]).repeat(4, 1)
    check_sample(logits, edge, None, "triton", vocab_size)


@given(
    requests=st.builds(
        Requests.draw,
        drafted=st.lists(st.integers(0, 5), min_size=1, max_size=4),
        vocab_size=st.sampled_from([2, 40, 4097]),
        seed=st.integers(0, 2**31),
        dtype=st.sampled_from(DTYPES),
        tempered=st.booleans(),
        near=st.sampled_from([0.0, 0.1, 1.0]),
    )
)
@FEW
def test_verify_and_residual(requests):
    verified = check_verify(requests, "triton")
    check_residual(requests, verified, "triton")
    accepted = torch.tensor([k // 2 for k in requests.drafted])
    check_residual(requests, verified._replace(accepted=accepted), "triton")


def test_every_path_together_gives_the_target():
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(24, generator=generator) * 2
    draft = target + torch.randn(24, generator=generator)
    target[3:9], draft[6:12] = -math.inf, -math.inf
    got = output_distribution(target, draft, "triton")
    torch.testing.assert_close(got, torch.softmax(target.double(), -1), rtol=0, atol=1e-6)


def test_nothing_left_of_the_difference():
    same = torch.randn(1, 5000)
    lse, best = same.logsumexp(-1), same.argmax(-1)
    verified = Verified(torch.tensor([0]), lse.repeat(2), best.repeat(2), lse)
    start = torch.tensor([0, 2], dtype=torch.int32)
    got = residual(same.repeat(2, 1), same, start, verified, backend="triton")
    torch.testing.assert_close(got, torch.log_softmax(same, -1), rtol=1e-6, atol=2e-6)


def test_warmup_runs_every_variant():
    assert warmup("triton", "cpu", DTYPES, vocab_size=30, stride=32) == "triton"

"""Every backend that runs here against the float64 reference. The laws are in `cases.check`."""

import math
import multiprocessing
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from marith_kernels import (
    FUSE_BACKENDS,
    Batch,
    Program,
    fuse,
    numba_disk,
    openmp,
    reference,
    torch_eager,
    warmup,
)
from marith_kernels.backends import resolve

from .cases import DTYPES, VOCAB_SIZES, Case, check, check_ties
from .strategies import cases, programs

HERE = ("numba", "torch")
ROUNDS = settings(
    max_examples=80, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)

TERM = Program([("push", 0, 1.0)])
SUM = Program([("push", 0, 1.5), ("add", 1, -0.25), ("add", 2, -0.25)])
UNION = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.9)])
DIVIDED = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 0.5), ("pop_add", -1, -0.9)], divide=True)


def run(case: Case, backend: str) -> None:
    logits, batch = case.logits(), case.batch()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan)
    check(case, fuse(logits, batch, vocab_size=case.vocab_size, out=out, backend=backend), logits, batch)


@pytest.mark.parametrize("backend", HERE)
@given(case=cases())
@ROUNDS
def test_any_program_on_any_logits(backend, case):
    run(case, backend)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_every_size_and_dtype(backend, dtype, vocab_size):
    run(Case((SUM, UNION, DIVIDED, TERM), vocab_size, dtype, seed=vocab_size, padding=3, gap=1), backend)


@given(program=programs(n_terms=16))
@settings(ROUNDS, max_examples=30)
def test_sixteen_terms(program):
    run(Case((program,), 5003, torch.float32, seed=1), "numba")


@pytest.mark.parametrize("backend", HERE)
def test_thirty_two_slots(backend):
    deep = [("push", i % 3, 1.0 + i / 10) for i in range(32)]
    for op in ("pop_max", "pop_add", "pop_min") * 10 + ("pop_max",):
        deep.append((op, -1, 0.7))
    run(
        Case((Program(deep), Program([*deep, ("add", -1, 50.0)], divide=True)), 3000, torch.float32, 5),
        backend,
    )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_term_returns_its_row_bit_for_bit(backend, dtype):
    logits = torch.randn(3, 50257).mul_(7).to(dtype)
    logits[0, 0], logits[0, 7] = -0.0, -math.inf
    fused = fuse(logits, Batch.build([TERM, TERM], [[0], [2]]), backend=backend)
    assert torch.equal(fused.logits.view(torch.int32), logits[[0, 2]].float().view(torch.int32))


@pytest.mark.parametrize("backend", HERE)
def test_a_union_sits_where_its_leader_sits(backend):
    logits = torch.randn(3, 4099)
    logits[0] += 30
    union_of_one = Program([("push", 0, 1.0), ("max", 0, 1.0)])
    fused = fuse(logits, Batch.build([union_of_one], [[0]]), backend=backend)
    torch.testing.assert_close(fused.logits[0], logits[0], rtol=1e-6, atol=1e-5)
    shifted = fuse(
        logits + torch.tensor([[0.0], [9.0], [-4.0]]), Batch.build([UNION], [[0, 1, 2]]), backend=backend
    )
    fused = fuse(logits, Batch.build([UNION], [[0, 1, 2]]), backend=backend)
    torch.testing.assert_close(shifted.logits, fused.logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
def test_minus_infinity(backend):
    """Bans under any weight of a sum, is a value in max and min, and is dropped with the weight 0."""
    inf = math.inf
    logits = torch.tensor([[1.0, -inf, 3.0, -inf], [0.0, 1.0, -inf, -inf]])
    minus = Program([("push", 0, 1.0), ("add", 1, -1.0)])
    zero = Program([("push", 0, 1.0), ("add", 1, 0.0)])
    larger = Program([("push", 0, 1.0), ("max", 1, 1.0)])
    smaller = Program([("push", 0, 1.0), ("min", 1, 1.0)])
    minus_larger = Program([("push", 0, 1.0), ("max", 1, 1.0), ("scale", -1, -1.0)])
    zero_larger = Program([("push", 0, 1.0), ("max", 1, 1.0), ("scale", -1, 0.0)])
    every = [minus, zero, larger, smaller, minus_larger, zero_larger]
    fused = fuse(logits, Batch.build(every, [[0, 1]] * len(every)), backend=backend)
    assert (fused.logits == -inf).tolist() == [
        [False, True, True, True],
        [False, True, False, True],
        [False, False, False, True],
        [False, True, True, True],
        [False, False, False, True],
        [False, False, False, False],
    ]
    assert not fused.logits.isnan().any()


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("program", [TERM, UNION], ids=["term", "union"])
def test_the_maximum_may_come_late(backend, program):
    """Each block far above the one before: the running maximum must follow, or the exponentials overflow."""
    rising = torch.linspace(-3000, 3000, 30_000)
    logits = torch.stack([rising, rising.flip(0), rising.roll(7000)])
    batch = Batch.build([program] * 3, [[0, 1, 2], [1, 2, 0], [2, 0, 1]])
    fused = fuse(logits, batch, backend=backend)
    want = reference.log_sum_exp(reference.energies(logits, batch))
    torch.testing.assert_close(fused.lse.double(), want, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
@pytest.mark.parametrize("program", [TERM, UNION, DIVIDED], ids=["term", "union", "divided"])
def test_rows_of_nothing_but_minus_infinity(backend, program):
    logits = torch.full((3, 5000), -math.inf)
    fused = fuse(logits, Batch.build([program], [[0, 1, 2]]), backend=backend)
    assert torch.all(fused.logits == -math.inf)
    assert fused.lse.tolist() == [0.0]
    assert fused.argmax.tolist() == [0]


@pytest.mark.parametrize("backend", [*HERE, "reference"])
def test_the_first_wins_ties(backend):
    check_ties(backend)


@pytest.mark.parametrize("backend", [*HERE, "reference"])
def test_the_winner_brings_its_n(backend):
    logits = torch.log_softmax(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), -1)
    tied = Program([("push", 0, 2.0), ("max", 0, 2.0)], divide=True)
    # max(2a, b): where 2a wins N = 2, where b wins N = 1
    mixed = Program([("push", 0, 2.0), ("max", 1, 1.0)], divide=True)
    fused = fuse(logits, Batch.build([tied, mixed], [[0], [0, 1]]), backend=backend)
    a, b = logits.double()
    torch.testing.assert_close(fused.logits[0].double(), a, rtol=1e-6, atol=1e-6)
    expected = torch.where(b > 2 * a, b, a)
    torch.testing.assert_close(fused.logits[1].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_probabilities_are_those_of_theorem_one():
    """By hand: a*log Q1 + b*log Q2 over a + b, and softmax(max)."""
    logits = torch.randn(2, 40)
    q1, q2 = torch.softmax(logits.double(), -1)
    fused = fuse(logits, Batch.build([Program([("push", 0, 3.0), ("add", 1, -1.0)], divide=True)], [[0, 1]]))
    expected = q1**1.5 / q2**0.5
    torch.testing.assert_close(
        (fused.logits - fused.lse).exp()[0].double(), expected / expected.sum(), rtol=1e-5, atol=0
    )
    fused = fuse(logits, Batch.build([Program([("push", 0, 1.0), ("max", 1, 1.0)])], [[0, 1]]))
    expected = torch.maximum(q1, q2)
    torch.testing.assert_close(
        (fused.logits - fused.lse).exp()[0].double(), expected / expected.sum(), rtol=1e-5, atol=0
    )


def test_numba_is_what_auto_runs_here(monkeypatch):
    calls = []
    run_task = openmp.run
    monkeypatch.setattr(openmp, "run", lambda *a, **k: (calls.append(k), run_task(*a, **k)))
    monkeypatch.setattr(torch_eager, "fuse", None)
    monkeypatch.setattr(reference, "fuse", None)
    assert resolve("auto", torch.device("cpu")) == "numba"
    assert warmup() == "numba"
    calls.clear()
    fuse(torch.randn(6, 50257), Batch.build([UNION] * 2, [[0, 1, 2], [3, 4, 5]]))
    assert calls == [{"parallel": True}, {"parallel": True}], "one task for the lse and one for the programs"


def test_threads_do_not_change_a_bit():
    logits, batch = torch.randn(12, 50257), Batch.build([UNION] * 4, [[i, i + 4, i + 8] for i in range(4)])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert openmp.available_threads() == threads
            results.append(fuse(logits, batch, backend="numba"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_many_callers_at_once():
    logits, batch = torch.randn(3, 50257), Batch.build([UNION], [[0, 1, 2]])
    want = fuse(logits, batch, backend="numba")
    wrong = []

    def work():
        for _ in range(30):
            if not torch.equal(fuse(logits, batch, backend="numba").logits, want.logits):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not wrong


def _in_child(queue, logits, batch) -> None:
    queue.put((openmp.available_threads(), float(fuse(logits, batch, backend="numba").lse[0])))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_works_alone():
    """Its parent's OpenMP threads are not there any more; waiting for them would last for ever."""
    logits, batch = torch.randn(3, 50257), Batch.build([UNION], [[0, 1, 2]])
    want = float(fuse(logits, batch, backend="numba").lse[0])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, logits, batch))
    child.start()
    try:
        threads, lse = queue.get(timeout=60)
    finally:
        child.kill()
    assert threads == 1
    assert lse == want


def test_a_fresh_process_needs_only_torch():
    """No vLLM, nothing of vllm_marith, and no numba before the first call."""
    code = (
        "import sys, marith_kernels; "
        "print([m for m in ('vllm', 'vllm_marith', 'numba', 'triton') if m in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("cannot cache function 'f': no locator available for file 'f.py'"),
        OSError(28, "No space left on device"),
    ],
)
def test_no_disk_cache_is_no_obstacle(failure):
    tried = []

    def compiler(cache):
        tried.append(cache)
        if cache:
            raise failure
        return lambda function: function

    assert numba_disk.on_disk(compiler, max) is max
    assert tried == [True, False]


def test_without_numba_torch_does_it(monkeypatch):
    monkeypatch.setattr("marith_kernels.backends._installed", lambda package: False)
    assert resolve("auto", torch.device("cpu")) == "torch"
    with pytest.raises(RuntimeError, match="numba backend needs numba, which is not installed"):
        resolve("numba", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="triton backend needs triton, which is not installed"):
        resolve("auto", torch.device("cuda"))


def test_one_device_each():
    with pytest.raises(RuntimeError, match="numba backend computes on CPU tensors"):
        resolve("numba", torch.device("cuda"))
    assert resolve("auto", torch.device("meta")) == "torch"


def test_no_groups():
    fused = fuse(torch.randn(2, 10), Batch.build([], []))
    assert fused.logits.shape == (0, 10)
    assert fused.lse.shape == fused.argmax.shape == (0,)


LOGITS = torch.zeros(3, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "Unknown backend 'cuda'; known are auto, reference, torch, numba, triton"),
        ({"vocab_size": 17}, "vocab_size is 17 and the logits have 16 columns"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"logits": LOGITS[:2]}, "reads row 2 and the logits have 2 rows"),
        ({"logits": LOGITS.double()}, "float32, bfloat16 or float16, not torch.float64"),
        ({"logits": LOGITS[0]}, r"\[rows, vocabulary\], not \(16,\)"),
        ({"logits": torch.zeros(16, 3).T}, "next to each other"),
        ({"logits": LOGITS.to("meta")}, "batch is on cpu and the logits are on meta"),
        ({"out": torch.zeros(1, 15)}, r"out must be \[1, >= 16\]"),
        ({"out": torch.zeros(1, 16, dtype=torch.float64)}, "out must be a float32 matrix"),
    ],
)
def test_refused_calls(arguments, message):
    assert "auto" in FUSE_BACKENDS
    with pytest.raises(ValueError, match=message):
        fuse(**{"logits": LOGITS, "batch": Batch.build([UNION], [[0, 1, 2]]), **arguments})

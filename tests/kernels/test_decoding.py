"""Sampling and speculative decoding on the CPU backends; the laws are in `decoding_laws`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marith_kernels import Verified, residual, sample, verify

from .decoding_laws import Requests, check_residual, check_sample, check_verify, output_distribution

BACKENDS = ("numba", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 300, 4096, 4097, 50257])
def test_sample_inverts_the_distribution(backend, dtype, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(12, vocab_size + 3, generator=generator) * 3).to(dtype)
    logits[:, vocab_size:] = 1e4
    logits[3, : vocab_size // 2] = -math.inf
    logits[4, :vocab_size] = -math.inf
    temperature = torch.tensor([1.0, 0.0, 0.3, 2.0] * 3)
    check_sample(logits, torch.rand(12, 2, generator=generator), temperature, backend, vocab_size)
    edge = torch.tensor([[0.0, 0.0], [1 - 2**-24, 1 - 2**-24]]).repeat(6, 1)
    check_sample(logits, edge, None, backend, vocab_size)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_sampled_frequencies(backend):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5000, generator=generator) * 4
    n = 20_000
    tokens = torch.cat(
        [
            sample(logits.expand(1000, -1), torch.rand(1000, 2, generator=generator), backend=backend).token
            for _ in range(n // 1000)
        ]
    )
    expected = torch.softmax(logits.double(), 0) * n
    counts = torch.bincount(tokens, minlength=5000)
    frequent = expected > 5
    chi_square = float(((counts - expected) ** 2 / expected)[frequent].sum())
    degrees = int(frequent.sum())
    assert degrees > 100
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


requests = st.builds(
    Requests.draw,
    drafted=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    vocab_size=st.sampled_from([2, 40, 1000, 4097]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    tempered=st.booleans(),
    near=st.sampled_from([0.0, 0.1, 1.0]),
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(requests=requests)
@settings(max_examples=40, deadline=None, print_blob=True)
def test_verify_and_residual(backend, requests):
    verified = check_verify(requests, backend)
    check_residual(requests, verified, backend)
    # the residual at positions other than the ones reached here
    accepted = torch.tensor([k // 2 for k in requests.drafted])
    check_residual(requests, verified._replace(accepted=accepted), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_path_together_gives_the_target(backend, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(60, generator=generator) * 2
    draft = target + torch.randn(60, generator=generator)
    target[3:9], draft[6:12] = -math.inf, -math.inf
    got = output_distribution(target, draft, backend)
    torch.testing.assert_close(got, torch.softmax(target.double(), -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_left_of_the_difference(backend):
    """p = q, and still a rejection by hand: the target itself is used."""
    same = torch.randn(1, 50)
    verified = Verified(
        torch.tensor([0]), same.logsumexp(-1).repeat(2), same.argmax(-1).repeat(2), same.logsumexp(-1)
    )
    got = residual(
        same.repeat(2, 1), same, torch.tensor([0, 2], dtype=torch.int32), verified, backend=backend
    )
    torch.testing.assert_close(got, torch.log_softmax(same, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_drafted(backend):
    requests = Requests.draw([0, 0], 30, seed=0)
    verified = check_verify(requests, backend)
    assert verified.accepted.tolist() == [0, 0]
    check_residual(requests, verified, backend)


def test_refused_calls():
    logits = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"uniform has shape \[2, 2\], not \[2\]"):
        sample(logits, torch.zeros(2))
    with pytest.raises(
        ValueError, match="Unknown backend 'cuda'; known are auto, reference, torch, numba, triton"
    ):
        sample(logits, torch.zeros(2, 2), backend="cuda")
    with pytest.raises(ValueError, match=r"temperature has shape \[2\], not \[1\]"):
        sample(logits, torch.zeros(2, 2), temperature=torch.ones(1))
    start = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="1 requests with 2 drafted tokens have 3 target rows, not 2"):
        verify(logits, logits, torch.zeros(2), start, torch.zeros(2), max_drafted=2)
    drafts = torch.zeros(1, 8, dtype=torch.float16)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"of one dtype, not torch\.float32 and torch\.float16"):
            verify(logits, drafts, torch.zeros(1), start, torch.zeros(1), max_drafted=1, backend=backend)
        with pytest.raises(ValueError, match=r"of one dtype, not torch\.float32 and torch\.float16"):
            residual(logits, drafts, start, Verified(*(torch.zeros(1),) * 4), backend=backend)

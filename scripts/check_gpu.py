"""Whether the Triton kernels are right on a real GPU; `bench_gpu.py` runs this first, then measures.

Programs, dtypes and sizes against float64, bans, sampling and verification, and what no interpreter shows:
thousands of repetitions under load, two streams, CUDA graphs, the number of launches.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator

import torch
from marith_kernels import Batch, Fused, Program, fuse
from marith_kernels.reference import energies
from marith_kernels.triton_blocks import _zeroed

from tests.kernels.cases import DTYPES, Case, check
from tests.kernels.decoding_laws import Requests, check_residual, check_sample, check_verify

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
SIZES = (17, 5003) if DRY else (1, 17, 2047, 2048, 2049, 32_000, 50_257, 128_256, 151_936, 256_000)

TERM = Program([("push", 0, 1.0)])
UNION = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.9)])
DIVIDED = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 0.5), ("pop_add", -1, -0.9)], divide=True)


def linear(n_terms: int) -> Program:
    rest = [("add", t, -0.5 / (n_terms - 1)) for t in range(1, n_terms)]
    return Program([("push", 0, 1.5 if rest else 1.0), *rest])


def deep(slots: int, divide: bool) -> Program:
    ops = ("pop_max", "pop_add", "pop_min")
    walk = [("push", i % 3, 1.0 + i / 10) for i in range(slots)] + [("max", 2, 1.1)]
    walk += [(ops[i % 3], -1, 0.7) for i in range(slots - 1)]
    return Program([*walk, ("add", -1, 99.0)], divide=divide)


def correctness() -> dict[str, int]:
    counts = {}
    for part in (programs_are_right, pipelines_are_right, decoding_is_right, races, graphs):
        if DRY and part is graphs:
            continue
        start = time.time()
        counts[part.__name__] = sum(1 for _ in part())
        print(f"{part.__name__}: {counts[part.__name__]} checks, {time.time() - start:.0f} s", flush=True)
    return counts


def programs_are_right() -> Iterator[None]:
    sets = [
        (linear(3), TERM),
        (linear(8), linear(5)),
        (linear(16), TERM),
        (UNION, linear(3), TERM),
        (DIVIDED, UNION, linear(3)),
        *[(deep(slots, divide), UNION) for slots in (1, 2, 3, 4, 8, 32) for divide in (False, True)],
    ]
    for vocab_size in SIZES:
        for dtype in DTYPES:
            for programs in sets if vocab_size in SIZES[-4:] and not DRY else sets[:5]:
                case = Case(programs, vocab_size, dtype, seed=vocab_size, padding=3, gap=1)
                one_case(case)
                yield
                aligned = Case(programs, vocab_size, dtype, seed=vocab_size + 1, padding=-vocab_size % 16)
                one_case(aligned)
                yield


def pipelines_are_right() -> Iterator[None]:
    """Staged formulas: gates, filters, mixtures, self-debiasing, rows that a classifier makes."""
    try:
        from tests.kernels.pipelines import NAMED, Step, check_step
    except ImportError as error:
        print(f"pipelines_are_right: left out, {error}")
        return
    for vocab_size in (40,) if DRY else (17, 40, 130, 2049):
        for dtype in DTYPES:
            for formula in NAMED.values():
                step = Step((formula, NAMED["sum"]), vocab_size, dtype, seed=vocab_size, masked=0.05)
                assert check_step(step.decided(), "triton", DEVICE)
                yield


def one_case(case: Case) -> None:
    logits, batch = case.logits(), case.batch()
    out = torch.full((batch.n_groups, logits.shape[1]), math.nan, device=DEVICE)
    on_device = place(logits)
    fused = fuse(on_device, case.batch(DEVICE), vocab_size=case.vocab_size, out=out, backend="triton")
    check(case, Fused(*(t.cpu() for t in fused)), logits, batch)


def place(logits: torch.Tensor) -> torch.Tensor:
    """On the device with the same strides: `.to` would close the gaps between rows."""
    wide = torch.as_strided(logits, (logits.shape[0], logits.stride(0)), logits.stride()).to(DEVICE)
    return wide[:, : logits.shape[1]]


def decoding_is_right() -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in SIZES:
        for dtype in DTYPES:
            logits = (torch.randn(8, vocab_size, generator=generator) * 3).to(dtype)
            logits[2, : vocab_size // 2] = -math.inf
            logits[3] = -math.inf
            temperature = torch.tensor([1.0, 0.0, 0.3, 2.0] * 2)
            uniform = torch.rand(8, 2, generator=generator)
            check_sample(logits.to(DEVICE), uniform.to(DEVICE), temperature.to(DEVICE), "triton")
            yield
            if vocab_size > 1:
                requests = Requests.draw([3, 0, 5, 1], vocab_size, vocab_size, dtype, device=DEVICE)
                verified = check_verify(requests, "triton")
                check_residual(requests, verified, "triton")
                yield


def races() -> Iterator[None]:
    """The same batch again and again, under a load that shifts the order of blocks; every bit must repeat."""
    rounds = 3 if DRY else 3000
    rows = [[3 * g, 3 * g + 1, 3 * g + 2] for g in range(8)]
    logits = torch.randn(24, 5003 if DRY else 50_304, device=DEVICE).mul_(5)
    noise = torch.randn(64 if DRY else 2048, 64 if DRY else 2048, device=DEVICE)
    for programs in ([linear(3)] * 8, [UNION] * 8, [DIVIDED, linear(3)] * 4):
        batch = Batch.build(programs, rows, DEVICE)
        first = fuse(logits, batch, backend="triton")
        want = energies(logits, batch)
        torch.testing.assert_close(first.logits.double(), want, rtol=1e-5, atol=1e-4)
        streams = [torch.cuda.Stream() for _ in range(2)] if not DRY else []
        different = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for i in range(rounds):
            if i % 3 == 0:
                noise @ noise
            if streams:
                stream = streams[i % 2]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    again = fuse(logits, batch, backend="triton")
                torch.cuda.current_stream().wait_stream(stream)
                for tensor in again:
                    tensor.record_stream(torch.cuda.current_stream())
            else:
                again = fuse(logits, batch, backend="triton")
            for a, b in zip(first, again, strict=True):
                different += (a != b).any()
        if int(different):
            raise AssertionError(f"{int(different)} of {3 * rounds} results differ from the first")
        yield
    for counters in _zeroed.values():
        if int(counters.abs().sum()):
            raise AssertionError("A counter is not back at 0")
    yield


def graphs() -> Iterator[None]:
    """A CUDA graph captures `fuse` and follows new logits; at most two kernels are launched."""
    logits = torch.randn(24, 128_256, device=DEVICE)
    rows = [[3 * g, 3 * g + 1, 3 * g + 2] for g in range(8)]
    for program, most in ((linear(3), 1), (UNION, 2), (DIVIDED, 2)):
        batch = Batch.build([program] * 8, rows, DEVICE)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            fuse(logits, batch, backend="triton")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = fuse(logits, batch, backend="triton")
        for _ in range(20):
            logits.normal_().mul_(5)
            graph.replay()
            want = fuse(logits, batch, backend="triton")
            if not all(torch.equal(a, b) for a, b in zip(captured, want, strict=True)):
                raise AssertionError("A replayed graph computes something else")
        yield
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            fuse(logits, batch, backend="triton")
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        launched = [event.name for event in profile.events() if event.device_type == on_device]
        if len(launched) > most:
            raise AssertionError(f"{len(launched)} launches instead of {most}: {launched}")
        yield

"""Sampling and speculative decoding on CPUs, compiled by numba; see `decoding` for what is computed.

A thread takes a row, or a request. Rows at a temperature other than 1 are divided into a buffer of the
thread's own first, so that everything behind reads float32 at temperature 1.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import carray

from . import decoding, openmp
from .numba_cpu import SERIAL_BELOW
from .numba_disk import LIKE, compile_task, stamp
from .numba_math import NEG_INF, ONE, ZERO, exp, inline, log, max_and_sum, pointer, take, widen

SAMPLE_BLOCK = decoding.SAMPLE_BLOCK


@inline
def _at_temperature(x, temperature, scaled):
    """scaled := x / temperature; greedy rows as they are."""
    factor = ONE if temperature == ZERO else temperature
    for i in range(x.size):
        scaled[i] = widen(x[i]) / factor


@inline
def _first(x, value):
    """Where `value` comes first in x; 0 where nowhere."""
    for i in range(x.size):
        if x[i] == value:
            return i
    return 0


@inline
def _lse(x):
    """(log-sum-exp, 0 for a row of -inf; first largest)."""
    peak, total = max_and_sum(x)
    if peak == NEG_INF:
        return ZERO, 0
    return np.float32(peak + math.log(total)), _first(x, peak)


@inline
def _mass(x, shift):
    """sum exp(x - shift), in float64."""
    total = 0.0
    for begin in range(0, x.size, 256):
        part: Any = ZERO
        for i in range(begin, min(x.size, begin + 256)):
            part += exp(x[i] - shift) if x[i] > NEG_INF else ZERO
        total += part
    return total


@inline
def _invert(x, shift, wanted):
    """The first i with sum exp(x[: i + 1] - shift) > wanted, else the last that is possible."""
    cumulated, last = 0.0, 0
    for i in range(x.size):
        if x[i] > NEG_INF:
            cumulated += exp(x[i] - shift)
            last = i
            if cumulated > wanted:
                break
    return last


@inline
def _draw(x, peak, masses, u, v):
    """The token of x that the two random numbers mean, see `decoding.sample`."""
    total = 0.0
    for b in range(masses.size):
        masses[b] = _mass(x[b * SAMPLE_BLOCK : (b + 1) * SAMPLE_BLOCK], peak)
        total += masses[b]
    cumulated, block = 0.0, 0
    for b in range(masses.size):
        if masses[b] > 0:
            cumulated += masses[b]
            block = b
            if cumulated > u * total:
                break
    inside = x[block * SAMPLE_BLOCK : (block + 1) * SAMPLE_BLOCK]
    return block * SAMPLE_BLOCK + _invert(inside, peak, v * masses[block])


@inline
def _sample_task(args, like):
    (_, logits, stride, item, vocab, n_rows, uniform_at, temperature_at, token_at, logprob_at) = carray(
        pointer(args, np.int64(0)), (10,)
    )
    uniform = carray(pointer(uniform_at, ZERO), (n_rows, 2))
    temperature = carray(pointer(temperature_at, ZERO), n_rows)
    token = carray(pointer(token_at, np.int64(0)), n_rows)
    logprob = carray(pointer(logprob_at, ZERO), n_rows)
    scaled = np.empty(vocab, np.float32)
    masses = np.empty((vocab + SAMPLE_BLOCK - 1) // SAMPLE_BLOCK, np.float64)
    while True:
        n = take(args)
        if n >= n_rows:
            return
        x = carray(pointer(logits + n * stride * item, like), vocab)
        _at_temperature(x, temperature[n], scaled)
        lse, best = _lse(scaled)
        peak = scaled[best]
        if peak == NEG_INF:
            token[n], logprob[n] = 0, NEG_INF
        elif temperature[n] == ZERO:
            token[n], logprob[n] = best, ZERO
        else:
            drawn = _draw(scaled, peak, masses, np.float64(uniform[n, 0]), np.float64(uniform[n, 1]))
            token[n], logprob[n] = drawn, scaled[drawn] - lse


@inline
def _verify_task(args, like):
    (
        _, target_at, target_stride, draft_at, draft_stride, item, vocab, n_requests, tokens_at, start_at,
        uniform_at, temperature_at, accepted_at, target_lse_at, best_at, draft_lse_at,
    ) = carray(pointer(args, np.int64(0)), (16,))  # fmt: skip
    start = carray(pointer(start_at, np.int32(0)), n_requests + 1)
    rows, drafts = start[n_requests], start[n_requests] - n_requests
    tokens = carray(pointer(tokens_at, np.int64(0)), drafts)
    uniform = carray(pointer(uniform_at, ZERO), drafts)
    temperature = carray(pointer(temperature_at, ZERO), n_requests)
    accepted = carray(pointer(accepted_at, np.int64(0)), n_requests)
    target_lse = carray(pointer(target_lse_at, ZERO), rows)
    best = carray(pointer(best_at, np.int64(0)), rows)
    draft_lse = carray(pointer(draft_lse_at, ZERO), drafts)
    scaled = np.empty(vocab, np.float32)
    while True:
        n = take(args)
        if n >= n_requests:
            return
        standing, stands = 0, True
        for i in range(start[n + 1] - start[n]):
            row = start[n] + i
            x = carray(pointer(target_at + row * target_stride * item, like), vocab)
            _at_temperature(x, temperature[n], scaled)
            target_lse[row], best[row] = _lse(scaled)
            if row + 1 == start[n + 1]:
                continue
            token = tokens[row - n]
            p = scaled[token] - target_lse[row]
            x = carray(pointer(draft_at + (row - n) * draft_stride * item, like), vocab)
            _at_temperature(x, temperature[n], scaled)
            draft_lse[row - n], _ = _lse(scaled)
            if temperature[n] == ZERO:
                stands = stands and token == best[row]
            else:
                q = scaled[token] - draft_lse[row - n]
                stands = stands and uniform[row - n] < math.exp(p - q)  # not so for any NaN
            standing += stands
        accepted[n] = standing


@inline
def _residual_task(args, like):
    (
        _, target_at, target_stride, draft_at, draft_stride, item, vocab, n_requests, start_at,
        temperature_at, accepted_at, target_lse_at, best_at, draft_lse_at, out_at,
    ) = carray(pointer(args, np.int64(0)), (15,))  # fmt: skip
    start = carray(pointer(start_at, np.int32(0)), n_requests + 1)
    rows = start[n_requests]
    temperature = carray(pointer(temperature_at, ZERO), n_requests)
    accepted = carray(pointer(accepted_at, np.int64(0)), n_requests)
    target_lse = carray(pointer(target_lse_at, ZERO), rows)
    best = carray(pointer(best_at, np.int64(0)), rows)
    draft_lse = carray(pointer(draft_lse_at, ZERO), rows - n_requests)
    scaled = np.empty(vocab, np.float32)
    while True:
        n = take(args)
        if n >= n_requests:
            return
        out = carray(pointer(out_at + n * vocab * 4, ZERO), vocab)
        row = start[n] + accepted[n]
        if temperature[n] == ZERO:
            out[:] = NEG_INF
            out[best[row]] = ZERO
            continue
        x = carray(pointer(target_at + row * target_stride * item, like), vocab)
        _at_temperature(x, temperature[n], scaled)
        nothing = True
        if row + 1 < start[n + 1]:
            x = carray(pointer(draft_at + (row - n) * draft_stride * item, like), vocab)
            _at_temperature(x, temperature[n], out)
            nothing = _less(scaled, target_lse[row], out, draft_lse[row - n]) == NEG_INF
        if nothing:
            for i in range(vocab):
                out[i] = scaled[i] - target_lse[row]


@inline
def _less(p, p_lse, q, q_lse):
    """q := log max(0, exp(p - p_lse) - exp(q - q_lse)); returns its largest."""
    high = NEG_INF
    for i in range(p.size):
        a, b = p[i] - p_lse, q[i] - q_lse
        some = ONE - exp(b - a) if a > b else ZERO  # of a NaN that two -inf leave, too
        q[i] = a + log(some) if some > ZERO else NEG_INF
        high = max(high, q[i])
    return high


@functools.cache
def _tasks(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(sample, verify, residual) for logits of this dtype."""
    source, like = stamp(), LIKE[dtype]

    def sample(args):
        if source:
            _sample_task(args, like)

    def verify(args):
        if source:
            _verify_task(args, like)

    def residual(args):
        if source:
            _residual_task(args, like)

    return compile_task(sample), compile_task(verify), compile_task(residual)


def _temperatures(temperature, n):
    return torch.ones(n) if temperature is None else temperature.float().contiguous()


def _run(task, logits, *arguments):
    """arguments: after the counter, tensors by their addresses."""
    args = np.array(
        [0, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)], dtype=np.int64
    )
    openmp.run(task, args.ctypes.data, parallel=logits.numel() > SERIAL_BELOW)


def sample(logits, uniform, temperature, vocab_size):
    n = logits.shape[0]
    token, logprob = torch.empty(n, dtype=torch.int64), torch.empty(n)
    uniform, temperature = uniform.float().contiguous(), _temperatures(temperature, n)
    layout = (logits, logits.stride(0), logits.element_size(), vocab_size, n)
    _run(_tasks(logits.dtype)[0], logits, *layout, uniform, temperature, token, logprob)
    return token, logprob


def verify(target, draft, tokens, start, uniform, max_drafted, temperature, vocab_size):
    n = start.numel() - 1
    accepted = torch.empty(n, dtype=torch.int64)
    target_lse, draft_lse = torch.empty(len(target)), torch.empty(len(draft))
    best = torch.empty(len(target), dtype=torch.int64)
    given = tokens.long().contiguous(), start.contiguous(), uniform.float().contiguous()
    found = accepted, target_lse, best, draft_lse
    temperature = _temperatures(temperature, n)
    layout = _layout(target, draft)
    _run(_tasks(target.dtype)[1], target, *layout, vocab_size, n, *given, temperature, *found)
    return found


def residual(target, draft, start, verified, temperature, vocab_size):
    n = start.numel() - 1
    out = torch.empty(n, vocab_size)
    start, temperature = start.contiguous(), _temperatures(temperature, n)
    known = [values.contiguous() for values in verified]
    layout = _layout(target, draft)
    _run(_tasks(target.dtype)[2], out, *layout, vocab_size, n, start, temperature, *known, out)
    return out


def _layout(target, draft):
    return target, target.stride(0), draft, draft.stride(0), target.element_size()


def warmup(dtypes: Sequence[torch.dtype]) -> None:
    """Compile, or load from numba's cache, everything for logits of these dtypes."""
    for dtype in dtypes:
        _tasks(dtype)

"""Sampling and speculative decoding in float64, one row after the other: what the backends are tested
against."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from . import decoding
from .reference import log_sum_exp


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / T) in float64; one-hot at the first largest token for T = 0; zeros for a row of
    -inf."""
    logits = logits.double()
    if bool((logits == -torch.inf).all()):
        return torch.zeros_like(logits)
    if temperature == 0:
        return torch.nn.functional.one_hot(_first_largest(logits), logits.numel()).double()
    return torch.softmax(logits / temperature, -1)


def _first_largest(row: torch.Tensor) -> torch.Tensor:
    return (row == row.max()).nonzero()[0, 0]


def _temperatures(temperature: torch.Tensor | None, n: int) -> list[float]:
    return [1.0] * n if temperature is None else temperature.tolist()


def sample(logits, uniform, temperature, vocab_size):
    tokens, logprobs = [], []
    for row, (u, v), t in zip(
        logits[:, :vocab_size], uniform.double(), _temperatures(temperature, len(logits)), strict=True
    ):
        p = probabilities(row, t)
        blocks = torch.stack([block.sum() for block in p.split(decoding.SAMPLE_BLOCK)])
        block = _first_above(blocks, u)
        first = block * decoding.SAMPLE_BLOCK
        tokens.append(first + _first_above(p[first : first + decoding.SAMPLE_BLOCK], v))
        logprobs.append(p[tokens[-1]].log())
    return torch.tensor(tokens, device=logits.device), torch.stack(logprobs).float()


def _first_above(mass: torch.Tensor, u: torch.Tensor) -> int:
    """The first position of positive mass where the cumulated mass exceeds u * its sum; 0 without any
    mass."""
    above = ((mass.cumsum(0) > u * mass.sum()) & (mass > 0)).nonzero()
    if above.numel():
        return int(above[0, 0])
    positive = mass.nonzero()
    return int(positive[-1, 0]) if positive.numel() else 0


def verify(target, draft, tokens, start, uniform, max_drafted, temperature, vocab_size):
    accepted = []
    starts = start.tolist()
    for n, t in enumerate(_temperatures(temperature, len(starts) - 1)):
        k = starts[n + 1] - starts[n] - 1
        standing = 0
        for i in range(k):
            row = starts[n] - n + i
            x = tokens[row]
            p = probabilities(target[starts[n] + i, :vocab_size], t)[x]
            # the draft of a greedy request is the token itself, whatever the draft's logits say
            q = 1.0 if t == 0 else probabilities(draft[row, :vocab_size], t)[x]
            if not uniform[row].double() * q < p:
                break
            standing += 1
        accepted.append(standing)
    return (
        torch.tensor(accepted, device=target.device),
        _lse(target, start, temperature, vocab_size, 0),
        torch.stack([_first_largest(row) for row in target[:, :vocab_size]]),
        _lse(draft, start, temperature, vocab_size, 1),
    )


def _lse(logits, start, temperature, vocab_size, missing):
    starts = start.tolist()
    result = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for n, t in enumerate(_temperatures(temperature, len(starts) - 1)):
        rows = slice(starts[n] - missing * n, starts[n + 1] - missing * (n + 1))
        if t > 0:
            result[rows] = log_sum_exp(logits[rows, :vocab_size].double() / t)
    return result.float()


def residual(target, draft, start, verified, temperature, vocab_size):
    rows = []
    starts = start.tolist()
    for n, t in enumerate(_temperatures(temperature, len(starts) - 1)):
        a, k = int(verified.accepted[n]), starts[n + 1] - starts[n] - 1
        p = probabilities(target[starts[n] + a, :vocab_size], t)
        if a < k and t > 0:
            q = probabilities(draft[starts[n] - n + a, :vocab_size], t)
            left = (p - q).clamp_min(0)
            p = left if left.any() else p
        rows.append(p.log().float())
    return torch.stack(rows)

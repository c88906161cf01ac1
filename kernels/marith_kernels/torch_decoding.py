"""Sampling and speculative decoding in plain torch, float32, all rows at once."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch

from . import decoding


def sample(logits, uniform, temperature, vocab_size):
    greedy, scaled = _scaled(logits[:, :vocab_size], temperature)
    best = scaled.max(-1, keepdim=True).values
    p = torch.exp(scaled - torch.where(best == -torch.inf, 0.0, best))
    padded = torch.nn.functional.pad(p, (0, -vocab_size % decoding.SAMPLE_BLOCK))
    blocks = padded.view(len(p), -1, decoding.SAMPLE_BLOCK)
    block = _first_above(blocks.sum(-1), uniform[:, 0])
    inside = blocks[torch.arange(len(p), device=p.device), block]
    token = block * decoding.SAMPLE_BLOCK + _first_above(inside, uniform[:, 1])
    token = torch.where(greedy, _first_largest(scaled), token)
    logprob = scaled.gather(1, token[:, None])[:, 0] - _lse(scaled)
    possible = best[:, 0] > -torch.inf
    return token, torch.where(greedy & possible, 0.0, logprob)


def _scaled(logits, temperature):
    """(which rows are greedy, logits / temperature); greedy rows are left as they are."""
    logits = logits.float()
    if temperature is None:
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device), logits
    greedy = temperature == 0
    return greedy, logits / torch.where(greedy, 1.0, temperature)[:, None]


def _first_above(mass, u):
    positive = mass > 0
    above = (mass.cumsum(-1) > u[:, None] * mass.sum(-1, keepdim=True)) & positive
    last = mass.shape[-1] - 1 - positive.flip(-1).int().argmax(-1)
    last = torch.where(positive.any(-1), last, 0)
    return torch.where(above.any(-1), above.int().argmax(-1), last)


def _first_largest(rows):
    return (rows == rows.max(-1, keepdim=True).values).int().argmax(-1)


def _lse(rows):
    lse = torch.logsumexp(rows, -1)
    return torch.where(lse == -torch.inf, 0.0, lse)


def _per_row(temperature, start, n_rows, missing):
    """The temperature of every row of the target (missing 0) or the draft (missing 1)."""
    if temperature is None:
        return None
    return torch.repeat_interleave(temperature, start.diff() - missing, output_size=n_rows)


def verify(target, draft, tokens, start, uniform, max_drafted, temperature, vocab_size):
    device, n_requests = target.device, start.numel() - 1
    greedy, target_scaled = _scaled(target[:, :vocab_size], _per_row(temperature, start, len(target), 0))
    _, draft_scaled = _scaled(draft[:, :vocab_size], _per_row(temperature, start, len(draft), 1))
    target_lse, draft_lse, best = _lse(target_scaled), _lse(draft_scaled), _first_largest(target_scaled)
    # drafted tokens as [N, K]: row of the draft, and whether request n has drafted so many
    t = torch.arange(max_drafted, device=device)
    n = torch.arange(n_requests, device=device)[:, None]
    drafted = t < (start.diff() - 1)[:, None]
    row = torch.where(drafted, start[:-1, None] - n + t, 0)
    target_row = torch.where(drafted, start[:-1, None] + t, 0)
    accepted = torch.zeros(n_requests, dtype=torch.int64, device=device)
    if len(tokens) and max_drafted:
        x = tokens[row].long()
        p = target_scaled[target_row, x] - target_lse[target_row]
        q = draft_scaled[row, x] - draft_lse[row]
        ok = (uniform[row] < torch.exp(p - q)) & (p > -torch.inf)
        ok = torch.where(greedy[target_row], x == best[target_row], ok) & drafted
        accepted = ok.int().cumprod(-1).sum(-1)
    return accepted, target_lse, best, draft_lse


def residual(target, draft, start, verified, temperature, vocab_size):
    n = torch.arange(start.numel() - 1, device=target.device)
    row = start[:-1] + verified.accepted
    greedy, scaled = _scaled(target[row, :vocab_size], temperature)
    p = scaled - verified.target_lse[row, None]
    if len(draft):
        rejected = row + 1 < start[1:]
        draft_row = torch.where(rejected, row - n, 0)
        _, scaled = _scaled(draft[draft_row, :vocab_size], temperature)
        q = scaled - verified.draft_lse[draft_row, None]
        left = torch.where(p > q, p + torch.log(-torch.expm1(torch.clamp_max(q - p, 0.0))), -torch.inf)
        nothing = (left == -torch.inf).all(-1)
        p = torch.where((rejected & ~nothing)[:, None], left, p)
    best = verified.target_argmax[row, None]
    one_hot = torch.full_like(p, -torch.inf).scatter_(1, best, 0.0)
    return torch.where(greedy[:, None], one_hot, p)

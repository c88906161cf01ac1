"""Which tokens of a distribution pass: the float64 definitions behind topk, topp, plausible and kl_indicator.

All take log-probabilities [..., vocab] and return booleans of that shape, true where a token passes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_marith.language.nodes import KLIndicator

# What the reference adds to 1 - p before it divides by it; it decides only where p is one to rounding.
_EPSILON = 1e-12


def topk(log_p: torch.Tensor, k: int) -> torch.Tensor:
    """Tokens as likely as the k-th most likely one, ties with it included."""
    k = min(k, log_p.shape[-1])
    return (log_p >= log_p.topk(k, dim=-1).values[..., -1:]) & (log_p > -math.inf)


def topp(log_p: torch.Tensor, p: float) -> torch.Tensor:
    """The most likely tokens, up to and including the one with which their mass reaches p; all for p = 1."""
    import torch

    if p >= 1:  # summed up, probabilities may reach 1 before the last token
        return log_p > -math.inf
    ordered, order = torch.sort(log_p, dim=-1, descending=True, stable=True)
    mass = ordered.exp()
    before = mass.cumsum(-1) - mass
    passes = (before < p) & (ordered > -math.inf)
    return torch.zeros_like(passes).scatter(-1, order, passes)


def plausible(log_p: torch.Tensor, alpha: float) -> torch.Tensor:
    """Tokens with at least alpha times the probability of the most likely one (2210.15097, equation 2)."""
    return (log_p >= log_p.amax(-1, keepdim=True) + math.log(alpha)) & (log_p > -math.inf)


def kl_indicator(log_p: torch.Tensor, log_q: torch.Tensor, node: KLIndicator) -> torch.Tensor:
    """Tokens whose removal from p changes KL(p || q) by more than `node.divergence` in the wanted direction.

    With d(x) = p(x) log(p(x) / q(x)), removing x leaves the divergence

        Z(x) = log((1 - q(x)) / (1 - p(x))) + (KL - d(x)) / (1 - p(x))
    """
    import torch

    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where(p > 0, log_p - log_q, 0.0)
    d = torch.where(p > 0, p * ratio, 0.0)
    kl = d.sum(-1, keepdim=True)
    left = 1 - p + _EPSILON
    change = torch.log((1 - q + _EPSILON) / left) + (1 + _EPSILON) / left * (kl - d) - kl
    change = torch.nan_to_num(-change if node.minimize else change, nan=-math.inf)
    passes = change > node.divergence
    if node.include_max:
        passes = passes & (log_p < log_q)
    if node.top_k:
        best = change.topk(min(node.top_k, change.shape[-1]), dim=-1).indices
        passes = passes & torch.zeros_like(passes).scatter(-1, best, True)
    return passes

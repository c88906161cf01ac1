"""Whether samples come from a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of a correct engine, one test in this many fails.
SIGNIFICANCE = 1e-4
# What a test of samples against a *wrong* distribution must fall below, or it could not tell them apart.
CLEARLY_WRONG = 1e-12


def chi_square(tokens: Sequence[int], logprobs: torch.Tensor) -> float:
    """p-value of Pearson's test of `tokens` against log-probabilities ``[vocab]``.

    Tokens of which fewer than five are expected share one bin.
    """
    logprobs = logprobs.double()
    observed = torch.bincount(torch.tensor(tokens), minlength=len(logprobs)).double()
    if bool((observed[torch.isneginf(logprobs)] > 0).any()):
        return 0.0
    expected = logprobs.exp() * len(tokens)
    frequent = expected >= 5
    observed, expected = (
        torch.cat([counts[frequent], counts[~frequent].sum()[None]]) for counts in (observed, expected)
    )
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor(int(used.sum()) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def tempered(logprobs: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logprobs / temperature)."""
    return (logprobs / temperature).log_softmax(-1)

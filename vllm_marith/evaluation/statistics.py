"""Intervals: of rates, of perplexities, and of the rate that a method has at a given perplexity.

All are at 95% and about the texts alone: another draw of texts from the same models for the same requests.

Perplexities, and whatever mixes them with rates, are resampled by Rubin's Bayesian bootstrap: the n texts of
an arm get weights from a flat Dirichlet distribution.  Two pseudo-texts of weight Gamma(1/2), one with the
attribute and one without, but with no tokens, join them for rates: a rate's marginal is then
Beta(hits + 1/2, misses + 1/2), Jeffreys' posterior, and an arm in which nothing was hit does not pretend to
be certain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""The normal distribution's quantile at 97.5%."""

REPLICATES = 2000


@dataclass(frozen=True)
class Interval:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    def above(self, other: Interval) -> bool:
        """Whether it is larger and the intervals do not overlap."""
        return self.low > other.high

    def below(self, other: Interval) -> bool:
        """Whether it is smaller and the intervals do not overlap."""
        return self.high < other.low

    def overlaps(self, other: Interval) -> bool:
        """Whether neither is clear of the other."""
        return not (self.above(other) or self.below(other))


@dataclass(frozen=True)
class Texts:
    """What is counted of the texts of one arm.

    Attributes:
        hit: bool [texts], whether a text has the attribute.
        loss: nats [texts], the text's negative log-likelihood, less what is not to count.
        tokens: [texts].
    """

    hit: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.hit)

    @property
    def rate(self) -> float:
        """Share of the texts that have the attribute."""
        return float(self.hit.mean())

    @property
    def nats(self) -> float:
        """Mean loss of a token, the logarithm of the perplexity."""
        return float(self.loss.sum() / self.tokens.sum())


def wilson(hits: int, count: int) -> Interval:
    """Wilson's score interval of a rate."""
    if not count:
        return Interval(math.nan, 0.0, 1.0)
    share = hits / count
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return Interval(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def rate(hit: np.ndarray) -> Interval:
    """Wilson's interval of the share of true values."""
    return wilson(int(hit.sum()), len(hit))


def replicates(texts: Texts, random: np.random.Generator, times: int = REPLICATES) -> np.ndarray:
    """[2, times]: rate and nats per token under resampled weights of the texts."""
    weights = random.standard_exponential((times, len(texts)))  # normalised: flat Dirichlet
    pseudo = random.standard_gamma(0.5, (times, 2))
    rates = (weights @ texts.hit + pseudo[:, 0]) / (weights.sum(1) + pseudo.sum(1))
    return np.stack([rates, (weights @ texts.loss) / (weights @ texts.tokens)])


def perplexity(texts: Texts, random: np.random.Generator) -> Interval:
    """exp(nats per token)."""
    return _percentiles(math.exp(texts.nats), np.exp(replicates(texts, random)[1]))


def mean(values: np.ndarray, random: np.random.Generator) -> Interval:
    """The mean of one number a text."""
    weights = random.standard_exponential((REPLICATES, len(values)))
    return _percentiles(float(values.mean()), weights @ values / weights.sum(1))


def median(values: Sequence[float]) -> Interval:
    """The median, between two order statistics that enclose it in 95% of all cases.

    Nothing is assumed of the distribution.  Fewer than six values cannot enclose it so surely: they have
    the whole line.
    """
    ordered, n = sorted(values), len(values)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    below, tail = 0, 2.0**-n  # so many values can be left out on either side; P(Binomial(n, 1/2) <= below)
    if tail > 0.025:
        return Interval(middle, -math.inf, math.inf)
    while tail + math.comb(n, below + 1) / 2**n <= 0.025:
        below += 1
        tail += math.comb(n, below) / 2**n
    return Interval(middle, ordered[below], ordered[-1 - below])


@dataclass(frozen=True)
class Matched:
    """Where a method's curve is last within the budget.

    Attributes:
        rate: there.
        strength: there, interpolated.
        perplexity: there: the budget, or what the strongest arm has where that is within it.
        reached: whether stronger arms are beyond the budget.
    """

    rate: Interval
    strength: float
    perplexity: float
    reached: bool


def matched(curve: Sequence[tuple[float, Texts]], multiple: float, random: np.random.Generator) -> Matched:
    """The rate at the strongest strength whose perplexity is within `multiple` times that without any.

    curve: (strength, texts) by strength, the first of them the arm without any.  Between two strengths,
        rate and strength are linear in the logarithm of the perplexity.  The strength is chosen by
        perplexity alone, so that the rate is not the best of several.  Each replicate has the budget of its
        own first arm.
    """
    strengths = np.array([strength for strength, _ in curve])
    measured = np.array([[texts.rate, texts.nats] for _, texts in curve])[:, :, None]  # [arms, 2, 1]
    value, strength, level, reached = (
        found.item() for found in _strongest(strengths, measured, math.log(multiple))
    )
    drawn = np.stack([replicates(texts, random) for _, texts in curve])  # [arms, 2, times]
    others, *_ = _strongest(strengths, drawn, math.log(multiple))
    return Matched(_percentiles(value, others), strength, math.exp(level), reached)


def _strongest(strengths: np.ndarray, curves: np.ndarray, slack: float) -> tuple[np.ndarray, ...]:
    """Where each of several curves is last within its start plus `slack` > 0.

    strengths: [arms].
    curves: [arms, 2, times], rates and nats.

    Returns rate, strength, nats and whether the curve goes beyond that, all [times].
    """
    rates, nats = curves[:, 0], curves[:, 1]
    limit = nats[0] + slack
    last = len(strengths) - 1
    before = last - (nats <= limit)[::-1].argmax(0)  # the start is within, always
    reached = before < last
    after, each = np.minimum(before + 1, last), np.arange(nats.shape[1])
    rise = np.where(reached, nats[after, each] - nats[before, each], 1.0)
    share = np.where(reached, (limit - nats[before, each]) / rise, 0.0)

    def between(values: np.ndarray) -> np.ndarray:
        low, high = values[before, each], values[after, each]
        return low + share * (high - low)

    return between(rates), between(np.tile(strengths[:, None], len(each))), between(nats), reached


def dispersion(hits: Sequence[Sequence[int]], counts: Sequence[Sequence[int]]) -> Interval:
    """How much more seeds differ than draws of texts do: Pearson's chi-squared over its degrees of freedom.

    hits, counts: [arms][seeds].  It is about 1 when a seed is nothing but another draw; the interval is where
    it would lie in 95% of all cases then (normal approximation), not an interval of the value.
    """
    total, freedom = 0.0, 0
    for found, of in zip(hits, counts, strict=True):
        share = sum(found) / sum(of)
        if not 0 < share < 1:
            continue
        total += sum((h - n * share) ** 2 / (n * share * (1 - share)) for h, n in zip(found, of, strict=True))
        freedom += len(found) - 1
    if not freedom:
        return Interval(math.nan, math.nan, math.nan)
    spread = Z * math.sqrt(2 / freedom)
    return Interval(total / freedom, max(0.0, 1 - spread), 1 + spread)


def _percentiles(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, min(float(low), value), max(float(high), value))

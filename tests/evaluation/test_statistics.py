"""Intervals against published values, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vllm_marith.evaluation import statistics
from vllm_marith.evaluation.statistics import Interval, Texts, matched, wilson


def texts(hits: int, count: int, nats: float = 1.0, tokens: int = 48) -> Texts:
    """Texts that all have the same loss per token."""
    hit = np.arange(count) < hits
    return Texts(hit, np.full(count, nats * tokens), np.full(count, tokens))


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_as_published(hits: int, count: int, low: float, high: float) -> None:
    found = wilson(hits, count)
    assert found.value == hits / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-5)
    mirrored = wilson(count - hits, count)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_intervals_are_clear_of_each_other_or_not() -> None:
    low, middle, high = Interval(0.1, 0.0, 0.2), Interval(0.2, 0.2, 0.3), Interval(0.5, 0.4, 0.6)
    assert high.above(low)
    assert low.below(high)
    assert not high.overlaps(low)
    assert low.overlaps(middle)  # they touch
    assert not middle.above(low)


def test_rates_of_replicates_have_jeffreys_posterior() -> None:
    found = statistics.replicates(texts(3, 40), np.random.default_rng(1), 200_000)[0]
    a, b = 3.5, 37.5
    assert found.mean() == pytest.approx(a / (a + b), rel=0.01)
    assert found.var() == pytest.approx(a * b / ((a + b) ** 2 * (a + b + 1)), rel=0.02)
    expected = np.percentile(np.random.default_rng(2).beta(a, b, 200_000), [2.5, 50, 97.5])
    assert np.percentile(found, [2.5, 50, 97.5]) == pytest.approx(expected, rel=0.02)


def test_a_perplexity_is_as_uncertain_as_its_texts() -> None:
    random = np.random.default_rng(3)
    loss, tokens = random.normal(200.0, 30.0, 500), np.full(500, 50)
    found = statistics.perplexity(Texts(loss > 0, loss, tokens), random)
    half = 1.96 * loss.std() / 50 / math.sqrt(500)
    nats = loss.mean() / 50
    assert math.log(found.value) == pytest.approx(nats)
    assert math.log(found.low) == pytest.approx(nats - half, abs=0.1 * half)
    assert math.log(found.high) == pytest.approx(nats + half, abs=0.1 * half)


def test_longer_texts_count_for_more() -> None:
    uneven = Texts(np.zeros(2, bool), np.array([10.0, 400.0]), np.array([10, 100]))
    assert uneven.nats == pytest.approx(410 / 110)


def test_a_mean_is_as_uncertain_as_its_values() -> None:
    values = np.random.default_rng(4).normal(0.3, 0.1, 400)
    found = statistics.mean(values, np.random.default_rng(5))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_matching_interpolates_in_the_logarithm() -> None:
    curve = [
        (0.0, texts(60, 100, nats=1.0)),
        (0.5, texts(40, 100, nats=1.0 + math.log(1.1))),
        (1.0, texts(10, 100, nats=1.0 + math.log(1.1) + 0.4)),
    ]
    found = matched(curve, 1.1 * math.exp(0.1), np.random.default_rng(0))
    assert found.reached
    assert found.perplexity == pytest.approx(math.exp(1.1) * 1.1)
    assert found.strength == pytest.approx(0.625)  # a quarter of the way
    assert found.rate.value == pytest.approx(0.325)
    assert found.rate.low < 0.325 < found.rate.high


def test_the_strongest_within_the_budget_counts_however_good_what_is_weaker() -> None:
    back = [
        (0.0, texts(60, 100)),
        (1.0, texts(0, 100, nats=2.5)),
        (2.0, texts(40, 100, nats=1.2)),
        (3.0, texts(50, 100, nats=3.2)),
        (4.0, texts(5, 100, nats=3.4)),
    ]
    found = matched(back, math.e, np.random.default_rng(0))
    assert found.reached
    assert (found.strength, found.rate.value) == (pytest.approx(2.4), pytest.approx(0.44))
    assert 0.3 < found.rate.low < 0.44 < found.rate.high < 0.6


def test_what_never_leaves_the_budget_is_compared_at_its_strongest() -> None:
    curve = [(0.0, texts(60, 100)), (1.0, texts(0, 100, nats=0.5)), (2.0, texts(20, 100, nats=0.9))]
    found = matched(curve, 1.25, np.random.default_rng(0))
    assert not found.reached
    assert (found.strength, found.rate.value) == (2.0, 0.2)
    assert found.perplexity == pytest.approx(math.exp(0.9))


def test_never_seen_is_not_never() -> None:
    curve = [(0.0, texts(60, 100)), (1.0, texts(0, 100))]
    found = matched(curve, 1.25, np.random.default_rng(0)).rate
    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.0247, abs=0.003)  # Beta(1/2, 100.5) at 97.5%


def test_the_interval_of_a_match_covers_what_is_true() -> None:
    """Fifty evaluations of a method whose curve is known."""
    random = np.random.default_rng(6)
    strengths, rates, nats = (0.0, 1.0, 2.0), (0.6, 0.4, 0.1), (1.0, 1.1, 1.5)
    truth = 0.4 - 0.3 * (math.log(1.25) - 0.1) / 0.4
    covered = 0
    for _ in range(50):
        curve = [
            (s, Texts(random.random(200) < r, 48 * random.normal(n, 0.3, 200), np.full(200, 48)))
            for s, r, n in zip(strengths, rates, nats, strict=True)
        ]
        found = matched(curve, 1.25, random).rate
        covered += found.low <= truth <= found.high
    assert covered >= 43  # 47.5 expected; fewer than 43 in one case of a hundred


def test_seeds_that_are_draws_have_a_dispersion_of_one() -> None:
    random = np.random.default_rng(7)
    counts = [[100, 100, 100]] * 200
    drawn = [[int(random.binomial(100, 0.3)) for _ in range(3)] for _ in counts]
    even = statistics.dispersion(drawn, counts)
    assert even.low <= even.value <= even.high
    assert even.value == pytest.approx(1, abs=0.2)
    uneven = statistics.dispersion([[20, 30, 40]] * 200, counts)
    assert uneven.value > uneven.high
    assert math.isnan(statistics.dispersion([[0, 0, 0]], [[5, 5, 5]]).value)


def test_the_median_between_order_statistics() -> None:
    found = statistics.median([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    assert (found.value, found.low, found.high) == (3.5, 1.0, 6.0)
    nine = statistics.median([float(i) for i in range(9)])
    assert (nine.value, nine.low, nine.high) == (4.0, 1.0, 7.0)
    few = statistics.median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (few.value, few.low, few.high) == (3.0, -math.inf, math.inf)


@pytest.mark.parametrize("count", [6, 9, 18, 25])
def test_the_medians_interval_covers(count: int) -> None:
    """As tables of the sign test have it: the widest that is left out has at most 2.5% on either side."""
    found = statistics.median(list(map(float, range(count))))
    left = int(found.low)
    assert sum(math.comb(count, i) for i in range(left + 1)) <= 0.025 * 2**count
    assert sum(math.comb(count, i) for i in range(left + 2)) > 0.025 * 2**count
    assert found.high == count - 1 - left

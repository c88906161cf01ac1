"""How far `auto` drafts, in worlds of which we know what would be best."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from vllm_marith.engine.core.pacing import Pacing, StepCosts
from vllm_marith.plan import cost_of_a_token

LONGEST = 8
ROUNDS = 1500


@dataclass
class World:
    """A step takes fixed + token * tokens + draft * passes seconds, give or take the noise."""

    acceptance: float
    token: float = 0.02
    draft: float = 0.1
    members: int = 2
    fixed: float = 1.0
    passes: float = 1.0
    noise: float = 0.1

    def step(self, length: int) -> float:
        """Seconds of a step with so many drafted tokens."""
        tokens = self.members * (length + 1)
        return self.fixed + self.token * tokens + self.draft * self.passes * length

    def cost_of_a_token(self, length: int) -> float:
        """On average, when every round drafts so many."""
        return cost_of_a_token(self.acceptance, 0, self.step, length)

    @property
    def best(self) -> float:
        return min(map(self.cost_of_a_token, range(LONGEST + 1)))


def lived(world: World, pacing: Pacing, rounds: int, random: np.random.Generator) -> list[int]:
    """The lengths of so many rounds; the pacing sees their noisy durations and what was kept."""
    lengths = []
    for _ in range(rounds):
        length = pacing.length("formula", world.members, LONGEST, world.passes)
        noise = random.lognormal(0, world.noise)
        pacing.observe_step(
            world.step(length) * noise, world.members * (length + 1), round(length * world.passes)
        )
        if length:
            kept = random.random(length) < world.acceptance
            pacing.observe_round("formula", length, length if kept.all() else int(kept.argmin()))
        lengths.append(length)
    return lengths


def cost(world: World, lengths: list[int]) -> float:
    """Expected seconds over expected tokens of these rounds: without the noise."""
    tokens = sum(sum(world.acceptance**n for n in range(length + 1)) for length in lengths)
    return sum(map(world.step, lengths)) / tokens


@pytest.fixture
def random() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.6, 0.85, 1.0])
def test_never_much_dearer_than_off_and_soon_near_the_best(acceptance, random):
    """Learning included, 5 % over no drafting at most; later, 10 % over the best length."""
    for token, draft, members in itertools.product((0.0, 0.1), (0.02, 0.3, 1.5), (1, 3)):
        world = World(acceptance, token, draft, members)
        lengths = lived(world, Pacing(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.cost_of_a_token(0), world
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.1 * world.best, world


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise(noise, random):
    for acceptance in (0.1, 0.9):
        world = World(acceptance, noise=noise)
        lengths = lived(world, Pacing(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.cost_of_a_token(0)
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.1 * world.best


def test_ngrams_need_no_pass(random):
    world = World(0.3, draft=5.0, passes=0.0)
    pacing = Pacing()
    other = replace(world, acceptance=0.9, draft=0.1, passes=1.0)  # without which passes are never seen
    lived(other, pacing, 200, random)
    assert cost(world, lived(world, pacing, ROUNDS, random)[ROUNDS // 2 :]) <= 1.1 * world.best


@pytest.mark.parametrize("good", [World(0.9), World(0.9, token=0.05)])
def test_change_is_noticed(good, random):
    """In either direction, whether acceptance changed or what a pass costs."""
    for bad in (replace(good, acceptance=0.02), replace(good, draft=4.0)):
        pacing = Pacing()
        lived(bad, pacing, 600, random)
        lived(good, pacing, 900, random)
        assert cost(good, lived(good, pacing, 200, random)) <= 1.15 * good.best
        lived(bad, pacing, 100, random)
        assert cost(bad, lived(bad, pacing, 400, random)) <= 1.05 * bad.cost_of_a_token(0)


def test_lengths_stay_while_little_is_to_be_gained(random):
    """The best of neighbours that differ by nothing that could be measured is not sought every round."""
    lengths = lived(World(0.8, draft=0.05), Pacing(), ROUNDS, random)[ROUNDS // 2 :]
    drafted = [length for length in lengths if length]
    assert 0.98 * len(lengths) <= len(drafted) < len(lengths), "now and then without, to know what that costs"
    assert sum(one != other for one, other in itertools.pairwise(drafted)) <= len(drafted) / 30


def test_the_same_observations_give_the_same_lengths():
    first, second = (lived(World(0.7), Pacing(), 300, np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_formulas_are_told_apart(random):
    pacing = Pacing()
    for _ in range(400):
        for key, acceptance in (("good", 0.95), ("bad", 0.0)):
            world = World(acceptance)
            length = pacing.length(key, world.members, LONGEST)
            pacing.observe_step(world.step(length), world.members * (length + 1), length)
            if length:
                pacing.observe_round(key, length, length if acceptance else 0)
    asked = {key: [pacing.length(key, 2, LONGEST) for _ in range(20)] for key in ("good", "bad")}
    assert (np.median(asked["good"]), np.median(asked["bad"])) == (LONGEST, 0)
    assert max(pacing.length("good", 2, 3) for _ in range(20)) == 3, "never more than is allowed"
    assert max(pacing.length("good", 2, 0) for _ in range(200)) == 0


def test_formulas_that_nobody_asks_for_are_forgotten():
    pacing = Pacing()
    for number in range(3000):
        pacing.length(f"formula {number}", 1, LONGEST)
    assert len(pacing._formulas) <= 1024
    assert "formula 2999" in pacing._formulas


def test_costs_are_found_and_not_negative(random):
    costs = StepCosts()
    assert not costs.known
    for _ in range(300):
        tokens, passes = int(random.integers(1, 60)), int(random.integers(0, 9))
        costs.observe(0.5 + 0.01 * tokens + 0.2 * passes, tokens, passes)
    assert costs.known
    np.testing.assert_allclose(
        [costs.of(0, 0), costs.of(100, 0), costs.of(0, 10)], [0.5, 1.5, 2.5], rtol=1e-4
    )
    falling = StepCosts()
    for _ in range(300):
        tokens, passes = int(random.integers(1, 60)), int(random.integers(0, 9))
        falling.observe(2 - 0.01 * tokens + 0.2 * passes, tokens, passes)
    assert 0 <= falling.of(0, 0) <= falling.of(100, 0) <= falling.of(100, 10)
    assert falling.of(100, 0) == falling.of(0, 0), "more tokens cannot make a step faster"


def test_a_hiccup_is_not_believed(random):
    """A step that compiles, or waits, says nothing about drafts."""
    world, pacing = World(0.9), Pacing()
    lived(world, pacing, 300, random)
    pacing.observe_step(1000 * world.step(LONGEST), world.members * (LONGEST + 1), LONGEST)
    assert cost(world, lived(world, pacing, 100, random)) <= 1.1 * world.best


def test_requests_come_without_a_drafter_that_does_not_pay() -> None:
    """But for one in sixteen, so that better times are noticed; and again with it when it pays."""
    random, pacing = np.random.default_rng(0), Pacing()
    assert pacing.is_worth_a_drafter("formula")
    hopeless = World(acceptance=0.1, draft=2.0)
    lived(hopeless, pacing, 200, random)
    assert sum(pacing.is_worth_a_drafter("formula") for _ in range(160)) == 10
    assert pacing.is_worth_a_drafter("another formula")
    lived(World(acceptance=0.95, draft=0.01), pacing, 3000, random)
    assert all(pacing.is_worth_a_drafter("formula") for _ in range(32))

"""How far `auto` drafts, in worlds of which we know what would be best."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest

from vllm_marith.engine.core.costs import StepCosts, Work
from vllm_marith.engine.core.pacing import Pacing, Rows
from vllm_marith.plan import cost_of_a_token

LONGEST = 8
ROUNDS = 1500


@dataclass
class World:
    """A step takes fixed + token * tokens + draft * passes seconds, give or take the noise.

    With a rider there is a second model whose only member drafts: its passes are the drafts', and it takes
    `rider` seconds in every step that has a row of it.  Drafts take `drafting` more, however many they are.
    """

    acceptance: float
    token: float = 0.02
    draft: float = 0.1
    members: int = 2
    fixed: float = 1.0
    passes: float = 1.0
    noise: float = 0.1
    rider: float | None = None
    drafting: float = 0.0

    @property
    def rows(self) -> Rows:
        rode = self.rider is not None
        running = np.array([self.members, float(rode)])
        return Rows(running, np.array([0.0, float(rode)]), self.passes * np.array([1.0 - rode, float(rode)]))

    def step(self, work: Work) -> float:
        """Seconds."""
        ridden = (self.rider or 0.0) * (work.tokens[1] > 0)
        drafts = self.drafting * work.drafts + self.draft * work.passes.sum()
        return self.fixed + self.token * work.tokens.sum() + drafts + ridden

    def cost_of_a_token(self, length: int) -> float:
        """On average, when every round drafts so many."""
        return cost_of_a_token(self.acceptance, 0, lambda n: self.step(self.rows.step(n)), length)

    @property
    def off(self) -> float:
        """Cost of a token without drafts and without those who only draft."""
        return self.step(self.rows.without_drafters())

    @property
    def best(self) -> float:
        return min(self.off, *map(self.cost_of_a_token, range(LONGEST + 1)))


def lived(
    world: World, pacing: Pacing, rounds: int, random: np.random.Generator, request: int = 0
) -> list[int]:
    """The lengths of so many rounds; the pacing sees their noisy durations and what was kept.

    request: tokens of one, where requests come one after the other, with drafters or without them; the length
        is -1 for rounds without them.
    """
    lengths = []
    with_drafters, left = True, request
    for _ in range(rounds):
        if request and left <= 0:
            with_drafters, left = pacing.wants_drafters("formula"), request
        length = pacing.length("formula", world.rows, LONGEST) if with_drafters else -1
        work = world.rows.step(length) if with_drafters else world.rows.without_drafters()
        noise = random.lognormal(0, world.noise)
        pacing.costs.observe(world.step(work) * noise, work)
        kept = 0
        if length > 0:
            stood = random.random(length) < world.acceptance
            kept = length if stood.all() else int(stood.argmin())
            pacing.observe_round("formula", length, kept)
        left -= 1 + kept
        lengths.append(length)
    return lengths


def cost(world: World, lengths: list[int]) -> float:
    """Expected seconds over expected tokens of these rounds: without the noise."""
    tokens = sum(sum(world.acceptance**n for n in range(max(0, length) + 1)) for length in lengths)
    bare = world.rows.without_drafters()
    return sum(world.step(bare if n < 0 else world.rows.step(n)) for n in lengths) / tokens


def pacing_of_two() -> Pacing:
    return Pacing(constituents=2)


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
        lengths = lived(world, pacing_of_two(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.off, world
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.1 * world.best, world


@pytest.mark.parametrize("acceptance", [0.5, 0.9])
def test_drafts_that_cost_something_however_few(acceptance, random):
    for drafting, draft in itertools.product((0.1, 0.5), (0.02, 0.3)):
        world = World(acceptance, draft=draft, drafting=drafting)
        lengths = lived(world, pacing_of_two(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.off, world
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.15 * world.best, world


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise(noise, random):
    for acceptance in (0.1, 0.9):
        world = World(acceptance, noise=noise)
        lengths = lived(world, pacing_of_two(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.off
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.1 * world.best


def test_ngrams_need_no_pass(random):
    """Nor that anybody ever took one."""
    for acceptance in (0.0, 0.3, 0.9):
        world = World(acceptance, draft=5.0, passes=0.0)
        lengths = lived(world, pacing_of_two(), ROUNDS, random)
        assert cost(world, lengths) <= 1.05 * world.off
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.1 * world.best


@pytest.mark.parametrize("acceptance", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("rider", [0.02, 0.5, 3.0])
def test_a_drafter_that_rides_in_every_step(acceptance, rider, random):
    """Requests come without it where a token is cheaper so, even if with it drafts are better than none."""
    for draft, request in ((0.02, 20), (0.3, 100), (1.5, 40)):
        world = World(acceptance, draft=draft, members=1, rider=rider)
        lengths = lived(world, pacing_of_two(), 4 * ROUNDS, random, request)
        assert cost(world, lengths[ROUNDS // 2 :]) <= 1.05 * world.off, world
        assert cost(world, lengths[2 * ROUNDS :]) <= 1.25 * world.best, world


@pytest.mark.parametrize("good", [World(0.9), World(0.9, token=0.05)])
def test_change_is_noticed(good, random):
    """In either direction, whether acceptance changed or what a pass costs."""
    for bad in (replace(good, acceptance=0.02), replace(good, draft=4.0)):
        pacing = pacing_of_two()
        lived(bad, pacing, 600, random)
        lived(good, pacing, 900, random)
        assert cost(good, lived(good, pacing, 200, random)) <= 1.15 * good.best
        lived(bad, pacing, 100, random)
        assert cost(bad, lived(bad, pacing, 400, random)) <= 1.05 * bad.off


def test_lengths_stay_while_little_is_to_be_gained(random):
    """The best of neighbours that differ by nothing that could be measured is not sought every round."""
    lengths = lived(World(0.8, draft=0.05), pacing_of_two(), ROUNDS, random)[ROUNDS // 2 :]
    drafted = [length for length in lengths if length]
    assert 0.98 * len(lengths) <= len(drafted) < len(lengths), "now and then without, to know what that costs"
    assert sum(one != other for one, other in itertools.pairwise(drafted)) <= len(drafted) / 30


def test_the_same_observations_give_the_same_lengths():
    first, second = (lived(World(0.7), pacing_of_two(), 300, np.random.default_rng(5)) for _ in range(2))
    assert first == second


def test_formulas_are_told_apart(random):
    pacing = pacing_of_two()
    for _ in range(400):
        for key, acceptance in (("good", 0.95), ("bad", 0.0)):
            world = World(acceptance)
            length = pacing.length(key, world.rows, LONGEST)
            work = world.rows.step(length)
            pacing.costs.observe(world.step(work), work)
            if length:
                pacing.observe_round(key, length, length if acceptance else 0)
    asked = {
        key: [pacing.length(key, World(0.0).rows, LONGEST) for _ in range(20)] for key in ("good", "bad")
    }
    assert np.median(asked["good"]) >= LONGEST - 1
    assert np.median(asked["bad"]) == 0
    assert max(pacing.length("good", World(0.0).rows, 3) for _ in range(20)) == 3, (
        "never more than is allowed"
    )
    assert max(pacing.length("good", World(0.0).rows, 0) for _ in range(200)) == 0


def test_formulas_that_nobody_asks_for_are_forgotten():
    pacing = pacing_of_two()
    for number in range(3000):
        pacing.length(f"formula {number}", World(0.0).rows, LONGEST)
    assert len(pacing._formulas) <= 1024
    assert "formula 2999" in pacing._formulas


def works(random: np.random.Generator) -> Work:
    tokens, passes = random.integers(0, 60, 2).astype(float), random.integers(0, 9, 2).astype(float)
    return Work(tokens, passes, bool(random.integers(0, 2)))


def test_costs_are_found_and_not_negative(random):
    costs = StepCosts(2)
    assert not costs.known

    def seconds(work: Work) -> float:
        ran = work.tokens > 0
        return (
            0.5
            + 0.4 * work.drafts
            + ran @ [0.0, 0.3]
            + work.tokens @ [0.01, 0.002]
            + work.passes @ [0.2, 0.05]
        )

    for _ in range(400):
        work = works(random)
        costs.observe(seconds(work), work)
    assert costs.known
    for _ in range(20):
        work = works(random)
        assert costs.of(work) == pytest.approx(seconds(work), rel=1e-3)
    falling = StepCosts(2)
    for _ in range(400):
        work = works(random)
        falling.observe(4 - work.tokens @ [0.01, 0.01] + work.passes @ [0.2, 0.05], work)
    few, many = (Work(np.full(2, n), np.zeros(2)) for n in (1.0, 50.0))
    assert 0 < falling.of(few) == falling.of(many), "more tokens cannot make a step faster"


def test_what_was_never_seen_is_not_known():
    costs = StepCosts(2)
    both, one = Work(np.ones(2), np.zeros(2)), Work(np.array([1.0, 0.0]), np.zeros(2))
    drafting = Work(np.ones(2), np.array([0.0, 3.0]), drafts=True)
    assert costs.knows(both)
    assert not costs.knows(one)
    for _ in range(3):
        assert not costs.knows(drafting)
        costs.observe(1.0, one)
        costs.observe(1.0, drafting)
    assert costs.knows(one)
    assert costs.knows(drafting)


def test_a_hiccup_is_not_believed(random):
    """A step that compiles, or waits, says nothing about drafts."""
    world, pacing = World(0.9), pacing_of_two()
    lived(world, pacing, 300, random)
    work = world.rows.step(LONGEST)
    pacing.costs.observe(1000 * world.step(work), work)
    assert cost(world, lived(world, pacing, 100, random)) <= 1.1 * world.best


def test_the_first_draft_may_compile() -> None:
    """What it takes once is not what drafts take; else nobody would try them again for long."""
    random, world, pacing = np.random.default_rng(0), World(0.9), pacing_of_two()
    bare, drafting = world.rows.step(0), world.rows.step(1)
    for _ in range(20):
        pacing.costs.observe(world.step(bare), bare)
    pacing.costs.observe(300 * world.step(drafting), drafting)
    assert cost(world, lived(world, pacing, 200, random)[100:]) <= 1.1 * world.best


@pytest.mark.parametrize("stood", [0, 1])
def test_one_draft_after_a_long_time_is_not_all_there_is_to_know(stood: int) -> None:
    pacing, world = pacing_of_two(), World(0.0)
    for _ in range(50):
        pacing.observe_round("formula", 4, 4 * (1 - stood))
    for _ in range(5000):
        pacing.length("formula", world.rows, 0)
    pacing.observe_round("formula", 1, stood)
    assert pacing._formula("formula").acceptance == pytest.approx(0.5, abs=0.3)


def test_requests_come_without_a_drafter_that_does_not_pay() -> None:
    """But for a few, so that better times are noticed; and again with it when it pays."""
    random, pacing = np.random.default_rng(0), pacing_of_two()
    assert pacing.wants_drafters("formula")
    hopeless = World(acceptance=0.1, draft=2.0, members=1, rider=0.5)
    lived(hopeless, pacing, 2000, random, request=20)
    assert 1 <= sum(pacing.wants_drafters("formula") for _ in range(1024)) <= 32
    assert pacing.wants_drafters("another formula")
    lived(World(acceptance=0.95, draft=0.01, members=1, rider=0.01), pacing, 6000, random, request=20)
    assert 1024 - 32 <= sum(pacing.wants_drafters("formula") for _ in range(1024)) < 1024

"""The scheduler's rules one by one, without a model: what each of them is for."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.support.fake_engine import FakeEngine, Job, Progress
from tests.support.fake_scheduler import Options
from tests.support.fake_worker import BLOCK_SIZE
from vllm_marith.engine.core.blocks import BlockAccount
from vllm_marith.engine.core.pacing import Pacing
from vllm_marith.engine.core.scheduler import GroupMixin
from vllm_marith.engine.group import KEY
from vllm_marith.engine.speculation import slots_ahead


def prompt(length: int, first: int = 50) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def group(*lengths: int, **kwargs: Any) -> Job:
    return Job(tuple(prompt(n, 50 + i) for i, n in enumerate(lengths)), **kwargs)


def plain(length: int, **kwargs: Any) -> Job:
    return Job((prompt(length),), formula=False, **kwargs)


def test_plain_requests_are_scheduled_as_by_vllm(tiny_model: Any) -> None:
    """Before a group comes and after it has gone, every step is vLLM's own."""
    rng = random.Random(0)
    jobs = [
        Job((prompt(rng.randint(1, 90), rng.choice([50, 50, 300])),), rng.randint(1, 60), formula=False)
        for _ in range(80)
    ]
    for asynchronous, by_priority in itertools.product([False, True], repeat=2):
        options = Options(asynchronous, by_priority, num_blocks=60, max_num_batched_tokens=80)
        ours = FakeEngine(tiny_model, options)
        theirs = FakeEngine(tiny_model, replace(options, formulas=False))
        for engine in (ours, theirs):
            engine.add(plain(20) if engine is theirs else group(20, 20))
            engine.drain()
            engine.scheduler.reset_prefix_cache()
            engine.steps.clear()
            for i, job in enumerate(jobs):
                engine.add(job)
                if i % 3 == 0:
                    engine.step()
            engine.drain()
        assert [step.num_scheduled_tokens for step in ours.steps] == [
            step.num_scheduled_tokens for step in theirs.steps
        ]
        assert [progress.tokens for progress in ours.jobs.values()][1:] == [
            progress.tokens for progress in theirs.jobs.values()
        ][1:]


@pytest.mark.parametrize(("asynchronous", "drafts"), [(False, 0), (True, 0), (False, 2)])
def test_a_torn_group_fails_alone(tiny_model: Any, asynchronous: bool, drafts: int, monkeypatch: Any) -> None:
    """The rules are switched off, so vLLM tears groups; no client sees a token that is not the formula's."""
    monkeypatch.setattr(GroupMixin, "_make_room", lambda self: False)
    engine = FakeEngine(tiny_model, Options(asynchronous, num_blocks=24, drafts=drafts), strict=False)
    # Steps are accounted by base model, also those of a request that has just failed.
    engine.scheduler._num_constituents, engine.scheduler._pacing = 2, Pacing(2)
    for i in range(6):
        engine.add(group(10, 9, 8, max_tokens=40, drafts=drafts))
        engine.add(plain(10 + i, max_tokens=40))
    engine.drain()
    ends = {kind: [p.ended for p in engine.jobs.values() if p.job.formula is kind] for kind in (True, False)}
    assert "error" in ends[True]
    assert set(ends[False]) == {"length"}


def test_a_group_fails_when_a_follower_is_lost(tiny_model: Any) -> None:
    from vllm.v1.request import RequestStatus

    engine = FakeEngine(tiny_model, Options(), strict=False)
    lost, other = engine.add(group(5, 6)), engine.add(group(5, 6))
    engine.step()
    engine.scheduler.finish_requests(f"{lost}+1", RequestStatus.FINISHED_ERROR)
    engine.drain()
    assert (engine.jobs[lost].ended, engine.jobs[other].ended) == ("error", "length")


def test_a_formula_that_was_never_admitted_fails(tiny_model: Any) -> None:
    engine = FakeEngine(tiny_model, Options(), strict=False)
    request = engine.request("r0", plain(5), 0.0)
    request.sampling_params.extra_args = {KEY: "a - b"}
    engine.jobs["r0"] = Progress(plain(5), 0, 8)
    engine.scheduler.add_request(request)
    engine.drain()
    assert engine.jobs["r0"].ended == "error"


@pytest.mark.parametrize(
    "options",
    [
        Options(max_num_seqs=3),  # rows
        Options(num_blocks=17),  # blocks
        Options(max_num_seqs=16, max_num_scheduled_tokens=3),  # tokens of a step
        Options(num_blocks=24, watermark=0.2),
    ],
)
def test_a_group_that_can_never_fit_is_refused(tiny_model: Any, options: Options) -> None:
    engine = FakeEngine(tiny_model, options)
    engine.add(group(35, 35, 35, 35))
    engine.add(group(35, 35))
    engine.drain()
    assert [p.ended for p in engine.jobs.values()] == ["error", "length"]


def test_followers_are_not_reported_as_finished(tiny_model: Any) -> None:
    engine = FakeEngine(tiny_model, Options(), include_finished_set=True)
    for _ in range(3):
        engine.add(group(5, 6, 7))
    engine.abort(["r1"])
    engine.drain()


def test_an_engine_without_room_serves_one_group_after_another(tiny_model: Any, monkeypatch: Any) -> None:
    """However scarce blocks seem, the last one left is never preempted."""
    monkeypatch.setattr(BlockAccount, "can_step", lambda *_: False)
    engine = FakeEngine(tiny_model, Options(asynchronous=True))
    for _ in range(4):
        engine.add(group(9, 10, 1, max_tokens=3))
        engine.add(plain(9, max_tokens=3))
    engine.drain()
    assert {progress.ended for progress in engine.jobs.values()} == {"length"}


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_groups_may_fill_the_pool(tiny_model: Any, num_groups: int, asynchronous: bool) -> None:
    """Two members of 7 blocks each, to the last slot: nothing is preempted, nothing is cut off."""
    engine = FakeEngine(tiny_model, Options(asynchronous, num_blocks=1 + 14 * num_groups))
    for _ in range(num_groups):
        engine.add(group(8, 8, max_tokens=49))
    engine.drain()
    assert {len(progress.tokens) for progress in engine.jobs.values()} == {49}
    assert engine.scheduler.figures.preempted == 0


@pytest.mark.parametrize("by_priority", [False, True])
def test_the_last_in_line_makes_room(tiny_model: Any, by_priority: bool) -> None:
    engine = FakeEngine(tiny_model, Options(by_priority=by_priority, num_blocks=20))
    older = engine.add(group(8, 8, max_tokens=60, priority=2))
    younger = engine.add(group(8, 8, max_tokens=60, priority=1))
    preempted = {name: engine.scheduler.groups[name].leader for name in (older, younger)}
    engine.drain()
    victims = [name for name, leader in preempted.items() if leader.num_preemptions]
    assert victims == [older if by_priority else younger]


def test_room_for_a_prompt_in_chunks(tiny_model: Any) -> None:
    """The last chunk of a prompt that was admitted no longer fits when a group grows in that step."""
    preemptions = []
    for length in range(2, 10):
        options = Options(num_blocks=18, max_num_batched_tokens=62, prefix_caching=False)
        engine = FakeEngine(tiny_model, options)
        engine.add(group(length, length, max_tokens=20))
        engine.step()
        engine.add(plain(120, max_tokens=2))
        request = engine.scheduler.requests["r1"]
        engine.drain()
        preemptions.append(request.num_preemptions)
    assert max(preemptions) > 0


def test_members_of_one_token_make_nobody_else_give_way(tiny_model: Any) -> None:
    """A group that turns out not to fit as its late members enter goes back alone."""
    preemptions = []
    for delay in range(12):
        engine = FakeEngine(tiny_model, Options(num_blocks=11, prefix_caching=False))
        for _ in range(2):
            engine.add(group(8, 8, max_tokens=9))
        for _ in range(delay):
            engine.step()
        engine.add(group(1, 1, 1))
        engine.drain()
        preemptions.append(engine.scheduler.figures.preempted)
    assert max(preemptions) == 1


def test_members_of_one_token_keep_their_rows(tiny_model: Any) -> None:
    """Plain requests that arrive at every step cannot keep a group's late members out."""
    engine = FakeEngine(tiny_model, Options(max_num_seqs=4, max_num_batched_tokens=8))
    for _ in range(4):
        engine.add(plain(3, max_tokens=9))
    name = engine.add(group(20, 1, 1))
    for _ in range(40):
        engine.add(plain(3, max_tokens=9))
        engine.step()
    assert engine.jobs[name].ended == "length"
    engine.drain()


def test_members_of_one_token_and_adapters(tiny_model: Any) -> None:
    """Beside a request with another adapter, they do not enter until it is gone."""
    for length in range(40, 45):
        options = Options(max_num_seqs=4, max_num_batched_tokens=4, max_adapters=1)
        engine = FakeEngine(tiny_model, options)
        engine.add(plain(2, max_tokens=6, adapters=(1,)))
        engine.add(group(1, 1, adapters=(2,)))
        engine.step()
        engine.add(plain(length))
        engine.drain()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_adapters_of_members_that_are_held(asynchronous: bool, tiny_model: Any) -> None:
    """vLLM counts the adapters of rows that step only: nobody may take that of a member that waits."""
    options = Options(asynchronous, max_num_seqs=6, max_num_batched_tokens=8, max_adapters=2)
    engine = FakeEngine(tiny_model, options)
    first = engine.add(group(2, 60, adapters=(1, 2), max_tokens=3))
    for _ in range(3):
        engine.step()
    second = engine.add(plain(2, adapters=(3,), max_tokens=3))
    while engine.jobs[first].ended is None:
        engine.step()
        assert not engine.jobs[second].tokens
    engine.drain()
    assert engine.scheduler.figures.preempted == 0
    assert engine.scheduler.preempted_by_vllm == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_more_adapters_than_fit(asynchronous: bool, tiny_model: Any) -> None:
    """Groups of two adapters of five, and plain requests: each has its turn, in the order they came."""
    options = Options(asynchronous, max_num_seqs=12, max_num_batched_tokens=24, max_adapters=2)
    engine = FakeEngine(tiny_model, options)
    names = []
    for i in range(30):
        adapters = (1 + i % 5, 0, 1 + (i + 1 + i // 5) % 5)
        job = plain(6, adapters=adapters) if i % 4 == 3 else group(5, 9, 3, adapters=adapters)
        names.append(engine.add(job))
    entered: dict[str, int] = {}
    while engine.alive:
        engine.step()
        for new in engine.steps[-1].scheduled_new_reqs:
            if new.req_id in engine.jobs:
                entered.setdefault(new.req_id, len(engine.steps))
    assert sorted(entered, key=lambda name: (entered[name], names.index(name))) == names
    assert engine.scheduler.figures.preempted == 0
    engine.check_returned()


def test_groups_without_adapters_take_none(tiny_model: Any) -> None:
    """Plain requests with adapters beside them are vLLM's, which lets one wait and goes on with the next."""
    engine = FakeEngine(tiny_model, Options(max_adapters=1))
    engine.add(group(5, 9, max_tokens=20))
    engine.step()
    for adapter in (1, 2, 1):
        engine.add(plain(5, adapters=(adapter,), max_tokens=20))
    for _ in range(3):
        engine.step()
    assert [bool(progress.tokens) for progress in engine.jobs.values()] == [True, True, False, True]
    engine.drain()


def test_members_of_one_token_in_a_pause(tiny_model: Any) -> None:
    """A pause as they are about to enter: afterwards a long prompt must not take their tokens."""
    from vllm.v1.core.sched.interface import PauseState

    engine = FakeEngine(tiny_model, Options(max_num_seqs=3, max_num_batched_tokens=3))
    engine.add(group(3, 1))
    engine.add(plain(30))
    engine.step()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.scheduler.schedule()
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()


def test_members_of_one_token_after_a_preemption_in_flight(tiny_model: Any) -> None:
    """Their first token is on its way: they come back with two, and no longer late."""
    engine = FakeEngine(tiny_model, Options(asynchronous=True, max_num_seqs=3, max_num_batched_tokens=3))
    engine.add(group(1, 1, 1, max_tokens=5))
    while not engine.worker.num_joint_steps:
        engine.step()
    engine.scheduler._preempt_group(engine.scheduler.groups["r0"])
    engine.drain()
    assert engine.jobs["r0"].ended == "length"


@pytest.mark.parametrize("length", range(30, 35))
def test_members_of_one_token_and_resumed_sessions(tiny_model: Any, length: int) -> None:
    """vLLM admits sessions that hold blocks first; they must not take the late members' tokens."""
    options = Options(max_num_seqs=5, max_num_batched_tokens=5)
    engine = FakeEngine(tiny_model, options)
    sessions = ["r0", "r1"]
    first = Job((prompt(9),), 4, formula=False)
    for name in sessions:
        engine.jobs[name] = Progress(first, 0, 4)
        engine.scheduler.add_request(engine.request(name, first, 0.0, resumable=True))
    while engine.alive:
        engine.step()

    engine.add(group(1, 1, 1))
    engine.step()  # released; in the next step its members may enter
    more = prompt(length, 400)
    for name in sessions:
        history = (*first.prompts[0], *engine.jobs[name].tokens[:-1], *more)
        engine.jobs[name] = Progress(Job((history,), 4, formula=False), 0, 4)
        update = engine.request(name, Job((more,), 4, formula=False), 0.0, resumable=True)
        engine.scheduler.add_request(update)
    while engine.alive:
        engine.step()
    engine.abort(sessions)
    engine.drain()


@pytest.mark.parametrize("by_priority", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_clock_may_step(tiny_model: Any, by_priority: bool, asynchronous: bool) -> None:
    """Arrival times are the wall clock's, which is set back and forth: nobody is lost, torn or starved."""
    rng = random.Random(5)
    options = Options(asynchronous, by_priority, num_blocks=18, max_num_seqs=9, max_num_batched_tokens=12)
    engine = FakeEngine(tiny_model, options)
    for _ in range(60):
        lengths = [rng.randint(1, 20) for _ in range(rng.randint(1, 4))]
        job = group(*lengths, max_tokens=rng.randint(1, 40), priority=rng.randrange(2))
        engine.add(job, arrival_time=rng.choice([-1e9, 0.0, rng.random(), 1e12]))
        for _ in range(rng.randint(0, 4)):
            engine.step()
    engine.drain()
    assert engine.scheduler.figures.preempted > 0
    assert not engine.scheduler.figures.failed


@pytest.mark.parametrize("drafts_for_all", [False, True])
def test_admission_and_scheduler_agree_on_the_room_for_drafts(tiny_model: Any, drafts_for_all: bool) -> None:
    """What one of them promises the other keeps: a group with exactly so much room is let in."""
    options = Options(num_blocks=8, drafts=4, drafts_for_all=drafts_for_all)
    engine = FakeEngine(tiny_model, options)
    ahead = slots_ahead(engine.scheduler.vllm_config)
    assert ahead == (5 if drafts_for_all else 9)
    # Seven blocks of eight: of two members, one has four of them and the other three.
    longest, shorter = 4 * BLOCK_SIZE - ahead, 3 * BLOCK_SIZE - ahead
    engine.add(group(longest, shorter, drafts=4))
    engine.drain()
    assert engine.jobs["r0"].ended == "length"
    engine.add(group(longest + 1, shorter, drafts=4))
    assert engine.jobs["r1"].fails


def test_drafts_that_do_not_fit_a_step_leave_no_debt(tiny_model: Any) -> None:
    """Drafts are cut before anybody counts what they leave for prefills."""
    options = Options(drafts=4, drafts_for_all=True, max_num_seqs=8, max_num_batched_tokens=16)
    engine = FakeEngine(tiny_model, options)
    for _ in range(3):
        engine.add(plain(3, max_tokens=90))
    engine.step()
    engine.add(plain(60, max_tokens=4))
    engine.step()  # of its 16 tokens, three rows and their drafts take 15
    name = engine.add(group(1, 1, max_tokens=4))
    engine.step()  # lets the group in
    engine.step()  # in which its members are
    assert engine.steps[-1].num_scheduled_tokens[f"{name}+1"] == 1
    engine.drain()
    assert engine.jobs[name].ended == "length"

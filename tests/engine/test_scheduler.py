"""The scheduler without a model: every rule of a group at every step, whatever the traffic.

`tests.support.fake_engine` checks at each step:

- a member is computed through its last token together with all its group, and all of them have the
  same number of output tokens after every update;
- what a row attends to is what its tokens say (block tables, prefix-cache hits, recomputation);
- clients see their own requests only, each with exactly its tokens;
- each request waits or runs in exactly one place;
- rows and token budget are respected, and vLLM's own loop never preempts while groups live;
- first come, first served: nobody overtakes a group that was never let in;
- something always happens, and in the end everything is given back.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.support.fake_engine import FakeEngine, Job, Progress
from tests.support.fake_scheduler import Options
from vllm_marith.engine.core.scheduler import GroupMixin
from vllm_marith.engine.group import KEY

SEED = int(os.environ.get("MARITH_SEED", random.randrange(2**32)))
EXAMPLES = {"ci": 60, "default": 250, "soak": 2500}[os.environ.get("MARITH_PROFILE", "default")]

common = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

# Prompts of one stream share prefixes.  Of 8k + 1 tokens, all but the last can be in the cache.
lengths = st.one_of(st.just(1), st.sampled_from([9, 17, 33]), st.integers(2, 20), st.integers(2, 100))


def _prompt(stream: int, length: int, own_tail: int) -> tuple[int, ...]:
    shared = [100 + (7 * stream + i * i) % 97 for i in range(length)]
    return (*shared[: length - own_tail], *shared[:own_tail])


prompts = st.builds(_prompt, st.integers(0, 2), lengths, st.sampled_from([0, 0, 0, 1]))
jobs = st.builds(
    Job,
    prompts=st.lists(prompts, min_size=1, max_size=8).map(tuple),
    max_tokens=st.one_of(st.integers(1, 8), st.integers(8, 60)),
    stops=st.booleans(),
    priority=st.integers(0, 2),
    formula=st.sampled_from([True, True, True, False]),
    adapter=st.integers(0, 2),
    grammar=st.sampled_from([False] * 7 + [True]),
)


@st.composite
def engines(draw: Any) -> Options:
    rows = draw(st.integers(3, 24))
    window = draw(st.sampled_from([None, None, None, 6]))
    # vLLM sees to it that a request of the model's length fits.
    smallest = 17 if window is None else 36
    return Options(
        asynchronous=draw(st.booleans()),
        by_priority=draw(st.booleans()),
        prefix_caching=draw(st.sampled_from([True, True, False])),
        num_blocks=draw(st.sampled_from([smallest, smallest + 9, smallest + 20, smallest + 40, 400])),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + draw(st.sampled_from([0, 1, 5, 40, 200])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1])),
        sliding_window=window,
        v2_runner=draw(st.booleans()),
        max_adapters=draw(st.sampled_from([None, None, 1, 2])),
    )


steps = st.tuples(st.just("steps"), st.integers(1, 6))
which = st.integers(0, 50)
traffic = st.lists(
    st.one_of(
        st.tuples(st.just("add"), jobs),
        st.tuples(st.just("burst"), st.lists(jobs, min_size=2, max_size=8)),
        steps,
        steps,
        st.tuples(st.just("abort"), which),
        st.tuples(st.just("abort_meanwhile"), which),
        st.tuples(st.just("compile"), which),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("pause"), st.integers(1, 2)),
        st.tuples(st.just("quiesce"), st.none()),
        st.tuples(st.just("throttle"), st.integers(1, 3)),
    ),
    min_size=8,
    max_size=50,
)
COUNTS = dict.fromkeys(["requests", "members", "steps", "joint", "preemptions", "idle"], 0)


def drive(engine: FakeEngine, traffic: list[tuple[str, Any]]) -> None:
    """Plays traffic, then lets the engine run dry."""
    from vllm.v1.core.sched.interface import PauseState

    def abort(index: int) -> None:
        if alive := engine.alive:
            engine.abort([alive[index % len(alive)]])

    for kind, value in traffic:
        if kind == "add":
            engine.add(value)
        elif kind == "burst":
            for job in value:  # as n > 1: several of one arrival time
                engine.add(job, arrival_time=float(len(engine.jobs) // 6))
        elif kind == "steps":
            for _ in range(value):
                engine.step()
        elif kind == "abort":
            abort(value)
        elif kind == "abort_meanwhile":
            engine.step(meanwhile=partial(abort, value))
        elif kind == "compile" and engine.grammars:
            names = list(engine.grammars)
            engine.compile(names[value % len(names)], error=value % 5 == 1)
        elif kind == "reset":
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif kind == "pause":
            engine.scheduler.set_pause_state(PauseState(value))
            for _ in range(3):
                engine.step()
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        elif kind == "quiesce":  # admits nobody and waits for those who were admitted
            engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
            engine.run_dry()
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        elif kind == "throttle":
            for _ in range(value):
                engine.step(throttle=True)
    engine.drain()
    COUNTS["requests"] += len(engine.jobs)
    COUNTS["members"] += sum(len(p.job.members) for p in engine.jobs.values())
    COUNTS["steps"] += len(engine.steps)
    COUNTS["joint"] += engine.worker.num_joint_steps
    COUNTS["preemptions"] += engine.scheduler.num_group_preemptions
    COUNTS["idle"] = max(COUNTS["idle"], engine.most_idle)


INCIDENTS = ["compile", "abort", "abort_meanwhile", "reset", "pause", "quiesce", "throttle", "add", "add"]


def crowd(rng: random.Random) -> tuple[Options, list[tuple[str, Any]]]:
    """Long answers, many short prompts, few blocks: groups outgrow the pool and wait for rows."""
    rows = rng.randint(6, 24)
    window = rng.choice([None, None, None, 6])
    options = Options(
        asynchronous=rng.random() < 0.5,
        by_priority=rng.random() < 0.5,
        prefix_caching=rng.random() < 0.6,
        num_blocks=(17 if window is None else 36) + rng.randint(0, 25),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + rng.choice([0, 1, 5, 40, 200]),
        watermark=rng.choice([0.0, 0.0, 0.1]),
        sliding_window=window,
        v2_runner=rng.random() < 0.5,
        max_adapters=rng.choice([None, None, 1, 2]),
    )

    def job() -> Job:
        longest = rng.choice([1, 3, 10, 30, 90])
        shapes = [(rng.randrange(3), rng.randint(1, longest), rng.random() < 0.2) for _ in range(8)]
        return Job(
            tuple(_prompt(*shape) for shape in shapes[: rng.choice([1, 2, 2, 3, 3, 4, 6, 8])]),
            max_tokens=rng.choice([1, 2, 5, 20, 60]),
            stops=rng.random() < 0.3,
            priority=rng.randrange(3),
            formula=rng.random() < 0.7,
            adapter=rng.randrange(3),
            grammar=rng.random() < 0.1,
        )

    traffic: list[tuple[str, Any]] = []
    for _ in range(rng.randint(5, 15)):
        traffic += [("add", job()) for _ in range(rng.randint(1, 6))]
        for _ in range(rng.randint(1, 4)):
            traffic.append(("steps", rng.randint(1, 8)))
            kind = rng.choice(
                ["compile", "abort", "abort_meanwhile", "reset", "pause", "quiesce", "throttle", "add", "add"]
            )
            traffic.append((kind, job() if kind == "add" else rng.randint(1, 2)))
    return options, traffic


@seed(SEED)
@common
@given(options=engines(), traffic=traffic)
def test_random_traffic(tiny_model: Any, options: Options, traffic: list[tuple[str, Any]]) -> None:
    drive(FakeEngine(tiny_model, options), traffic)


@seed(SEED)
@common
@given(number=st.integers(0, 2**32))
def test_crowds(tiny_model: Any, number: int) -> None:
    options, traffic = crowd(random.Random(number))
    drive(FakeEngine(tiny_model, options), traffic)


def test_the_traffic_was_heavy() -> None:
    """After the two above, in one process; run one of them alone with a seed of its own."""
    print(f"MARITH_SEED={SEED}", COUNTS)
    if COUNTS["requests"]:
        assert COUNTS["requests"] > 10 * EXAMPLES
        assert COUNTS["joint"] > COUNTS["requests"]
        assert COUNTS["preemptions"] > EXAMPLES / 10


def prompt(length: int, first: int = 50) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def group(*lengths: int, **kwargs: Any) -> Job:
    return Job(tuple(prompt(n, 50 + i) for i, n in enumerate(lengths)), **kwargs)


def plain(length: int, **kwargs: Any) -> Job:
    return Job((prompt(length),), formula=False, **kwargs)


# ---------------------------------------------------------------------- one rule at a time


def test_plain_requests_are_scheduled_as_by_vllm(tiny_model: Any) -> None:
    """Before a group comes and after it has gone, every step is vLLM's own."""
    rng = random.Random(SEED)
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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_torn_group_fails_alone(tiny_model: Any, asynchronous: bool, monkeypatch: Any) -> None:
    """The rules are switched off, so vLLM tears groups; no client sees a token that is not the formula's."""
    monkeypatch.setattr(GroupMixin, "_make_room", lambda self: False)
    engine = FakeEngine(tiny_model, Options(asynchronous, num_blocks=24), strict=False)
    for i in range(6):
        engine.add(group(10, 9, 8, max_tokens=40))
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


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_groups_may_fill_the_pool(tiny_model: Any, num_groups: int, asynchronous: bool) -> None:
    """Two members of 7 blocks each, to the last slot: nothing is preempted, nothing is cut off."""
    engine = FakeEngine(tiny_model, Options(asynchronous, num_blocks=1 + 14 * num_groups))
    for _ in range(num_groups):
        engine.add(group(8, 8, max_tokens=49))
    engine.drain()
    assert {len(progress.tokens) for progress in engine.jobs.values()} == {49}
    assert engine.scheduler.num_group_preemptions == 0


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
        preemptions.append(engine.scheduler.num_group_preemptions)
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
    """Released beside another adapter that is admitted first, they do not enter until it is gone."""
    for length in range(40, 45):
        options = Options(max_num_seqs=4, max_num_batched_tokens=4, max_adapters=1)
        engine = FakeEngine(tiny_model, options)
        engine.add(plain(2, max_tokens=6, adapter=1))
        engine.add(group(1, 1, adapter=2))
        engine.step()
        engine.add(plain(length))
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


def test_members_of_one_token_and_resumed_sessions(tiny_model: Any) -> None:
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
    more = prompt(30, 400)
    for name in sessions:
        history = (*first.prompts[0], *engine.jobs[name].tokens[:-1], *more)
        engine.jobs[name] = Progress(Job((history,), 4, formula=False), 0, 4)
        update = engine.request(name, Job((more,), 4, formula=False), 0.0, resumable=True)
        engine.scheduler.add_request(update)
    while engine.alive:
        engine.step()
    engine.abort(sessions)
    engine.drain()

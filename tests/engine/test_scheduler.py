"""The scheduler without a model: all that it promises at every step, whatever the traffic.

`tests.support.fake_engine` checks at each step:

- a member is computed through its last token together with all its group, and all of them have the
  same number of output tokens after every update;
- what a row attends to is what its tokens say (block tables, prefix-cache hits, recomputation, drafts that
  were not kept);
- members have the same drafts and check the same ones, and there is room for what drafting terms compute;
- clients see their own requests only, each with exactly its tokens;
- each request waits or runs in exactly one place;
- rows and token budget are respected, and vLLM's own loop never preempts while groups live;
- first come, first served: nobody overtakes a group that was never let in;
- something always happens, and in the end everything is given back.
"""

from __future__ import annotations

import os
import random
from functools import partial
from typing import Any

from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st

from tests.support.fake_engine import FakeEngine, Job
from tests.support.fake_scheduler import Options

# A failure prints its seed; MARITH_SEED repeats it, MARITH_PROFILE says how much is tried.
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
    adapters=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple),
    grammar=st.sampled_from([False] * 7 + [True]),
    drafts=st.sampled_from([0, 1, 3, 4]),
)


@st.composite
def engines(draw: Any) -> Options:
    rows = draw(st.integers(3, 24))
    window = draw(st.sampled_from([None, None, None, 6]))
    # vLLM sees to it that a request of the model's length fits.
    smallest = 17 if window is None else 36
    drafts = draw(st.sampled_from([0, 0, 2, 4]))
    return Options(
        asynchronous=not drafts and draw(st.booleans()),
        by_priority=draw(st.booleans()),
        prefix_caching=draw(st.sampled_from([True, True, False])),
        num_blocks=draw(st.sampled_from([smallest, smallest + 9, smallest + 20, smallest + 40, 400])),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + draw(st.sampled_from([0, 1, 5, 40, 200])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1])),
        sliding_window=window,
        v2_runner=draw(st.booleans()),
        max_adapters=draw(st.sampled_from([None, None, 1, 2])),
        drafts=drafts,
        drafts_for_all=drafts > 0 and draw(st.sampled_from([False, False, True])),
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
COUNTS = dict.fromkeys(["requests", "members", "steps", "joint", "preemptions", "idle", "drafted", "kept"], 0)


def drive(engine: FakeEngine, traffic: list[tuple[str, Any]]) -> None:
    """Plays traffic, then lets the engine run dry."""
    from vllm.v1.core.sched.interface import PauseState

    note(f"MARITH_SEED={SEED}")

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
    COUNTS["preemptions"] += engine.scheduler.figures.preempted
    COUNTS["drafted"] += engine.worker.num_drafted
    COUNTS["kept"] += engine.worker.num_kept
    COUNTS["idle"] = max(COUNTS["idle"], engine.most_idle)


INCIDENTS = ["compile", "abort", "abort_meanwhile", "reset", "pause", "quiesce", "throttle", "add", "add"]


def crowd(rng: random.Random) -> tuple[Options, list[tuple[str, Any]]]:
    """Long answers, many short prompts, few blocks: groups outgrow the pool and wait for rows."""
    rows = rng.randint(6, 24)
    window = rng.choice([None, None, None, 6])
    drafts = rng.choice([0, 0, 2, 4])
    options = Options(
        asynchronous=not drafts and rng.random() < 0.5,
        by_priority=rng.random() < 0.5,
        prefix_caching=rng.random() < 0.6,
        num_blocks=(17 if window is None else 36) + rng.randint(0, 25),
        max_num_seqs=rows,
        max_num_batched_tokens=rows + rng.choice([0, 1, 5, 40, 200]),
        watermark=rng.choice([0.0, 0.0, 0.1]),
        sliding_window=window,
        v2_runner=rng.random() < 0.5,
        max_adapters=rng.choice([None, None, 1, 2]),
        drafts=drafts,
        drafts_for_all=drafts > 0 and rng.random() < 0.3,
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
            adapters=tuple(rng.randrange(3) for _ in range(rng.choice([1, 1, 2, 3]))),
            grammar=rng.random() < 0.1,
            drafts=rng.choice([0, 1, 3, 4]),
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
    """Of the two tests above, where they ran before it."""
    print(f"MARITH_SEED={SEED}", COUNTS)
    if COUNTS["requests"]:
        assert COUNTS["requests"] > 10 * EXAMPLES
        assert COUNTS["joint"] > COUNTS["requests"]
        assert COUNTS["preemptions"] > EXAMPLES / 10
        assert COUNTS["drafted"] > COUNTS["kept"] > COUNTS["requests"]

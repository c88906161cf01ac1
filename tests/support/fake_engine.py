"""A scheduler without a model: vLLM's real scheduler classes, a worker that computes hashes.

The worker keeps "keys and values" in the blocks that the scheduler hands out: at each position a
hash of all tokens up to it.  Before a row is computed, everything it would attend to is compared,
so a wrong block table, a wrong prefix-cache hit or a token computed twice fails at once.  The
sampled token is a hash of what all members have seen, so the right answer of each request is known
without any scheduling (`expected`).
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from vllm_marith.engine.group import KEY, GroupSpec, MemberTag

VOCAB = 16
STOP = 3
"""The token that ends a job which may stop early."""
MAX_MODEL_LEN = 128
BLOCK_SIZE = 8
MAX_IDLE_STEPS = 8

Chain = list[int]
"""``chain[i]`` is a hash of the tokens 0 to i."""


def extend(chain: Chain, tokens: Iterable[int]) -> Chain:
    last = chain[-1] if chain else 0
    for token in tokens:
        last = hash((last, token))
        chain.append(last)
    return chain


def choose(states: Sequence[int]) -> int:
    """The token after members whose last positions hold `states`."""
    return hash(tuple(states)) % VOCAB


@dataclass(frozen=True)
class Job:
    """What a client asks for.

    prompts: one per member, the leader's first.
    formula: False makes a plain request, with the first prompt only.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 8
    stops: bool = False
    priority: int = 0
    formula: bool = True
    adapter: int = 0

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        return self.prompts if self.formula else self.prompts[:1]


def expected(job: Job, max_tokens: int) -> list[int]:
    """The tokens of a job, computed by themselves."""
    chains = [extend([], prompt) for prompt in job.members]
    tokens: list[int] = []
    while len(tokens) < max_tokens and not (job.stops and tokens and tokens[-1] == STOP):
        tokens.append(choose([chain[-1] for chain in chains]))
        for chain in chains:
            extend(chain, tokens[-1:])
    return tokens


@dataclass(frozen=True)
class Options:
    """One engine."""

    asynchronous: bool = False
    by_priority: bool = False
    prefix_caching: bool = True
    num_blocks: int = 200
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    watermark: float = 0.0
    sliding_window: int | None = None
    v2_runner: bool = False
    max_adapters: int | None = None


@cache
def _base_config(model: str) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model, dtype="float32", max_model_len=MAX_MODEL_LEN, enforce_eager=True, block_size=32
    ).create_engine_config()


@cache
def _structured_output_manager(model: str) -> Any:
    from vllm.v1.structured_output import StructuredOutputManager

    return StructuredOutputManager(_base_config(model))


def make_scheduler(model: Any, options: Options, log_stats: bool = False) -> Any:
    """A scheduler as the engine core would build it, but for a KV cache of `options.num_blocks`."""
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from vllm_marith.engine.core.scheduler import AsyncGroupScheduler, GroupScheduler

    config = copy.copy(_base_config(str(model)))
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.policy = "priority" if options.by_priority else "fcfs"
    config.scheduler_config.max_num_seqs = options.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = options.max_num_batched_tokens
    config.scheduler_config.watermark = options.watermark
    config.scheduler_config.async_scheduling = options.asynchronous
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = BLOCK_SIZE
    config.cache_config.num_gpu_blocks = options.num_blocks
    config.cache_config.enable_prefix_caching = options.prefix_caching

    shape = dict(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if options.sliding_window:
        spec = SlidingWindowSpec(**shape, sliding_window=options.sliding_window)
        groups.append(KVCacheGroupSpec(["sliding"], spec))

    chosen = AsyncGroupScheduler if options.asynchronous else GroupScheduler

    class Watched(chosen):
        """Fails when vLLM's loop preempts by itself, and remembers which groups were ever released."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.released_once: set[str] = set()

        def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            native = sys._getframe(1).f_code is Scheduler.schedule.__code__
            assert not (native and self.groups), f"vLLM preempted {request.request_id}"
            super()._preempt_request(request, *args, **kwargs)

        def _release_group(self, group: Any) -> None:
            self.released_once.add(group.name)
            super()._release_group(group)

    scheduler = Watched(
        config,
        KVCacheConfig(options.num_blocks, [], groups),
        _structured_output_manager(str(model)),
        block_size=BLOCK_SIZE,
        log_stats=log_stats,
    )
    scheduler.use_v2_model_runner = options.v2_runner
    if options.max_adapters is not None:
        scheduler.lora_config = SimpleNamespace(max_loras=options.max_adapters)
    return scheduler


@dataclass
class Row:
    """A request as the worker knows it."""

    tokens: list[int]
    blocks: list[list[int]]
    computed: int
    tag: MemberTag | None
    chain: Chain = field(default_factory=list)


class FakeWorker:
    """Executes steps in the order in which they were scheduled.

    windows: per KV-cache group, how many positions a row attends to; None for all.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.windows = windows
        self.rows: dict[str, Row] = {}
        self.cache: dict[int, list[int]] = {}
        self.num_joint_steps = 0

    def execute(self, step: Any) -> Any:
        """vLLM's `SchedulerOutput` -> `ModelRunnerOutput`."""
        from vllm.v1.outputs import ModelRunnerOutput

        for request_id in step.finished_req_ids:
            self.rows.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            args = new.sampling_params.extra_args or {}
            tag = MemberTag.from_wire(args[KEY]) if KEY in args else None
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            blocks = [list(ids) for ids in new.block_ids]
            self.rows[new.req_id] = Row(tokens, blocks, new.num_computed_tokens, tag)
        self._update_cached(step.scheduled_cached_reqs)

        complete = []
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            row = self.rows[request_id]
            self._compute(row, num_tokens)
            if row.computed == len(row.tokens):
                complete.append(request_id)
        sampled = self._sample(complete)
        ids = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[sampled.get(request_id, []) for request_id in ids],
        )

    def _update_cached(self, cached: Any) -> None:
        for request_id, new_blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            row = self.rows[request_id]
            known = cached.all_token_ids.get(request_id)
            if request_id in cached.resumed_req_ids:
                row.tokens, row.computed, row.chain = list(known), num_computed, []
                row.blocks = [list(ids) for ids in new_blocks]
                continue
            assert num_computed == row.computed, f"{request_id}: computed {row.computed}, not {num_computed}"
            # Tokens in flight are known to the worker only.
            assert known is None or row.tokens[: len(known)] == known
            for mine, ids in zip(row.blocks, new_blocks or (), strict=False):
                mine.extend(ids)

    def _compute(self, row: Row, num_tokens: int) -> None:
        start, end = row.computed, row.computed + num_tokens
        assert end <= len(row.tokens), "a position without a token"
        extend(row.chain, row.tokens[len(row.chain) : end])
        for blocks, window in zip(row.blocks, self.windows, strict=True):
            for position in range(start, end):
                block = blocks[position // BLOCK_SIZE]
                assert block != 0, "written to the null block"
                slots = self.cache.setdefault(block, [0] * BLOCK_SIZE)
                slots[position % BLOCK_SIZE] = row.chain[position]
            position = 0 if window is None else max(0, start - window + 1)
            while position < end:
                offset = position % BLOCK_SIZE
                stop = min(end, position + BLOCK_SIZE - offset)
                found = self.cache[blocks[position // BLOCK_SIZE]][offset : offset + stop - position]
                assert found == row.chain[position:stop], f"attends to wrong keys at {position}"
                position = stop
        row.computed = end

    def _sample(self, complete: list[str]) -> dict[str, list[int]]:
        groups: dict[str, list[str]] = {}
        for request_id in complete:
            tag = self.rows[request_id].tag
            groups.setdefault(tag.group if tag else request_id, []).append(request_id)
        sampled = {}
        for name, ids in groups.items():
            rows = sorted((self.rows[i] for i in ids), key=lambda row: row.tag.index if row.tag else 0)
            size = rows[0].tag.size if rows[0].tag else 1
            assert len(rows) == size, f"{len(rows)} of {size} members of {name} sampled together"
            self.num_joint_steps += size > 1
            token = choose([row.chain[-1] for row in rows])
            for request_id, row in zip(ids, rows, strict=True):
                row.tokens.append(token)
                sampled[request_id] = [token]
        return sampled


@dataclass
class Progress:
    """A job in the engine."""

    job: Job
    arrival: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    refused: bool = False
    ended: str | None = None  # vLLM's finish reason, or "aborted"


class FakeEngine:
    """The engine core's step, its two in-flight batches included; checks every invariant on the way."""

    def __init__(self, model: Any, options: Options, **kwargs: Any) -> None:
        self.options = options
        self.scheduler = make_scheduler(model, options, **kwargs)
        self.worker = FakeWorker([None, options.sliding_window] if options.sliding_window else [None])
        self.depth = 2 if options.asynchronous else 1
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.jobs: dict[str, Progress] = {}
        self.num_steps = self.num_idle = self.most_idle = 0
        self._hasher = self._block_hasher()

    def _block_hasher(self) -> Any:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        function = get_hash_fn_by_name("sha256")
        init_none_hash(function)
        return get_request_block_hasher(BLOCK_SIZE, function) if self.options.prefix_caching else None

    # ------------------------------------------------------------------ client

    def add(self, job: Job, *, arrival_time: float | None = None, **params: Any) -> str:
        """Sends a request; returns its id."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        arrival = len(self.jobs)
        name = f"r{arrival}"
        members = job.members
        spec = GroupSpec([list(p) for p in members[1:]], [("term", 0, 1.0)], False)
        room = MAX_MODEL_LEN - max(map(len, members))
        self.jobs[name] = Progress(job, arrival, min(job.max_tokens, room))
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=list(members[0]),
                sampling_params=SamplingParams(
                    max_tokens=job.max_tokens,
                    stop_token_ids=[STOP] if job.stops else None,
                    extra_args={KEY: spec.to_wire()} if job.formula else None,
                    **params,
                ),
                pooling_params=None,
                priority=job.priority,
                lora_request=self._adapter(job.adapter),
                arrival_time=float(arrival) if arrival_time is None else arrival_time,
                block_hasher=self._hasher,
            )
        )
        request = self.scheduler.requests.get(name)
        if request is None:
            self.jobs[name].refused = True
            assert not self._could_fit(members), f"{name} was refused"
        else:
            # What the KV cache has no room for is cut off, as by the model's length.
            self.jobs[name].max_tokens = min(self.jobs[name].max_tokens, request.max_tokens)
        return name

    def _adapter(self, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        used = number and self.options.max_adapters is not None
        return LoRARequest(f"adapter{number}", number, "nowhere") if used else None

    def _could_fit(self, members: Sequence[Sequence[int]]) -> bool:
        """Whether the engine could hold these prompts, with a token to come, by themselves."""
        manager = self.scheduler.kv_cache_manager
        blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in members) * len(self.worker.windows)
        usable = manager.block_pool.num_gpu_blocks - 1 - manager.watermark_blocks * (len(members) > 1)
        return len(members) <= self.options.max_num_seqs and blocks <= usable

    def abort(self, names: Iterable[str]) -> None:
        """What the engine core does when a client has gone; it may be told twice."""
        from vllm.v1.request import RequestStatus

        names = list(names)
        for name in names:
            if self.jobs[name].ended is None:
                self.jobs[name].ended = "aborted"
        self.scheduler.finish_requests([*names, *names], RequestStatus.FINISHED_ABORTED)

    @property
    def alive(self) -> list[str]:
        return [name for name, progress in self.jobs.items() if progress.ended is None]

    # -------------------------------------------------------------------- step

    def step(self, throttle: bool = False, meanwhile: Any = None) -> bool:
        """One turn of the engine core's loop; False when it would have waited for a client.

        meanwhile: called while the oldest batch runs, as aborts are.
        """
        scheduler = self.scheduler
        if scheduler.has_requests():
            output = scheduler.schedule(throttle)
            self._check_scheduled(output, throttle)
            self.in_flight.append((output, self.worker.execute(output)))
            executed = output.total_num_scheduled_tokens > 0
            if len(self.in_flight) < self.depth and (executed or scheduler.has_requests()):
                return True
        elif not self.in_flight:
            return False
        if meanwhile is not None:
            meanwhile()
        for client in scheduler.update_from_output(*self.in_flight.popleft()).values():
            for found in client.outputs:
                self._receive(found)
        self._check_updated()
        return True

    def drain(self) -> None:
        """Steps until nothing is left, and checks that everything was given back."""
        self.run_dry()
        assert not self.alive, f"the engine sleeps while {self.alive} wait"
        self.check_returned()

    def run_dry(self) -> None:
        """Steps until the engine would wait for a client."""
        wanted = [self.jobs[name] for name in self.alive]
        budget = self.options.max_num_batched_tokens
        steps = 50 + 4 * sum(p.max_tokens + 4 + sum(map(len, p.job.members)) // budget for p in wanted)
        while self.step():
            steps -= 1
            assert steps > 0, f"no end in sight: {self.alive}"

    def _receive(self, output: Any) -> None:
        progress = self.jobs.get(output.request_id)
        assert progress is not None, f"a client saw {output.request_id}"
        assert progress.ended is None or progress.refused, f"{output.request_id} was heard of after its end"
        progress.tokens += output.new_token_ids
        right = expected(progress.job, progress.max_tokens)
        assert progress.tokens == right[: len(progress.tokens)], output.request_id
        if output.finish_reason is not None:
            progress.ended = str(output.finish_reason)
            assert (progress.ended == "error") == progress.refused, f"{output.request_id} failed"
            assert progress.refused or progress.tokens == right

    # -------------------------------------------------------------- invariants

    def _check_scheduled(self, output: Any, throttle: bool) -> None:
        scheduler, options = self.scheduler, self.options
        scheduled = output.num_scheduled_tokens
        self.num_steps += 1
        assert output.total_num_scheduled_tokens == sum(scheduled.values())
        assert output.total_num_scheduled_tokens <= options.max_num_batched_tokens
        assert len(scheduler.running) <= options.max_num_seqs
        assert not scheduler._prefill_allowance
        assert not scheduler._torn

        if not options.by_priority:
            self._check_order([new.req_id for new in output.scheduled_new_reqs])
        flying = any(batch.total_num_scheduled_tokens for batch, _ in self.in_flight)
        waits = self.alive and not scheduler.pause_state and not throttle
        self.num_idle = self.num_idle + 1 if waits and not scheduled and not flying else 0
        self.most_idle = max(self.most_idle, self.num_idle)
        assert self.num_idle <= MAX_IDLE_STEPS, f"{self.alive} wait and nothing happens"

    def _check_order(self, new_ids: list[str]) -> None:
        """First come, first served: nobody is admitted before an older group that was never let in."""
        youngest = max((self.jobs[name].arrival for name in new_ids if name in self.jobs), default=-1)
        for name in self.scheduler.groups:
            overtaken = self.jobs[name].arrival < youngest and name not in self.scheduler.released_once
            assert not overtaken, f"r{youngest} overtook {name}"

    def _check_updated(self) -> None:
        scheduler = self.scheduler
        for group in scheduler.groups.values():
            assert len({m.num_output_tokens for m in group.members}) == 1, f"a member of {group.name} is ahead"
        assert sum(scheduler.get_request_counts()) == len(scheduler.requests)
        for name in self.alive:
            assert name in scheduler.requests, f"{name} is lost"

    def check_returned(self) -> None:
        """Nothing is left behind: requests, groups, rows, blocks."""
        scheduler = self.scheduler
        assert scheduler.get_request_counts() == (0, 0)
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert len(scheduler.backlog) == scheduler.backlog.num_requests == 0
        assert not scheduler.backlog._order
        for name in (
            "requests running waiting kv_holding_waiting deferred_waiting _inflight_prefills "
            "groups _group_of _released _gathering _followers _compiling _torn _ended _expired _errors"
        ).split():
            assert not getattr(scheduler, name), name

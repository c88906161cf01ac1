"""An engine core without a model: vLLM's real scheduler classes over a `FakeWorker`.

What each request must receive is known without any scheduling (`expected`), and everything that a
scheduler of groups promises is checked at every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any

from vllm_marith import Formula
from vllm_marith.engine.group import KEY, GroupSpec
from vllm_marith.plan import encode, lower

from .fake_scheduler import MAX_MODEL_LEN, Options, make_scheduler
from .fake_worker import BLOCK_SIZE, FakeWorker, choose, extend

STOP = 3
"""The token that ends a job which may stop early."""
MAX_IDLE_STEPS = 8


@dataclass(frozen=True)
class Job:
    """What a client asks for.

    prompts: one per member, the leader's first.
    stops: whether `STOP` ends it.
    formula: False makes a plain request, with the first prompt only.
    adapters: numbers of the members' LoRAs, over and over; 0 is none.
    grammar: whether it waits for `FakeEngine.compile` first; then two drafted tokens are allowed at once.
    drafts: tokens that its formula drafts at a time, where the engine speculates.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int = 8
    stops: bool = False
    priority: int = 0
    formula: bool = True
    adapters: tuple[int, ...] = (0,)
    grammar: bool = False
    drafts: int = 0

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


@dataclass
class Progress:
    """A job in the engine."""

    job: Job
    arrival: int
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    fails: bool = False  # whether it is to end with an error
    ended: str | None = None  # vLLM's finish reason, or "aborted"


class FakeEngine:
    """The engine core's step, its two in-flight batches included; checks every invariant on the way.

    strict: False where a test breaks the scheduler on purpose; clients still see right tokens only.
    """

    def __init__(self, model: Any, options: Options, strict: bool = True, **kwargs: Any) -> None:
        self.options = options
        self.strict = strict
        self.scheduler = make_scheduler(model, options, **kwargs)
        windows = [None, options.sliding_window] if options.sliding_window else [None]
        self.worker = FakeWorker(windows, strict, options.drafts if options.drafts_for_all else 0)
        self.depth = 2 if options.asynchronous else 1
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.steps: list[Any] = []  # all that was scheduled
        self.jobs: dict[str, Progress] = {}
        self.grammars: dict[str, Future[Any]] = {}  # not compiled yet
        self.num_idle = self.most_idle = 0
        self._hasher = self._block_hasher()

    def _block_hasher(self) -> Any:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        function = get_hash_fn_by_name("sha256")
        init_none_hash(function)
        return get_request_block_hasher(BLOCK_SIZE, function) if self.options.prefix_caching else None

    # ------------------------------------------------------------------ client

    def add(self, job: Job, *, arrival_time: float | None = None) -> str:
        """Sends a request; returns its id."""
        arrival = len(self.jobs)
        name = f"r{arrival}"
        request = self.request(name, job, float(arrival) if arrival_time is None else arrival_time)
        if job.grammar:
            self.grammars[name] = request.structured_output_request.grammar = Future()
        room = MAX_MODEL_LEN - max(map(len, job.members))
        self.jobs[name] = Progress(job, arrival, min(job.max_tokens, room))
        self.scheduler.add_request(request)
        if name not in self.scheduler.requests:
            self.jobs[name].fails = True
            self.grammars.pop(name, None)
            assert not self._could_fit(job.members), f"{name} was refused"
        # What the KV cache has no room for is cut off, as by the model's length.
        self.jobs[name].max_tokens = min(self.jobs[name].max_tokens, request.max_tokens)
        return name

    def request(self, name: str, job: Job, arrival_time: float, **kwargs: Any) -> Any:
        """The engine core's request for a job, as admission would have made it."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams
        from vllm.v1.request import Request

        from vllm_marith.engine.frontend.adapters import to_wire

        leader, *followers = map(list, job.members)
        adapter, *adapters = self._adapters(job)
        spec = GroupSpec(followers, "no worker reads it", adapters=list(map(to_wire, adapters)))
        if job.drafts and self.options.drafts and not self.options.drafts_for_all:
            spec = replace(
                spec,
                drafts=[encode(lower(Formula.parse("a")), [0])],
                draft_lengths=[job.drafts],
                drafter="formula",
            )
        return Request(
            request_id=name,
            prompt_token_ids=leader,
            sampling_params=SamplingParams(
                max_tokens=job.max_tokens,
                stop_token_ids=[STOP] if job.stops else None,
                structured_outputs=StructuredOutputsParams(regex=".*") if job.grammar else None,
                extra_args={KEY: spec.to_wire()} if job.formula else None,
            ),
            pooling_params=None,
            priority=job.priority,
            arrival_time=arrival_time,
            lora_request=adapter,
            block_hasher=self._hasher,
            **kwargs,
        )

    def compile(self, name: str, error: bool = False) -> None:
        """Ends the compilation of a job's grammar."""
        grammar = self.grammars.pop(name)
        if error:
            self.jobs[name].fails = True
            grammar.set_exception(ValueError("no such grammar"))
        else:
            grammar.set_result(
                SimpleNamespace(
                    accept_tokens=lambda request_id, tokens: True, validate_tokens=lambda tokens: tokens[:2]
                )
            )

    def _adapters(self, job: Job) -> list[Any]:
        """The members' adapters, no more of them than admission would let in."""
        from vllm.lora.request import LoRARequest

        numbers = [number for number, _ in zip(cycle(job.adapters), job.members, strict=False)]
        allowed = sorted({n for n in numbers if n})[: self.options.max_adapters or 0]
        return [LoRARequest(f"adapter{n}", n, "nowhere") if n in allowed else None for n in numbers]

    def _could_fit(self, members: Sequence[Sequence[int]]) -> bool:
        """Whether the engine could hold these prompts, with a token to come, by themselves."""
        manager = self.scheduler.kv_cache_manager
        # A first token, its drafts, and what drafting terms compute on their way to them need room as well.
        number = self.scheduler.num_spec_tokens
        drafts = 1 + number + self.scheduler.num_lookahead_tokens if number else 0
        lengths = [len(prompt) + drafts for prompt in members]
        blocks = sum(-(-length // BLOCK_SIZE) for length in lengths) * len(self.worker.windows)
        usable = manager.block_pool.num_gpu_blocks - 1 - manager.watermark_blocks * (len(members) > 1)
        rows = min(self.options.max_num_seqs, self.scheduler.max_num_scheduled_tokens)
        return len(members) <= rows and blocks <= usable

    def abort(self, names: Iterable[str]) -> None:
        """What the engine core does when a client has gone; it may be told twice."""
        from vllm.v1.request import RequestStatus

        names = list(names)
        for name in names:
            if self.jobs[name].ended is None:
                self.jobs[name].ended = "aborted"
            self.grammars.pop(name, None)
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
            assert set(client.finished_requests or ()) <= self.jobs.keys()
            for found in client.outputs:
                self._receive(found)
        if self.options.drafts:
            scheduler.update_draft_token_ids(self.worker.take_drafts())
        self._check_updated()
        return True

    def drain(self) -> None:
        """Steps until nothing is left, and checks that everything was given back."""
        for name in list(self.grammars):
            self.compile(name)
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
        assert progress.ended is None or progress.fails, f"{output.request_id} was heard of after its end"
        progress.tokens += output.new_token_ids
        right = expected(progress.job, progress.max_tokens)
        assert progress.tokens == right[: len(progress.tokens)], output.request_id
        if output.finish_reason is not None:
            progress.ended = str(output.finish_reason)
            failed = progress.ended == "error"
            assert failed == progress.fails or not self.strict, f"{output.request_id} failed"
            assert failed or progress.tokens == right

    # -------------------------------------------------------------- invariants

    def _check_scheduled(self, output: Any, throttle: bool) -> None:
        scheduler, options = self.scheduler, self.options
        scheduled = output.num_scheduled_tokens
        self.steps.append(output)
        assert output.total_num_scheduled_tokens == sum(scheduled.values())
        assert output.total_num_scheduled_tokens <= options.max_num_batched_tokens
        assert len(scheduler.running) <= options.max_num_seqs
        if options.max_adapters is not None:
            rows = [scheduler.requests[name].lora_request for name in scheduled]
            assert len({row.lora_int_id for row in rows if row}) <= options.max_adapters
        if options.formulas:
            assert not self.strict or not scheduler.groups or not scheduler.preempted_by_vllm
            scheduler.preempted_by_vllm.clear()
            assert scheduler._prefill_allowance is None
            if not options.by_priority:
                self._check_order([new.req_id for new in output.scheduled_new_reqs])
        flying = any(batch.total_num_scheduled_tokens for batch, _ in self.in_flight)
        waits = self.alive and not (scheduler.pause_state or throttle or self.grammars)
        self.num_idle = self.num_idle + 1 if waits and not scheduled and not flying else 0
        self.most_idle = max(self.most_idle, self.num_idle)
        assert self.num_idle <= MAX_IDLE_STEPS, f"{self.alive} wait and nothing happens"

    def _check_order(self, new_ids: list[str]) -> None:
        """First come, first served: nobody is admitted before an older group that was never let in."""
        youngest = max((self.jobs[name].arrival for name in new_ids if name in self.jobs), default=-1)
        for name in self.scheduler.groups.keys() - self.scheduler.released_once:
            progress = self.jobs[name]
            assert progress.job.grammar or progress.arrival > youngest, f"r{youngest} overtook {name}"

    def _check_updated(self) -> None:
        scheduler = self.scheduler
        places = [*scheduler.running, *scheduler.waiting, *scheduler.kv_holding_waiting]
        if self.options.formulas:
            for group in scheduler.groups.values():
                lengths = {m.num_output_tokens for m in group.members}
                assert len(lengths) == 1, f"a member of {group.name} is ahead"
                drafts = {tuple(m.spec_token_ids) for m in group.members}
                assert len(drafts) == 1, f"members of {group.name} have other drafts"
            for group in scheduler._gathering.values():
                places += group.late
            for entry in [*scheduler.backlog._entries.values(), *scheduler._compiling.values()]:
                places += getattr(entry, "members", [entry])
        assert sorted(r.request_id for r in places) == sorted(scheduler.requests), "lost or twice"
        assert scheduler.get_request_counts() == (
            len(scheduler.running),
            len(places) - len(scheduler.running),
        )
        for name in self.alive:
            assert name in scheduler.requests, f"{name} is lost"

    def check_returned(self) -> None:
        """Nothing is left behind: requests, groups, rows, blocks."""
        scheduler = self.scheduler
        assert scheduler.get_request_counts() == (0, 0)
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        tables = "requests running waiting kv_holding_waiting deferred_waiting _inflight_prefills"
        if self.options.formulas:
            tables += " groups _group_of _released _gathering _followers _compiling"
            tables += " _torn _ended _expired _last_outputs _answers"
            assert len(scheduler.backlog) == scheduler.backlog.num_requests == 0
            assert not scheduler.backlog._order
        for table in tables.split():
            assert not getattr(scheduler, table), table

"""Groups in vLLM's scheduler: admitted, stepped, preempted, finished and aborted as one.

vLLM schedules requests; a formula needs that all its members compute their next logits in the same
step and then receive the same token.  Four rules over vLLM's own loop achieve it:

- **hold**: a member computes its prompt up to the last token and waits there for the others;
- **joint step**: once every member has one token left, all are scheduled or none.  Rows that
  decode come first in the running list (the token budget is at least ``max_num_seqs``), and before
  the loop runs whole groups are preempted until the step's blocks fit, so that the loop itself
  never has to preempt;
- **admission** of a group only when rows and blocks for all its members are free, in strict order
  (see `Backlog`);
- **end**: followers end with their leader, whatever ended it, and the client never sees them.

Source: vllm/v1/core/sched/scheduler.py; every method overridden or read here stands in
`vllm_marith.engine.patches`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ..group import KEY, GroupSpec
from .backlog import Backlog
from .blocks import BlockAccount
from .group_state import Group, build_group, remaining

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    _Base = Scheduler
else:
    _Base = object

logger = init_logger(__name__)


class GroupMixin(_Base):
    """Adds groups to a vLLM scheduler class.  Without groups every call is vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups: dict[str, Group] = {}
        self.backlog = Backlog(self.policy)
        self.num_group_preemptions = 0
        self._released: dict[str, Group] = {}  # the groups in vLLM's queues: what a step looks at
        self._group_of: dict[str, Group] = {}
        self._followers: set[str] = set()
        self._blocks = BlockAccount(self)
        self._compiling: dict[str, Group] = {}  # groups whose leader's grammar is not ready yet
        self._torn: dict[str, Group] = {}  # groups of which vLLM preempted a member by itself
        self._ended: dict[str, Group] = {}  # groups a member of which ended in this update
        self._expired: list[str] = []  # followers that ended in this update
        self._errors: list[tuple[int, EngineCoreOutput]] = []
        self._prefill_allowance: int | None = None

    # ------------------------------------------------------------------ intake

    def add_request(self, request: Request) -> None:
        """Fans a formula's request out into its group; n > 1 arrives as several such requests."""
        wire = (request.sampling_params.extra_args or {}).get(KEY) if request.sampling_params else None
        if wire is None or request.request_id in self.requests:
            super().add_request(request)
            return
        if not isinstance(wire, dict):
            super().add_request(request)
            self._fail([request], "its formula never passed admission")
            return

        spec = GroupSpec.from_wire(wire)
        group = build_group(request, spec, self.max_model_len)
        if spec.size == 1:  # nothing to keep together
            super().add_request(request)
            return
        self.groups[group.name] = group
        self._followers.update(m.request_id for m in group.members[1:])
        for member in group.members:
            self._group_of[member.request_id] = group
            super().add_request(member)
        if len(group.members) > self.max_num_active_reqs or not self._blocks.can_ever_hold(group.members):
            self._fail(group.members, "the group can never fit this engine")
        elif self._is_blocked_waiting_status(group.leader.status):
            self._compiling[group.name] = group
        else:
            self.backlog.push(group)

    def _enqueue_waiting_request(self, request: Request) -> None:
        """Keeps unreleased members, and plain requests behind a waiting group, out of the queue."""
        group = self._group_of.get(request.request_id)
        if group is not None:
            if group.released:
                super()._enqueue_waiting_request(request)
        elif self.backlog.precedes(request) and not self._holds_kv_blocks(request):
            self.backlog.push(request)
        else:
            super()._enqueue_waiting_request(request)

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting), members and backlog included."""
        running, waiting = super().get_request_counts()
        compiling = sum(len(group.members) for group in self._compiling.values())
        return running, waiting + self.backlog.num_requests + compiling

    # --------------------------------------------------------------- admission

    def _release(self) -> None:
        """Moves the backlog's head into vLLM's queues for as long as it fits."""
        for group in list(self._compiling.values()):
            if self._handle_blocked_waiting_request(group.leader):
                del self._compiling[group.name]
                self.backlog.push(group)
        while (entry := self.backlog.peek()) is not None:
            if isinstance(entry, Group):
                if not self._fits(entry):
                    return  # strict order: nobody overtakes the oldest waiting group
                self.backlog.pop()
                self._release_group(entry)
            else:
                self.backlog.pop()
                super()._enqueue_waiting_request(entry)

    def _release_group(self, group: Group) -> None:
        group.released = True
        self._released[group.name] = group
        group.late = [m for m in group.members if m.num_tokens == 1]
        for member in group.members:
            if member not in group.late:
                super()._enqueue_waiting_request(member)

    def _fits(self, group: Group) -> bool:
        """Whether rows and blocks for all members are free, after those promised to others."""
        if any(m.num_stale_output_tokens and not m.drop_stale_output for m in group.members):
            return False  # tokens sampled before a preemption are still on their way
        if len(self.running) + len(group.members) > self.max_num_active_reqs:
            return False
        if not self.running and not self.waiting:
            return True
        ahead = list(self.waiting)
        if self.backlog.by_priority:
            ahead = [r for r in ahead if r < group.leader]
        late = [m for g in self._released.values() for m in g.late]
        if len(self.running) + len(ahead) + len(late) + len(group.members) > self.max_num_active_reqs:
            return False
        return self._blocks.can_admit(group.members, promised=[*ahead, *late])

    # -------------------------------------------------------------------- step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step; see the module's four rules."""
        if not self.groups and not len(self.backlog):
            return super().schedule(throttle_prefills)
        self._find_joint(throttle_prefills)
        self._order_running()
        preempted = self._make_room()
        if not preempted and self.pause_state == PauseState.UNPAUSED:
            self._release()
        with self._admission_closed() if preempted else self._as_it_is():
            output = super().schedule(throttle_prefills)
        self._prefill_allowance = None
        self._check_joint(output)
        self._keep_alive(output)
        return output

    def _find_joint(self, throttle_prefills: bool) -> None:
        """Marks the groups that step together from now on and admits their late members."""
        num_late = 0
        for group in self._released.values():
            if group.joint or not group.is_ready():
                continue
            if group.late:
                if throttle_prefills or not self._late_fit(group):
                    continue
                for member in group.late:
                    # This queue is drained first, whatever else waits.
                    self.kv_holding_waiting.add_request(member)
                num_late += len(group.late)
                group.late = []
            group.joint = True
        if num_late:
            decoding = sum(self._decodes(r) for r in self.running)
            self._prefill_allowance = self.max_num_scheduled_tokens - decoding - num_late

    def _late_fit(self, group: Group) -> bool:
        rows = len(self.running) + len(self.kv_holding_waiting) + len(group.late)
        return rows <= self.max_num_active_reqs and self._blocks.can_admit(group.late, promised=())

    def _decodes(self, request: Request) -> bool:
        """Whether a running request takes exactly one token in this step."""
        group = self._group_of.get(request.request_id)
        return group.joint if group is not None else remaining(request) <= 1

    def _order_running(self) -> None:
        decodes = [self._decodes(r) for r in self.running]
        if any(late and not early for early, late in zip(decodes, decodes[1:], strict=False)):
            pairs = list(zip(self.running, decodes, strict=True))
            self.running = [r for r, first in pairs if first] + [r for r, first in pairs if not first]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Holds a member one token short, and leaves room in the budget for late members."""
        n = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        group = self._group_of.get(request.request_id)
        if group is not None and group.joint:
            return n
        if group is not None:
            unheld = request.num_tokens + request.num_output_placeholders - 1 - num_computed_tokens
            n = max(0, min(n, unheld))
        if self._prefill_allowance is not None and not self._decodes(request):
            n = min(n, self._prefill_allowance)
            self._prefill_allowance -= n
        return n

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """A hit of all but one token would leave nothing to hold: gives one block back."""
        hit = super()._get_local_prefix_cache_hit(request)
        blocks, num_cached, *rest = hit
        if request.request_id not in self._group_of or num_cached < request.num_tokens - 1:
            return hit
        num_kept = (num_cached - 1) // self.block_size * self.block_size
        return (self.kv_cache_manager.truncate_computed_blocks(blocks, num_kept), num_kept, *rest)

    def _check_joint(self, output: SchedulerOutput) -> None:
        """A joint group was scheduled whole or not at all; anything else fails that group alone.

        The rules above leave vLLM no reason to tear a group.  Should it do so all the same, then
        no client may see a token that the formula did not choose.
        """
        scheduled = output.num_scheduled_tokens
        for group in list(self._released.values()):
            if group.joint:
                present = sum(m.request_id in scheduled for m in group.members)
                if present not in (0, len(group.members)):
                    self._fail(group.members, f"{present} of {len(group.members)} members were scheduled")
        for group in list(self._torn.values()):
            if group.name in self._released:
                self._preempt_group(group)
        self._torn.clear()

    def _keep_alive(self, output: SchedulerOutput) -> None:
        """Two groups may each hold what the other needs; then the younger starts again."""
        if output.total_num_scheduled_tokens or not self.running:
            return
        if self.pause_state == PauseState.PAUSED_ALL or any(r.num_in_flight_tokens for r in self.running):
            return
        stuck = [g for g in self._released.values() if not g.joint]
        if stuck:
            self._preempt_group(max(stuck, key=lambda g: _age(g.leader)))

    # -------------------------------------------------------------- preemption

    def _make_room(self) -> bool:
        """Preempts the youngest, groups as a whole, until this step's blocks fit."""
        preempted = False
        while self.running and not self._blocks.can_step(self._decodes, self._group_of):
            victim = max(self.running, key=_urgency if self.backlog.by_priority else _age)
            group = self._group_of.get(victim.request_id)
            if group is not None:
                self._preempt_group(group)
            else:
                self.running.remove(victim)
                self._preempt_request(victim, time.monotonic())
            preempted = True
        return preempted

    def _preempt_group(self, group: Group, drop_stale_output: bool = False) -> None:
        self.num_group_preemptions += 1
        del self._released[group.name]
        group.released = False
        now = time.monotonic()
        queued = set()
        for member in reversed(group.members):
            if member.status == RequestStatus.RUNNING:
                self.running.remove(member)
                self._preempt_request(member, now, drop_stale_output=drop_stale_output)
            elif member not in group.late:
                queued.add(member)
        if queued:  # released, but vLLM had not admitted them yet
            self.waiting.remove_requests(queued)
            self.kv_holding_waiting.remove_requests(queued)
            self.deferred_waiting -= queued
        group.joint = False
        group.late = []
        self.backlog.push(group)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output=drop_stale_output)
        group = self._group_of.get(request.request_id)
        if group is not None:
            self.waiting.remove_request(request)  # it waits with its group, in the backlog
            if group.released:
                self._torn[group.name] = group

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As vLLM's; groups in flight start again as a whole."""
        if reset_running_requests:
            for group in list(self._released.values()):
                self._preempt_group(group, drop_stale_output=True)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    @contextmanager
    def _admission_closed(self) -> Iterator[None]:
        # What was preempted a moment ago would be admitted again at once.
        state = self._pause_state
        self._pause_state = max(state, PauseState.PAUSED_NEW)
        try:
            yield
        finally:
            self._pause_state = state

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        yield

    # --------------------------------------------------------------------- end

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, after which followers share their leader's end and are hidden."""
        if not self._followers and not self._errors:
            return super().update_from_output(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for group in list(self._ended.values()):
            if group.leader.is_finished():
                self._finish_followers(group)
            else:
                self._fail(group.members, "a follower ended before its leader")
        self._ended.clear()
        for client in outputs.values():
            client.outputs = [o for o in client.outputs if o.request_id not in self._followers]
        self._followers.difference_update(self._expired)
        self._expired.clear()
        for client_index, error in self._errors:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(error)
        self._errors.clear()
        return outputs

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        group = self._group_of.get(request.request_id)
        if group is not None:
            self._ended[group.name] = group
        self.backlog.forget(request.request_id)
        return super()._free_request(request, delay_free_blocks)

    def _finish_followers(self, group: Group) -> None:
        self._forget(group)
        ids = [m.request_id for m in group.members[1:]]
        super().finish_requests(ids, RequestStatus.FINISHED_STOPPED)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Ends the named requests, each leader with its whole group."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ids = list(self.requests) if request_ids is None else list(request_ids)
        groups = [group for i in ids if (group := self.groups.get(i)) is not None]
        followers = {m.request_id for group in groups for m in group.members[1:]}
        for group in groups:
            self._forget(group)
        finished = super().finish_requests({*ids, *followers}, finished_status)
        return [r for r in finished if r.request_id not in followers]

    def _forget(self, group: Group) -> None:
        del self.groups[group.name]
        self._released.pop(group.name, None)
        self._compiling.pop(group.name, None)
        self._ended.pop(group.name, None)
        self.backlog.forget(group.name)
        # Outputs of this update may still name the followers: their ids are kept until it ends.
        self._expired.extend(m.request_id for m in group.members[1:])
        for member in group.members:
            del self._group_of[member.request_id]

    def _fail(self, members: list[Request], reason: str) -> None:
        """Ends a group with an error that its client receives with the next outputs."""
        leader = members[0]
        logger.error("marith: request %s failed: %s", leader.request_id, reason)
        self.finish_requests(leader.request_id, RequestStatus.FINISHED_ERROR)
        error = EngineCoreOutput(
            request_id=leader.request_id,
            new_token_ids=[],
            finish_reason=leader.get_finished_reason(),
            events=leader.take_events(),
            trace_headers=leader.trace_headers,
        )
        self._errors.append((leader.client_index, error))


def _age(request: Request) -> tuple[float, ...]:
    return (request.arrival_time,)


def _urgency(request: Request) -> tuple[float, ...]:
    return (request.priority, request.arrival_time)


class GroupScheduler(GroupMixin, Scheduler):
    """vLLM's synchronous scheduler, with groups."""


class AsyncGroupScheduler(GroupMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, with groups."""

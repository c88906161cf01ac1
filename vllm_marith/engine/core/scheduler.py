"""Groups in vLLM's scheduler: admitted, stepped, preempted, finished and aborted as one.

vLLM schedules requests; a formula needs that all its members compute their next logits in the same
step and then receive the same token.  Four rules over vLLM's own loop achieve it:

- **hold**: a member computes its prompt up to the last token and waits there for the others;
- **joint step**: once every member has one token left, all are scheduled or none.  Rows that
  decode come first in the running list (the token budget is at least ``max_num_seqs``), and before
  the loop runs whole groups are preempted until the step's blocks fit, so that the loop itself
  never has to preempt;
- **admission** of a group only when rows, blocks and adapters for all its members are free, in strict
  order (see `Backlog`);
- **take-back**: a group with constraints is preempted to draw tokens again (see `ConstrainedLifecycle`);
- **end**: followers end with their leader, whatever ended it, and the client never sees them
  (see `GroupLifecycle`).

Source: vllm/v1/core/sched/scheduler.py; every method overridden or read here stands in
`vllm_marith.engine.patches`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from ..group import Cause
from .constituents import lookup
from .group_state import Group, remaining
from .promises import Promises
from .speculation import SpeculativeLifecycle

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

_POLLED = 64
"""Grammars that a step asks after; the others' turn comes with the next steps."""


class GroupMixin(SpeculativeLifecycle):
    """Adds groups to a vLLM scheduler class.  Without groups every call is vLLM's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A joint step needs a token for every row; only an explicit option makes vLLM's limit smaller.
        self.max_num_active_reqs = min(self.max_num_active_reqs, self.max_num_scheduled_tokens)
        self._num_late = 0  # members of one token that enter with this step
        self._prefill_allowance: int | None = None  # tokens that this step leaves for prefills

    # --------------------------------------------------------------- admission

    def _enqueue_waiting_request(self, request: Request) -> None:
        """Keeps unreleased members out of vLLM's queue, and plain requests that they have to share with.

        Those are the ones behind a waiting group, and the ones with an adapter beside groups with adapters.
        """
        group = self._group_of.get(request.request_id)
        if group is not None:
            if group.released:
                super()._enqueue_waiting_request(request)
            return
        behind = self.backlog.precedes(request) or self._shares_adapters(request)
        if behind and not self._holds_kv_blocks(request):
            self.backlog.push(request)
        else:
            super()._enqueue_waiting_request(request)

    def _release(self) -> None:
        """Moves the backlog's head into vLLM's queues for as long as it fits."""
        for group in list(islice(self._compiling.values(), _POLLED)):
            del self._compiling[group.name]
            if self._handle_blocked_waiting_request(group.leader):
                self.backlog.push(group)
            else:
                self._compiling[group.name] = group
        if self.backlog.peek() is None:
            return
        late = [member for group in self._gathering.values() for member in group.late]
        promises = Promises(self, late)
        while (entry := self.backlog.peek()) is not None:
            if isinstance(entry, Group):
                if not (self._is_ready_again(entry) and promises.leave_room_for(entry)):
                    return  # strict order: nobody overtakes the oldest waiting group
                if not self._adapters_fit(entry.members):
                    return
                self.backlog.pop()
                self._release_group(entry)
                promises.let_in(entry.members, entry.late)
            else:
                if self._shares_adapters(entry) and not self._adapters_fit([entry]):
                    return
                self.backlog.pop()
                super()._enqueue_waiting_request(entry)
                promises.let_in([entry])

    def _release_group(self, group: Group) -> None:
        group.released = True
        self._released[group.name] = self._gathering[group.name] = group
        group.late = [m for m in group.members if m.num_tokens == 1]
        for member in group.members:
            if member not in group.late:
                super()._enqueue_waiting_request(member)

    @staticmethod
    def _is_ready_again(group: Group) -> bool:
        """Whether no token sampled before a preemption is still on its way."""
        return not any(m.num_stale_output_tokens and not m.drop_stale_output for m in group.members)

    def _rows_free(self, late: Sequence[Request]) -> int:
        """Rows that nobody has and no late member was promised."""
        taken = len(self.running) + self._num_late + self.num_waiting_for_streaming_input
        return self.max_num_active_reqs - taken - len(late)

    # -------------------------------------------------------------------- step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """One step; see the module's four rules."""
        idle = not self.groups and not len(self.backlog)
        if idle or self.pause_state == PauseState.PAUSED_ALL:
            with self._unpadded():
                output = super().schedule(throttle_prefills)
            self._tell_drafts(output)
            return output
        self._find_joint(throttle_prefills)
        self._order_running()
        if self._num_late or self.num_spec_tokens:
            decoding = [r for r in self.running if self._decodes(r)]
            self._fit_drafts(decoding)
            if self._num_late:
                taken = sum(1 + len(r.spec_token_ids) for r in decoding)
                self._prefill_allowance = self.max_num_scheduled_tokens - taken - self._num_late
        preempted = self._make_room()
        if not preempted and self.pause_state == PauseState.UNPAUSED:
            self._release()
        with self._limited_admission(closed=preempted), self._unpadded():
            output = super().schedule(throttle_prefills)
        self._prefill_allowance = None
        self._check_joint(output)
        self._keep_alive(output)
        self._tell_bans(output)
        self._tell_drafts(output)
        return output

    def _find_joint(self, throttle_prefills: bool) -> None:
        """Marks the groups that step together from now on and admits their late members."""
        self._num_late = 0
        # A resumed session comes before late members and might take the step's tokens.
        resumed = any(not self._is_blocked_waiting_status(r.status) for r in self.kv_holding_waiting)
        for group in [g for g in self._gathering.values() if g.is_ready()]:
            if group.late and (throttle_prefills or resumed):
                continue
            for member in group.late:
                # This queue is drained first, whatever else waits.
                self.kv_holding_waiting.add_request(member)
            self._num_late += len(group.late)
            group.late = []
            group.joint = True
            del self._gathering[group.name]

    def _decodes(self, request: Request) -> bool:
        """Whether a running request takes its last token in this step, and drafts if it has some."""
        group = self._group_of.get(request.request_id)
        return group.joint if group is not None else remaining(request) <= 1

    def _order_running(self) -> None:
        if not self._inflight_prefills:
            return  # every row decodes
        decodes = [self._decodes(r) for r in self.running]
        if any(late and not early for early, late in pairwise(decodes)):
            pairs = list(zip(self.running, decodes, strict=True))
            self.running = [r for r, first in pairs if first] + [r for r, first in pairs if not first]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Holds a member one token short, and leaves room in the budget for late members."""
        group = self._group_of.get(request.request_id)
        if group is not None and group.joint:
            return num_new_tokens  # its last token: nothing to hold, no chunk to end
        n = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if group is not None:
            unheld = request.num_tokens + request.num_output_placeholders - 1 - num_computed_tokens
            n = max(0, min(n, unheld))
        if self._prefill_allowance is not None and not self._decodes(request):
            n = min(n, self._prefill_allowance)
            self._prefill_allowance -= n
        return n

    def _get_local_prefix_cache_hit(self, request: Request, *limit: int | None) -> Any:
        """A hit of all but one token would leave nothing to hold: asks for a shorter one.

        limit: in vLLM 0.33, how long a hit may be at most.
        """
        manager = self.kv_cache_manager
        with lookup(manager.coordinator, request):
            hit = super()._get_local_prefix_cache_hit(request, *limit)
            group = self._group_of.get(request.request_id)
            if group is None or group.joint or hit[1] < request.num_tokens - 1:
                return hit
            blocks, num_cached, num_uncached = manager.coordinator.find_longest_cache_hit(
                request.block_hashes, request.num_tokens - 2
            )
        boundary = num_cached + num_uncached if num_uncached else 0
        return manager.create_kv_cache_blocks(blocks), num_cached, boundary, False

    @contextmanager
    def _limited_admission(self, closed: bool) -> Iterator[None]:
        """While vLLM admits requests, rows promised to late members are not for them.

        closed: what was preempted a moment ago would be admitted again at once.
        """
        state, rows = self._pause_state, self.max_num_active_reqs
        self.max_num_active_reqs -= sum(len(group.late) for group in self._gathering.values())
        if closed:
            self._pause_state = max(state, PauseState.PAUSED_NEW)
        try:
            yield
        finally:
            self._pause_state, self.max_num_active_reqs = state, rows

    def _check_joint(self, output: SchedulerOutput) -> None:
        """A joint group was scheduled whole or not at all; anything else fails that group alone.

        The rules above leave vLLM no reason to tear a group.  Should it do so all the same, then
        no client may see a token that the formula did not choose.
        """
        tokens = output.num_scheduled_tokens
        fused = 0
        for group in [group for group in self._released.values() if group.joint]:
            present = _whole(tokens, group)
            fused += present
            if present not in (0, len(group.ids)):
                reason = f"{present} of {len(group.ids)} members were scheduled"
                self._fail(group.leader, Cause.TORN, reason)
        if fused:
            self.figures.fused_rows[fused] += 1
        for group in list(self._torn.values()):
            if group.name in self._released:
                self._preempt_group(group)
        self._torn.clear()

    def _keep_alive(self, output: SchedulerOutput) -> None:
        """Two groups may each hold what the other needs; then the last in line starts again."""
        if output.total_num_scheduled_tokens or not self.running:
            return
        if not self._gathering or any(r.num_in_flight_tokens for r in self.running):
            return
        stuck = self._gathering.values()
        if not any(group.is_ready() for group in stuck):
            self._preempt_group(max(stuck, key=lambda group: self._rank(group.leader)))

    # -------------------------------------------------------------- preemption

    def _make_room(self) -> bool:
        """Preempts the last in line, groups as a whole, until this step's blocks fit."""
        preempted = False
        while not self._blocks.can_step(self._decodes, self._group_of, self._num_late):
            late = [r for r in self.kv_holding_waiting if r.request_id in self._group_of]
            rows = [*self.running, *late]
            owners = {self._group_of.get(r.request_id, r) for r in rows}
            if not rows or len(owners) + self.num_waiting_for_streaming_input <= 1:
                break  # by itself a group fits: it was let in on that condition
            # Of the same age, the one that was admitted last.
            victim = max(reversed(rows), key=self._rank)
            group = self._group_of.get(victim.request_id)
            if group is not None:
                self._preempt_group(group)
            else:
                self.running.remove(victim)
                self._preempt_request(victim, time.monotonic())
            preempted = True
        return preempted

    def _rank(self, request: Request) -> tuple[float, ...]:
        """The higher, the sooner a request is preempted."""
        if self.backlog.by_priority:
            return request.priority, request.arrival_time
        return (request.arrival_time,)

    def _shares_adapters(self, request: Request) -> bool:
        """Whether a plain request with an adapter stands beside groups with adapters."""
        return request.lora_request is not None and any(
            member.lora_request for group in self._released.values() for member in group.members
        )

    def _adapters_fit(self, newcomers: Sequence[Request]) -> bool:
        """Whether the newcomers' adapters have room beside those of all who were let in before.

        vLLM counts the adapters of the rows that step.  Members that are held, or that it has not come to
        yet, need theirs in the joint step, so whoever is let in beside a group is counted from then on.
        """
        lora = self.lora_config
        if lora is None or not any(r.lora_request for r in newcomers):
            return True
        late = [m for g in self._gathering.values() for m in g.late]
        rows = chain(newcomers, self.running, self.kv_holding_waiting, late, self.waiting)
        adapters = {r.lora_request.lora_int_id for r in rows if r.lora_request}
        return len(adapters) <= lora.max_loras

    def _preempt_group(self, group: Group, drop_stale_output: bool = False) -> None:
        self.figures.preempted += 1
        del self._released[group.name]
        self._gathering.pop(group.name, None)
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
        if group.joint:
            self._num_late -= len(queued)
        group.joint = False
        group.late = []
        self.backlog.push(group)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output=drop_stale_output)
        group = self._group_of.get(request.request_id)
        if group is not None:
            self.waiting.remove_request(request)  # it waits with its group, in the backlog
            if group.released:
                self._torn[group.name] = group

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As vLLM's; groups in flight start again as a whole."""
        if reset_running_requests:
            for group in list(self._released.values()):
                self._preempt_group(group, drop_stale_output=True)
        return super().reset_prefix_cache(reset_running_requests, reset_connector)


def _whole(tokens: Mapping[str, int], group: Group) -> int:
    """Members of a group that a step computes alike: with its drafts, as many tokens in each of its rows."""
    try:
        counts: Sequence[int] = group.pick(tokens)
    except KeyError:
        counts = [tokens[i] for i in group.ids if i in tokens]
    if not counts:
        return 0
    number = counts.count(counts[0])
    return number if number == len(counts) else max(map(counts.count, counts))


class GroupScheduler(GroupMixin, Scheduler):
    """vLLM's synchronous scheduler, with groups."""


class AsyncGroupScheduler(GroupMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, with groups."""

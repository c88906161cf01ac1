"""A group from its leader's arrival to its leader's end, and what clients see of it.

Followers are ordinary requests of vLLM's.  They arrive with their leader, end with it whatever
ended it, and never appear in an output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ..group import FAILURES, KEY, Cause, GroupSpec
from . import constituents, figures
from .backlog import Backlog
from .blocks import BlockAccount
from .figures import CoreFigures
from .group_state import Group, build_group

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    _Base = Scheduler
else:
    _Base = object

logger = init_logger(__name__)


class GroupLifecycle(_Base):
    """The tables of living groups, their intake and their end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups: dict[str, Group] = {}
        self._group_of: dict[str, Group] = {}  # by any member's request id
        self._followers: set[str] = set()
        constituents.install(self)
        self._blocks = BlockAccount(self)
        # A group is in exactly one of these three.
        self._compiling: dict[str, Group] = {}  # the leader's grammar is not ready yet
        self.backlog = Backlog(self.policy)
        self._released: dict[str, Group] = {}  # in vLLM's queues: what a step looks at
        self._gathering: dict[str, Group] = {}  # released, but not joint yet
        # What one step or one update leaves to its end.
        self._torn: dict[str, Group] = {}  # groups of which vLLM preempted a member by itself
        self._ended: dict[str, Group] = {}  # groups a member of which ended in this update
        self._expired: list[str] = []  # followers that ended in this update
        self._last_outputs: list[tuple[int, EngineCoreOutput]] = []
        self._unsound: list[int] = []  # free blocks that may hold NaN
        self.figures = CoreFigures()
        figures.install()

    # ------------------------------------------------------------------ intake

    def add_request(self, request: Request) -> None:
        """Fans a formula's request out into its group; n > 1 arrives as several such requests."""
        wire = (request.sampling_params.extra_args or {}).get(KEY) if request.sampling_params else None
        if wire is None or request.request_id in self.requests:
            super().add_request(request)
            return
        if not isinstance(wire, dict):
            super().add_request(request)
            self._fail(request, Cause.REFUSED, "its formula never passed admission")
            return

        spec = self._with_drafts_that_pay(GroupSpec.from_wire(wire))
        alone = spec.size == 1 and spec.constraints is None and not spec.drafter  # nothing to keep together
        self.figures.arrive(request.request_id, spec, alone)
        if alone:
            build_group(request, spec, request.max_tokens)
            super().add_request(request)
            return
        lengths = [request.num_prompt_tokens, *map(len, spec.prompts)]
        limit = min(request.max_tokens, self.max_model_len - max(lengths))
        room = self._blocks.room(lengths, spec.members, limit)
        if room < 1 or spec.size > self.max_num_active_reqs:
            super().add_request(request)
            self._fail(request, Cause.REFUSED, "the group can never fit this engine")
            return
        self._add_group(build_group(request, spec, room))

    def _with_drafts_that_pay(self, spec: GroupSpec) -> GroupSpec:
        """The group as it comes, or without drafts."""
        return spec

    def _add_group(self, group: Group) -> None:
        self.groups[group.name] = group
        self._followers.update(group.ids[1:])
        for member in group.members:
            self._group_of[member.request_id] = group
            super().add_request(member)
        if self._is_blocked_waiting_status(group.leader.status):
            self._compiling[group.name] = group
        else:
            self.backlog.push(group)

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting), wherever a request waits."""
        return len(self.running), len(self.requests) - len(self.running)

    def take_figures(self) -> dict[str, Any]:
        """The counts since the last call, and how many groups run and wait now."""
        running = len(self._released)
        return {"running": running, "waiting": len(self.groups) - running, **self.figures.drain()}

    # --------------------------------------------------------------------- end

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's update, after which followers share their leader's end and are hidden.

        Groups that the worker could not compute, or whose members did not get one token, end before it: no
        token of theirs is taken.
        """
        for name, (cause, reason) in getattr(model_runner_output, FAILURES, {}).items():
            if name in self.requests:
                self._fail(self.requests[name], cause, reason)
        if not self.groups and not self._followers and not self._last_outputs:
            return super().update_from_output(scheduler_output, model_runner_output)
        self._check_tied(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for group in list(self._ended.values()):
            if group.leader.is_finished():
                self._finish_followers(group)
            else:
                self._fail(group.leader, Cause.TORN, "a follower ended before its leader")
        self._ended.clear()
        for client in outputs.values():
            client.outputs = [o for o in client.outputs if o.request_id not in self._followers]
        self._followers.difference_update(self._expired)
        self._expired.clear()
        for client_index, last in self._last_outputs:
            outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(last)
        self._last_outputs.clear()
        return outputs

    def _check_tied(self, model_runner_output: ModelRunnerOutput) -> None:
        """Every member of a group got its leader's tokens, or the group fails."""
        sampled, row_of = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        if not sampled:
            return
        # Of the groups in this step; those that wait may be many more.
        for group in [group for name in row_of if (group := self.groups.get(name)) is not None]:
            try:
                tokens = list(map(sampled.__getitem__, group.pick(row_of)))
            except KeyError:
                tokens = [sampled[row_of[i]] if i in row_of else [] for i in group.ids]
            if tokens.count(tokens[0]) != len(tokens):
                self._fail(group.leader, Cause.TORN, "its members did not get the same token")

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        group = self._group_of.get(request.request_id)
        if group is not None:
            self._ended[group.name] = group
        self.backlog.forget(request.request_id)
        self.figures.end(request.request_id, request.num_output_tokens)
        freed = super()._free_request(request, delay_free_blocks)
        if self.finished_req_ids_dict is not None and request.request_id in self._followers:
            self.finished_req_ids_dict[request.client_index].discard(request.request_id)
        return freed

    def _finish_followers(self, group: Group) -> None:
        self._forget(group)
        super().finish_requests(group.ids[1:], RequestStatus.FINISHED_STOPPED)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Ends the named requests, each leader with its whole group."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ids = set(self.requests if request_ids is None else request_ids)
        groups = [group for i in ids if (group := self.groups.get(i)) is not None]
        followers = {i for group in groups for i in group.ids[1:]}
        for group in groups:
            self._forget(group)
        finished = super().finish_requests(ids | followers, finished_status)
        return [r for r in finished if r.request_id not in followers]

    def _forget(self, group: Group) -> None:
        del self.groups[group.name]
        for table in (self._released, self._gathering, self._compiling, self._ended):
            table.pop(group.name, None)
        self.backlog.forget(group.name)
        # Outputs of this update may still name the followers: their ids are kept until it ends.
        self._expired.extend(group.ids[1:])
        for member in group.ids:
            del self._group_of[member]

    def _fail(self, leader: Request, cause: str, reason: str) -> None:
        """Ends a group with an error that its client receives with the next outputs."""
        self.figures.failed[cause] += 1
        logger.error("marith: request %s failed: %s", leader.request_id, reason)
        group = self.groups.get(leader.request_id)
        held = self._blocks.held(group.members if group else [leader]) if cause == Cause.LOGITS else ()
        self._end(leader, RequestStatus.FINISHED_ERROR)
        self._unsound += self._blocks.withdraw(held)

    def _get_new_block_ids_to_zero(self) -> list[int] | None:
        """Also the blocks of groups whose logits were NaN.

        Attention multiplies what it masks by 0, and on CPUs reads whole blocks: NaN that is left in a block
        would spread to whoever gets it next.
        """
        wanted = super()._get_new_block_ids_to_zero()
        unsound, self._unsound = self._unsound, []
        return [*(wanted or ()), *unsound] or None

    def _end(self, leader: Request, status: RequestStatus, stop_reason: str | None = None) -> None:
        """Ends a group for a reason of ours, which its client receives with the next outputs."""
        self.finish_requests(leader.request_id, status)
        last = EngineCoreOutput(
            request_id=leader.request_id,
            new_token_ids=[],
            finish_reason=leader.get_finished_reason(),
            stop_reason=stop_reason,
            events=leader.take_events(),
            trace_headers=leader.trace_headers,
        )
        self._last_outputs.append((leader.client_index, last))

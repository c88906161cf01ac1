"""Rows and blocks that are spoken for while groups are let in, one after the other.

A group is let in when there is room for it beside all who were let in before.  These stand in vLLM's queue
until its loop comes to them, so that nothing of theirs is allocated yet.  What they need is counted once and
then kept up to date: letting in n groups takes time proportional to n.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from vllm.v1.request import Request

from .group_state import Group

if TYPE_CHECKING:
    from .scheduler import GroupMixin


class Promises:
    """What is promised in one step of a scheduler, before its loop runs.

    Args:
        late: members of a single token that wait for their group's joint step.
    """

    def __init__(self, scheduler: GroupMixin, late: Sequence[Request]) -> None:
        self._scheduler = scheduler
        self._rows = scheduler._rows_free(late)
        self._free = scheduler._blocks.free_for_admission()
        # No more of them than there are rows can matter.  In order, also under priorities.
        self._waiting = iter(list(islice(scheduler.waiting, max(0, self._rows) + 1)))
        self._next = next(self._waiting, None)
        self._num_ahead = 0  # of these, and of those let in since
        self._num_promised = self._blocks = 0
        self._nobody_runs = not scheduler.running
        for request in (*late, *scheduler.kv_holding_waiting):
            self._promise(request)

    def leave_room_for(self, group: Group) -> bool:
        """Whether rows and blocks of all members are free beside those promised to others."""
        rows = self._rows - len(group.members)
        if rows < 0:
            return False
        by_priority = self._scheduler.backlog.by_priority
        while self._next is not None and self._num_ahead <= rows:
            if by_priority and not self._next < group.leader:
                break
            self._promise(self._next)
            self._num_ahead += 1
            self._next = next(self._waiting, None)
        if self._num_ahead > rows:
            return False
        # A block for each request beyond its prompt, so that it can also take a few steps; by itself a group
        # gets in without.
        alone = self._nobody_runs and not self._num_promised
        spare = 0 if alone else self._num_promised + len(group.members)
        return self._blocks + sum(map(self._needed, group.members)) + spare <= self._free

    def let_in(self, requests: Sequence[Request], late: Sequence[Request] = ()) -> None:
        """Counts requests that were let in; late: those of them that enter in the joint step only."""
        for request in requests:
            self._promise(request)
        self._num_ahead += len(requests) - len(late)
        self._rows -= len(late)

    def _promise(self, request: Request) -> None:
        self._num_promised += 1
        self._blocks += self._needed(request)

    def _needed(self, request: Request) -> int:
        return self._scheduler._request_remaining_blocks(request)

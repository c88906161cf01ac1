"""Where groups wait, and plain requests behind them.

vLLM's waiting queue hands out requests one by one and is scanned at every step.  A group that does
not fit yet must neither be handed out in parts, nor be overtaken for ever by smaller requests, nor
cost anything while thousands of groups wait.  So groups wait here, in one order with the plain
requests that came after them, and only the head is ever looked at.
"""

from __future__ import annotations

import heapq
from itertools import count

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from .group_state import Group

Entry = Group | Request
Order = tuple[float, ...]


class Backlog:
    """Waiting groups and requests, first come first served or by priority.

    A preempted group returns to the place that its arrival gave it.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self.by_priority = policy == SchedulingPolicy.PRIORITY
        self._arrivals = count()
        self._order: dict[str, Order] = {}
        self._entries: dict[str, Entry] = {}
        self._heap: list[tuple[Order, str]] = []
        self.num_requests = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def push(self, entry: Entry) -> None:
        """Adds an entry at the place of its first arrival."""
        first = _first(entry)
        assert first.request_id not in self._entries
        order = self._order.get(first.request_id)
        if order is None:
            urgency = (first.priority, first.arrival_time) if self.by_priority else ()
            order = self._order[first.request_id] = (*urgency, next(self._arrivals))
        self._entries[first.request_id] = entry
        self.num_requests += _size(entry)
        heapq.heappush(self._heap, (order, first.request_id))

    def peek(self) -> Entry | None:
        """The entry whose turn it is, or None."""
        while self._heap:
            order, request_id = self._heap[0]
            if request_id in self._entries and self._order[request_id] == order:
                return self._entries[request_id]
            heapq.heappop(self._heap)  # discarded while it waited
        return None

    def pop(self) -> Entry:
        """Takes the head out; it keeps its place should it come back."""
        entry = self.peek()
        assert entry is not None
        heapq.heappop(self._heap)
        self.discard(_first(entry).request_id)
        return entry

    def discard(self, request_id: str) -> None:
        """Takes an entry out, if it is here.  The heap forgets it when it gets there."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self.num_requests -= _size(entry)

    def forget(self, request_id: str) -> None:
        """Takes an entry out for good: its request has ended."""
        self.discard(request_id)
        self._order.pop(request_id, None)

    def precedes(self, request: Request) -> bool:
        """Whether a newly arrived request has to wait behind the head."""
        head = self.peek()
        if head is None:
            return False
        return not self.by_priority or not request < _first(head)


def _first(entry: Entry) -> Request:
    return entry.leader if isinstance(entry, Group) else entry


def _size(entry: Entry) -> int:
    return len(entry.members) if isinstance(entry, Group) else 1

"""The backlog against a sorted list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from vllm_marith.engine.core.backlog import Backlog
from vllm_marith.engine.core.group_state import Group

FCFS, PRIORITY = SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY


def request(name: str, priority: int = 0, arrival_time: float = 0.0) -> Request:
    params = SamplingParams(max_tokens=1)
    return Request(name, [1], params, None, arrival_time=arrival_time, priority=priority)


def group(name: str, size: int = 3, **kwargs: Any) -> Group:
    return Group([request(f"{name}+{i}" if i else name, **kwargs) for i in range(size)])


def name_of(entry: Any) -> str:
    return entry.name if isinstance(entry, Group) else entry.request_id


def emptied(backlog: Backlog) -> Iterator[str]:
    while len(backlog):
        yield name_of(backlog.pop())


def test_first_come_first_served() -> None:
    backlog = Backlog(FCFS)
    backlog.push(group("a", priority=9))
    backlog.push(request("b", priority=0))
    backlog.push(group("c", arrival_time=-1.0))
    assert list(emptied(backlog)) == ["a", "b", "c"]


def test_by_priority_then_arrival_then_order() -> None:
    backlog = Backlog(PRIORITY)
    backlog.push(group("late", priority=1, arrival_time=2.0))
    backlog.push(group("low", priority=2, arrival_time=0.0))
    backlog.push(request("early", priority=1, arrival_time=1.0))
    backlog.push(request("high", priority=0, arrival_time=3.0))
    backlog.push(group("tie", priority=1, arrival_time=2.0))
    assert list(emptied(backlog)) == ["high", "early", "late", "tie", "low"]


@pytest.mark.parametrize("policy", [FCFS, PRIORITY])
def test_what_comes_back_takes_its_old_place(policy: SchedulingPolicy) -> None:
    backlog = Backlog(policy)
    entries = [group(name) for name in "abc"]
    for entry in entries:
        backlog.push(entry)
    assert backlog.pop() is entries[0]
    assert backlog.pop() is entries[1]
    backlog.push(entries[1])
    backlog.push(entries[0])
    assert list(emptied(backlog)) == ["a", "b", "c"]


def test_what_has_ended_and_comes_again_is_new() -> None:
    backlog = Backlog(FCFS)
    for name in "ab":
        backlog.push(group(name))
    backlog.forget("a")
    assert not backlog._order.keys() - {"b"}
    backlog.push(group("a"))
    assert list(emptied(backlog)) == ["b", "a"]


def test_an_entry_waits_once() -> None:
    backlog = Backlog(FCFS)
    backlog.push(group("a"))
    with pytest.raises(AssertionError):
        backlog.push(group("a"))


def test_who_has_to_wait_behind_the_head() -> None:
    backlog = Backlog(FCFS)
    assert not backlog.precedes(request("x"))
    backlog.push(group("head", priority=1, arrival_time=1.0))
    assert backlog.precedes(request("x", priority=0, arrival_time=0.0))

    backlog = Backlog(PRIORITY)
    backlog.push(group("head", priority=1, arrival_time=1.0))
    assert backlog.precedes(request("x", priority=1, arrival_time=2.0))
    assert backlog.precedes(request("x", priority=2, arrival_time=0.0))
    assert not backlog.precedes(request("x", priority=1, arrival_time=0.0))
    assert not backlog.precedes(request("x", priority=0, arrival_time=9.0))


def test_the_head_is_all_that_is_looked_at() -> None:
    backlog = Backlog(FCFS)
    for i in range(5000):
        backlog.push(request(f"r{i}"))
    size = len(backlog._heap)
    for _ in range(10):
        assert name_of(backlog.peek()) == "r0"
    assert len(backlog._heap) == size
    for i in range(4999):
        backlog.discard(f"r{i}")  # leaves the heap alone ...
    assert len(backlog._heap) == size
    assert name_of(backlog.peek()) == "r4999"  # ... until it gets there
    assert len(backlog._heap) == 1


operations = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "pop", "discard", "forget"]),
        st.integers(0, 9),  # which request
        st.integers(1, 4),  # how many members
        st.integers(0, 2),  # priority
        st.integers(0, 3),  # arrival time
    ),
    max_size=60,
)


@given(policy=st.sampled_from([FCFS, PRIORITY]), operations=operations)
def test_against_a_sorted_list(
    policy: SchedulingPolicy, operations: list[tuple[str, int, int, int, int]]
) -> None:
    backlog = Backlog(policy)
    waiting: dict[str, Any] = {}
    known: dict[str, tuple[Any, tuple[float, ...]]] = {}  # name -> entry and place, until it ends
    for count, (kind, number, size, priority, arrival) in enumerate(operations):
        name = f"r{number}"
        if kind == "push" and name not in waiting:
            if name not in known:
                fields = dict(priority=priority, arrival_time=float(arrival))
                entry = request(name, **fields) if size == 1 else group(name, size, **fields)
                known[name] = entry, (priority, arrival, count) if policy is PRIORITY else (count,)
            waiting[name] = known[name][0]
            backlog.push(waiting[name])
        elif kind == "pop" and waiting:
            first = min(waiting, key=lambda name: known[name][1])
            assert backlog.pop() is waiting.pop(first)
        elif kind in ("discard", "forget"):
            getattr(backlog, kind)(name)
            waiting.pop(name, None)
            if kind == "forget":
                known.pop(name, None)

        sizes = [len(entry.members) if isinstance(entry, Group) else 1 for entry in waiting.values()]
        assert (len(backlog), backlog.num_requests) == (len(waiting), sum(sizes))
        assert all((f"r{i}" in backlog) == (f"r{i}" in waiting) for i in range(10))
        head = backlog.peek()
        assert head is (waiting[min(waiting, key=lambda name: known[name][1])] if waiting else None)
        assert backlog._order.keys() == known.keys()

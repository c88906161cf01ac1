"""What the scheduler counts, and how the frontends ask for it.

vLLM's `SchedulerStats` reach the frontends with every step and have no field for a plugin; so nothing is
sent while nobody asks.  A frontend that is scraped calls ``collective_rpc(FIGURES)``, which the
workers answer (`engine.worker.figures`), and the core puts its own figures in front.

Counts are *drained*: an answer holds what happened since the last one, whoever got it.  With several
API servers every count is thus reported by exactly one of them, and their sum is right.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, NamedTuple

from .. import patches
from ..group import FIGURES, GroupSpec


class _Counted(NamedTuple):
    label: str
    names: tuple[str, ...]
    alone: bool


class CoreFigures:
    """Counts since the last `drain`.

    Attributes:
        members: groups by their number of members, counted on arrival.
        fused_rows: joint steps by the number of rows that groups had in them.
        tokens: generated tokens by label, counted when a request ends.
        preempted: groups that were preempted.
        failed: requests with a formula that ended with an error, by `Cause`.
        steps: where formulas may draft, their steps by label.
        calls: likewise, calls of members, by label and the member's name; a worker adds those of drafting.
        drafted: tokens that partial formulas proposed, by label.
        accepted: those of them that stood.
    """

    def __init__(self) -> None:
        self._living: dict[str, _Counted] = {}  # requests with a formula
        self._reset()

    def _reset(self) -> None:
        self.members: Counter[int] = Counter()
        self.fused_rows: Counter[int] = Counter()
        self.tokens: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.steps: Counter[str] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.drafted: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.preempted = 0

    def arrive(self, request_id: str, spec: GroupSpec, alone: bool = False) -> None:
        """A request with a formula has come; alone, it is scheduled as any other: a token in every step."""
        self._living[request_id] = _Counted(spec.label, tuple(spec.names), alone)
        self.members[spec.size] += 1

    def end(self, request_id: str, tokens: int) -> None:
        """A request has ended; nothing if it has no formula."""
        counted = self._living.get(request_id)
        if counted is None:
            return
        if counted.alone and counted.names:
            self.step(request_id, tokens)
        self.tokens[counted.label] += tokens
        del self._living[request_id]

    def step(self, request_id: str, steps: int = 1) -> None:
        """A request's members took steps that give tokens."""
        counted = self._living[request_id]
        self.steps[counted.label] += steps
        for name in counted.names:
            self.calls[counted.label, name] += steps

    def check(self, request_id: str, drafted: int, accepted: int) -> None:
        """A request's drafts were checked."""
        counted = self._living.get(request_id)
        if counted is not None:
            self.drafted[counted.label] += drafted
            self.accepted[counted.label] += accepted

    def drain(self) -> dict[str, Any]:
        """The counts as plain data, which start again at zero."""
        counts = {
            "members": sorted(self.members.items()),
            "fused_rows": sorted(self.fused_rows.items()),
            "tokens": sorted(self.tokens.items()),
            "preempted": self.preempted,
            "failed": sorted(self.failed.items()),
            "steps": sorted(self.steps.items()),
            "calls": sorted(self.calls.items()),
            "drafted": sorted(self.drafted.items()),
            "accepted": sorted(self.accepted.items()),
        }
        self._reset()
        return counts


def install() -> None:
    """Lets this engine core answer for its scheduler; idempotent, once per process."""
    patches.patch("vllm.v1.engine.core:EngineCore.collective_rpc", _with_core_figures)


def _with_core_figures(collective_rpc: Any) -> Any:
    @functools.wraps(collective_rpc)
    def answering(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        workers = collective_rpc(self, method, *args, **kwargs)
        if method != FIGURES or not hasattr(self.scheduler, "figures"):
            return workers
        return [self.scheduler.take_figures(), *workers]

    return answering

"""Which rows of a step belong to which groups, and the fusion program for them.

Shared by both model runners: a runner says which requests sit in which rows and which rows are
discarded (prefill chunks and held members); `RowPlans` answers with a `RowPlan`, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import marith_kernels
import numpy as np
import torch

from .. import patches
from ..group import KEY, Instruction, MemberTag
from .figures import FIGURES
from .head import Head, HeadPlan, combinable


def warmup(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    """Compiles the fusion kernels for logits of `dtype` now rather than under the first request."""
    marith_kernels.warmup(device=device, dtypes=[dtype], vocab_size=vocab_size)
    patches.shield_llvmlite()


@dataclass(frozen=True)
class RowPlan:
    """What one step does with its logits ``[rows, vocab]``.

    Attributes:
        head: groups that are combined before the LM head, if there are any; the rest after it.
        batch: the fusion programs of the step's other joint groups.
        leaders: int64 ``[groups]``, the row of each group's leader, which receives the fused row.
        followers: int64 ``[followers]``, rows whose sampled token is replaced ...
        follower_leaders: int64 ``[followers]``, ... by that of this row.
    """

    head: HeadPlan | None
    batch: marith_kernels.Batch
    leaders: torch.Tensor
    followers: torch.Tensor
    follower_leaders: torch.Tensor

    def compute_logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor | None:
        """Fused logits from the hidden states ``[rows, size]``."""
        logits = self.head.run(head, hidden) if self.head else head(hidden)
        return logits if logits is None else self.fuse(logits)

    def fuse(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 logits in which each leader's row holds its formula's distribution."""
        if not self.batch.n_groups:
            return logits
        with FIGURES.fusing():
            fused = marith_kernels.fuse(logits, self.batch).logits
            # Sampling works in float32 anyway; rows of plain requests keep their values.
            logits = logits.float()
            return logits.index_copy_(0, self.leaders, fused)

    def tie(self, sampled: torch.Tensor) -> None:
        """Gives every follower its leader's token, in place.  sampled: ``[rows, 1]``."""
        if self.followers.numel():
            sampled.index_copy_(0, self.followers, sampled.index_select(0, self.follower_leaders))


class RowPlans:
    """Builds `RowPlan`s and keeps the last one while the step's rows stay the same."""

    def __init__(self, device: torch.device, combine_hidden_states: bool = False) -> None:
        self.device = device
        self.combine_hidden_states = combine_hidden_states
        self.key: tuple[list[str], np.ndarray] | None = None
        self.plan: RowPlan | None = None

    def forget(self) -> None:
        """The same request ids may now stand for other requests."""
        self.key = None

    def plan_step(
        self,
        request_ids: Sequence[str],
        discarded: np.ndarray,
        extra_args: Callable[[str], dict[str, Any] | None],
    ) -> RowPlan | None:
        """The plan of a step, or None when no group has joint rows in it.

        Args:
            request_ids: the request in each row.
            discarded: bool ``[rows]``, rows whose sample vLLM throws away.
            extra_args: a request's ``SamplingParams.extra_args``.
        """
        if self.key is not None:
            ids, mask = self.key
            if ids == request_ids and np.array_equal(mask, discarded):
                return self.plan
        self.plan = self._build(request_ids, discarded, extra_args)
        self.key = (list(request_ids), discarded.copy())
        return self.plan

    def _build(
        self,
        request_ids: Sequence[str],
        discarded: np.ndarray,
        extra_args: Callable[[str], dict[str, Any] | None],
    ) -> RowPlan | None:
        members: dict[str, dict[int, tuple[int, MemberTag]]] = {}
        for row, request_id in enumerate(request_ids):
            args = extra_args(request_id)
            if args and KEY in args and not discarded[row]:
                tag = MemberTag.from_wire(args[KEY])
                members.setdefault(tag.group, {})[tag.index] = (row, tag)

        programs, rows, leaders, followers, follower_leaders = [], [], [], [], []
        head_programs, head_rows = [], []
        for group in members.values():
            leader = group.get(0)
            if leader is None or len(group) != leader[1].size:
                # The scheduler never sends such a step; it fails the group there if it ever does
                # and drops its tokens, so leaving the rows alone is safe here.
                continue
            row, tag = leader
            program = _program(tuple(tag.instructions), tag.divide)
            members_rows = [group[i][0] for i in range(tag.size)]
            if self.combine_hidden_states and combinable(program):
                head_programs.append(program)
                head_rows.append(members_rows)
            else:
                programs.append(program)
                rows.append(members_rows)
                leaders.append(row)
            followers += members_rows[1:]
            follower_leaders += [row] * (tag.size - 1)
        if not programs and not head_programs:
            return None

        def index(values: list[int]) -> torch.Tensor:
            # A copy from ordinary memory may wait for the device.
            pinned = self.device.type == "cuda"
            on_host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
            return on_host.to(self.device, non_blocking=True)

        head = None
        if head_programs:
            head = HeadPlan.build(head_programs, head_rows, len(request_ids), self.device)
        return RowPlan(
            head,
            marith_kernels.Batch.build(programs, rows, self.device),
            index(leaders),
            index(followers),
            index(follower_leaders),
        )


@lru_cache(maxsize=4096)
def _program(instructions: tuple[Instruction, ...], divide: bool) -> marith_kernels.Program:
    # Requests repeat a handful of formulas; encoding one costs more than finding it again.
    return marith_kernels.Program(instructions, divide=divide)

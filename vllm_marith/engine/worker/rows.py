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

from vllm_marith.language.nodes import Schedule
from vllm_marith.plan import Routine, Stage, decode

from .. import patches
from ..group import KEY, MemberTag
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
        batch: the formulas of the step's other joint groups.
        leaders: int64 ``[groups]``, the row of each group's leader, which receives the fused row.
        followers: int64 ``[followers]``, rows whose sampled token is replaced ...
        follower_leaders: int64 ``[followers]``, ... by that of this row.
    """

    head: HeadPlan | None
    batch: marith_kernels.StagedBatch
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
            fused = self.batch.run(logits).logits
            # Sampling works in float32 anyway; rows of plain requests keep their values.
            logits = logits.float()
            return logits.index_copy_(0, self.leaders, fused)

    def tie(self, sampled: torch.Tensor) -> None:
        """Gives every follower its leader's token, in place.  sampled: ``[rows, 1]``."""
        if self.followers.numel():
            sampled.index_copy_(0, self.followers, sampled.index_select(0, self.follower_leaders))


@dataclass(frozen=True)
class _JointGroup:
    """A group all of whose members sample in this step.

    Attributes:
        rows: of its members, leader first.
        tag: the leader's.
        routine: what is done with the rows.
    """

    rows: list[int]
    tag: MemberTag
    routine: Routine

    def dials(self, lengths: np.ndarray) -> tuple[float, ...]:
        """The values of the formula's dials at this step, for sequences of these lengths."""
        position = int(lengths[self.rows[0]]) - self.tag.prompt_length
        return tuple(dial.at(position) for dial in self.routine.dials if isinstance(dial, Schedule))


class RowPlans:
    """Builds `RowPlan`s and keeps the last one while the step's rows and dials stay the same."""

    def __init__(self, device: torch.device, combine_hidden_states: bool = False) -> None:
        self.device = device
        self.combine_hidden_states = combine_hidden_states
        self.key: tuple[list[str], np.ndarray] | None = None
        self.groups: list[_JointGroup] = []
        self.dials: list[tuple[float, ...]] = []
        self.plan: RowPlan | None = None

    def forget(self) -> None:
        """The same request ids may now stand for other requests."""
        self.key = None

    def plan_step(
        self,
        request_ids: Sequence[str],
        discarded: np.ndarray,
        lengths: np.ndarray,
        extra_args: Callable[[str], dict[str, Any] | None],
    ) -> RowPlan | None:
        """The plan of a step, or None when no group has joint rows in it.

        Args:
            request_ids: the request in each row.
            discarded: bool ``[rows]``, rows whose sample vLLM throws away.
            lengths: int ``[rows]``, tokens of each sequence before the one that is sampled.
            extra_args: a request's ``SamplingParams.extra_args``.
        """
        if self.key is not None:
            ids, mask = self.key
            if ids == request_ids and np.array_equal(mask, discarded):
                if not any(group.routine.dials for group in self.groups):
                    return self.plan
                dials = [group.dials(lengths) for group in self.groups]
                if dials != self.dials:
                    self.dials = dials
                    self.plan = self._build(len(request_ids))
                return self.plan
        self.groups = _joint_groups(request_ids, discarded, extra_args)
        self.dials = [group.dials(lengths) for group in self.groups]
        self.plan = self._build(len(request_ids)) if self.groups else None
        self.key = (list(request_ids), discarded.copy())
        return self.plan

    def _build(self, num_rows: int) -> RowPlan:
        pipelines, rows, followers, follower_leaders = [], [], [], []
        head_programs, head_rows = [], []
        for group, dials in zip(self.groups, self.dials, strict=True):
            pipeline = pipeline_of(group.tag.routine, dials)
            program = pipeline.stages[0].program
            if self.combine_hidden_states and len(pipeline.stages) == 1 and program and combinable(program):
                head_programs.append(program)
                head_rows.append(group.rows)
            else:
                pipelines.append(pipeline)
                rows.append(group.rows)
            leader, *others = group.rows
            followers += others
            follower_leaders += [leader] * len(others)

        def index(values: list[int]) -> torch.Tensor:
            # A copy from ordinary memory may wait for the device.
            pinned = self.device.type == "cuda"
            on_host = torch.tensor(values, dtype=torch.int64, pin_memory=pinned)
            return on_host.to(self.device, non_blocking=True)

        head = None
        if head_programs:
            head = HeadPlan.build(head_programs, head_rows, num_rows, self.device)
        return RowPlan(
            head,
            marith_kernels.StagedBatch.build(pipelines, rows, self.device),
            index([members[0] for members in rows]),
            index(followers),
            index(follower_leaders),
        )


def _joint_groups(
    request_ids: Sequence[str], discarded: np.ndarray, extra_args: Callable[[str], dict[str, Any] | None]
) -> list[_JointGroup]:
    members: dict[str, dict[int, tuple[int, MemberTag]]] = {}
    for row, request_id in enumerate(request_ids):
        args = extra_args(request_id)
        if args and KEY in args and not discarded[row]:
            tag = MemberTag.from_wire(args[KEY])
            members.setdefault(tag.group, {})[tag.index] = (row, tag)
    groups = []
    for group in members.values():
        leader = group.get(0)
        if leader is None or len(group) != leader[1].size:
            # The scheduler never sends such a step; it fails the group there if it ever does
            # and drops its tokens, so leaving the rows alone is safe here.
            continue
        tag = leader[1]
        groups.append(_JointGroup([group[i][0] for i in range(tag.size)], tag, _routine(tag.routine)))
    return groups


# Requests repeat a handful of formulas; reading one costs more than finding it again.
@lru_cache(maxsize=4096)
def _routine(text: str) -> Routine:
    return decode(text)


@lru_cache(maxsize=4096)
def pipeline_of(text: str, dials: tuple[float, ...]) -> marith_kernels.Pipeline:
    """What the kernels run for a routine (`vllm_marith.plan.encode`) at its dials' values."""
    routine = _routine(text)
    weightless = {routine.terms + i for i, stage in enumerate(routine.stages) if stage.weightless}

    def stage_of(stage: Stage) -> marith_kernels.Stage:
        if stage.kind == "classifier":
            return marith_kernels.Stage("external", sources=stage.sources, weightless=stage.weightless)
        program = None
        if stage.instructions:
            energies = {row for _, row, _ in stage.instructions} & weightless
            program = marith_kernels.Program(stage.at(dials), divide=stage.divide, weightless=energies)
        return marith_kernels.Stage(stage.kind, program, stage.parameters, stage.sources, stage.weightless)

    return marith_kernels.Pipeline(routine.terms, tuple(map(stage_of, routine.stages)))

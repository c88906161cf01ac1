"""Which rows of a step belong to which groups, and the fusion program for them.

Shared by both model runners: a runner says which requests sit in which rows and which rows are
discarded (prefill chunks and held members); `RowPlans` answers with a `RowPlan`, or none.

Two kinds of rows.  A *request row* is a request's place in the step's batch.  The logits have one row for
each of them and, behind it, one more for every drafted token that the request checks in this step: then all
members of a group have as many, and the formula is computed at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import marith_kernels
import numpy as np
import torch
from vllm.logger import init_logger

from vllm_marith.language.nodes import Schedule, Strength
from vllm_marith.plan import Routine

from .. import patches
from ..group import KEY, Cause, Failure, MemberTag
from .answers import Answers
from .classifiers.rows import ClassifierRows
from .classifiers.step import ClassifierStep
from .evidence import Witness
from .failures import StepFailures, judge, to_host
from .figures import FIGURES
from .head import Head, HeadPlan, combinable
from .pipelines import pipeline_of, routine_of

logger = init_logger(__name__)


def warmup(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    """Compiles the fusion kernels for logits of `dtype` now rather than under the first request."""
    marith_kernels.warmup(device=device, dtypes=[dtype], vocab_size=vocab_size)
    patches.shield_llvmlite()


@dataclass(frozen=True)
class RowPlan:
    """What one step does with its logits ``[rows, vocab]``.

    Attributes:
        head: groups that are combined before the LM head, if there are any; the rest after it.
        batch: the formulas of the step's other joint groups, at each of their positions.
        groups: those groups; one that checks k drafts stands here k + 1 times.
        names: of the groups of `groups`, then of those of `head`.
        followers: int64 ``[followers]``, request rows whose sampled tokens are replaced ...
        follower_leaders: int64 ``[followers]``, ... by those of this one.
        starts: of each request row, its first row of logits, and the number of all of these.
        joint: all joint groups of the step, each once.
        classifiers: of this step, where formulas have some.
        witnesses: of the groups whose requests want to be explained; none of them is in `head`.
        broken: groups that have no plan, and why.
    """

    head: HeadPlan | None
    batch: marith_kernels.StagedBatch
    groups: list[JointGroup]
    names: list[str]
    followers: torch.Tensor
    follower_leaders: torch.Tensor
    starts: np.ndarray
    joint: Sequence[JointGroup] = ()
    classifiers: ClassifierStep | None = None
    witnesses: tuple[Witness, ...] = ()
    broken: Mapping[str, Failure] = field(default_factory=dict)

    def compute_logits(
        self, head: Head, hidden: torch.Tensor
    ) -> tuple[torch.Tensor | None, Mapping[str, Failure]]:
        """Fused logits from the hidden states ``[rows, size]``, and what `fuse` says of them."""
        logits = self.head.run(head, hidden) if self.head else head(hidden)
        return (None, {}) if logits is None else self.fuse(logits)

    def fuse(self, logits: torch.Tensor) -> tuple[torch.Tensor, Mapping[str, Failure]]:
        """float32 logits in which each leader's row holds its formula's distribution.

        Also returns, by group, why a formula has none: tokens of those groups must not be taken.
        """
        for witness in self.witnesses:
            witness.before(logits)
        with FIGURES.fusing():
            fused = (
                logits.float()
            )  # which the sampler works in anyway; rows of plain requests keep their values
            peaks = self.batch.replace(logits, fused, external=self._write)
            logits = fused
            if self.head:
                peaks = torch.cat([peaks, judge(logits, self.head.leaders)])
            peaks = to_host(peaks)
        for witness in self.witnesses:
            witness.after(logits)
        known = dict(self.broken) | (self.classifiers.failures if self.classifiers else {})
        return logits, StepFailures(known, self.names, peaks)

    def _write(
        self,
        which: Sequence[tuple[int, int]],
        source: torch.Tensor,
        source_lse: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """The rows of classifier stages, see `marith_kernels.External`."""
        assert self.classifiers is not None
        stages = [(self.groups[g], self.groups[g].routine.stages[s]) for g, s in which]
        asked = [(group.tag, int(stage.parameters[0])) for group, stage in stages]
        return self.classifiers.write(asked, source, out)

    def tie(self, sampled: torch.Tensor, *numbers: torch.Tensor) -> None:
        """Gives followers their leader's tokens ``[request rows, positions]`` and `numbers`, in place."""
        for witness in self.witnesses:
            witness.sampled(sampled)
        for values in (sampled, *numbers) if self.followers.numel() else ():
            values.index_copy_(0, self.followers, values.index_select(0, self.follower_leaders))


@dataclass(frozen=True)
class JointGroup:
    """A group all of whose members sample in this step.

    Attributes:
        ids: of its members' requests, leader first.
        rows: request rows of its members.
        tag: the leader's.
        routine: what is done with the rows.
    """

    ids: list[str]
    rows: list[int]
    tag: MemberTag
    routine: Routine

    @property
    def strengths(self) -> list[Strength]:
        """The dials that a classifier turns."""
        return [dial for dial in self.routine.dials if isinstance(dial, Strength)]

    def dials(
        self, lengths: np.ndarray, ahead: int, probabilities: Mapping[tuple[str, str], float]
    ) -> tuple[float, ...]:
        """The values of the formula's dials for sequences of these lengths and so many drafted tokens.

        probabilities: (group, classifier term) -> p(y | text so far), of `strengths`.
        """
        position = int(lengths[self.rows[0]]) + ahead - self.tag.prompt_length
        return tuple(
            dial.at(position)
            if isinstance(dial, Schedule)
            else dial.at(probabilities[self.tag.group, dial.classifier.name])
            for dial in self.routine.dials
        )

    def schedules(self, routine: Routine, length: int, ahead: int) -> tuple[float, ...]:
        """The dials of a partial formula, which no classifier turns, behind so many drafted tokens.

        length: of the leader's sequence.
        """
        position = length + ahead - self.tag.prompt_length
        return tuple(dial.at(position) for dial in routine.dials)


def ban(logits: torch.Tensor, row: int, tokens: Sequence[int]) -> None:
    """Makes tokens impossible in a row of ``[rows, vocab]``, in place, unless nothing else is possible.

    Then the row stays as it was, and the scheduler is told so by the banned token that is drawn.
    """
    banned = logits[row].index_fill(0, torch.tensor(tokens, device=logits.device), -torch.inf)
    logits[row] = torch.where(torch.isneginf(banned).all(), logits[row], banned)


class RowPlans:
    """Builds `RowPlan`s and keeps the last one while the step's rows and dials stay the same."""

    def __init__(
        self,
        device: torch.device,
        combine_hidden_states: bool = False,
        classifiers: ClassifierRows | None = None,
    ) -> None:
        self.device = device
        self.classifiers = classifiers
        self.combine_hidden_states = combine_hidden_states
        self.key: tuple[list[str], bytes, bytes] | None = None
        self.groups: list[JointGroup] = []
        self.broken: dict[str, Failure] = {}
        self.tags: Tags = {}
        self.positions: list[tuple[JointGroup, int]] = []  # every group with 0, 1, ... drafted tokens ahead
        self.steered: list[MemberTag] = []  # of the groups that have classifiers
        self.turns = False  # whether any group has a dial
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
        answers: Answers,
        drafted: np.ndarray | None = None,
    ) -> RowPlan | None:
        """The plan of a step, or None when no group has joint rows in it.

        Args:
            request_ids: the request in each row.
            discarded: bool ``[rows]``, rows whose sample vLLM throws away.
            lengths: int ``[rows]``, tokens of each sequence before the first one that is sampled.
            extra_args: a request's ``SamplingParams.extra_args``.
            answers: asked in every joint step of the groups that have classifiers, and for no others.
            drafted: int ``[rows]``, drafted tokens that each request checks in this step; none by default.
        """
        drafted = np.zeros(len(request_ids), np.int64) if drafted is None else drafted
        key = request_ids, discarded.tobytes(), drafted.tobytes()
        known = key == self.key
        if not known:
            self.groups, self.broken, self.tags = _joint_groups(request_ids, discarded, extra_args, self.tags)
            self.positions = [(g, ahead) for g in self.groups for ahead in range(drafted[g.rows[0]] + 1)]
            self.steered = [group.tag for group in self.groups if group.tag.classifiers]
            self.turns = any(group.routine.dials for group in self.groups)
            self.key = (list(request_ids), *key[1:])
        step = None
        if self.steered:
            assert self.classifiers is not None
            step = ClassifierStep.begin(self.classifiers, self.steered, answers)
        if not known or self.turns:
            dials = self._turn(lengths, step)
            if not known or dials != self.dials:
                self.dials = dials
                self.plan = self._build(drafted) if self.groups or self.broken else None
        return self.plan if self.plan is None or step is None else replace(self.plan, classifiers=step)

    def _turn(self, lengths: np.ndarray, step: ClassifierStep | None) -> list[tuple[float, ...]]:
        """The values of every group's dials at each of its positions."""
        if not self.turns:
            return [()] * len(self.positions)
        asked = [(group.tag, dial.classifier.name) for group in self.groups for dial in group.strengths]
        found = step.probabilities(asked) if step is not None and asked else {}
        return [group.dials(lengths, ahead, found) for group, ahead in self.positions]

    def _build(self, drafted: np.ndarray) -> RowPlan:
        starts = np.concatenate([[0], (drafted + 1).cumsum()])
        pipelines, batched, batched_rows, followers, follower_leaders = [], [], [], [], []
        head_programs, head_rows, headed = [], [], []
        witnesses = []
        broken = dict(self.broken)
        for (group, ahead), dials in zip(self.positions, self.dials, strict=True):
            rows = [int(starts[row]) + ahead for row in group.rows]
            # The values of probabilities do not come again.
            find = pipeline_of.__wrapped__ if dials and group.strengths else pipeline_of
            try:
                pipeline = find(group.tag.routine, dials)
            except Exception as error:
                broken[group.tag.group] = _unexpected(error)
                continue
            if group.tag.explain:
                witnesses.append(Witness(group.tag.explain, rows, group.rows[0]))
            if self.combine_hidden_states and not group.tag.explain and (program := _before_head(pipeline)):
                head_programs.append(program)
                head_rows.append(rows)
                headed.append(group)
            else:
                pipelines.append(pipeline)
                batched.append(group)
                batched_rows.append(rows)
            if ahead == 0:
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
            head = HeadPlan.build(head_programs, head_rows, int(starts[-1]), self.device)
        return RowPlan(
            head,
            marith_kernels.StagedBatch.build(pipelines, batched_rows, self.device),
            batched,
            [group.tag.group for group in (*batched, *headed)],
            index(followers),
            index(follower_leaders),
            starts,
            joint=self.groups,
            witnesses=tuple(witnesses),
            broken=broken,
        )


def _before_head(pipeline: marith_kernels.Pipeline) -> marith_kernels.Program | None:
    """The program that may be applied to hidden states; None where the law of `head` does not hold."""
    program = pipeline.stages[0].program
    return program if len(pipeline.stages) == 1 and program and combinable(program) else None


def failing_all(
    request_ids: Sequence[str],
    discarded: np.ndarray,
    extra_args: Callable[[str], dict[str, Any] | None],
    error: Exception,
) -> dict[str, Failure]:
    """Every group that would have sampled in a step, which could not be planned or fused at all."""
    failure = _unexpected(error)
    wires = ((extra_args(i) or {}).get(KEY) for i, out in zip(request_ids, discarded, strict=True) if not out)
    return {wire["group"]: failure for wire in wires if wire}


def _unexpected(error: Exception) -> Failure:
    logger.exception("marith: a formula could not be computed")
    return Cause.ERROR, f"its formula could not be computed: {type(error).__name__}"


Tags = dict[str, tuple[Mapping[str, Any], MemberTag, Routine]]
"""Of each group the wire of its leader, and what that says."""


def _joint_groups(
    request_ids: Sequence[str],
    discarded: np.ndarray,
    extra_args: Callable[[str], dict[str, Any] | None],
    known: Tags,
) -> tuple[list[JointGroup], dict[str, Failure], Tags]:
    """The groups that sample in a step, and those of which it has only a part or which cannot be read.

    known: of an earlier step; reading a wire again would take most of the time.  Returned as of this one.
    """
    members: dict[str, dict[int, int]] = {}  # group -> member -> row
    leaders: dict[str, Mapping[str, Any]] = {}
    for row, request_id in enumerate(request_ids):
        args = extra_args(request_id)
        if args and KEY in args and not discarded[row]:
            wire = args[KEY]
            members.setdefault(wire["group"], {})[wire["index"]] = row
            if wire["index"] == 0:
                leaders[wire["group"]] = wire
    groups: list[JointGroup] = []
    tags: Tags = {}
    # The scheduler never sends a part of a group; it fails the group there if it ever does.
    broken: dict[str, Failure] = {
        name: (Cause.TORN, f"the worker had {len(row_of)} of its members, without the leader")
        for name, row_of in members.items()
        if name not in leaders
    }
    for name, wire in leaders.items():
        row_of = members[name]
        if len(row_of) != wire["size"]:
            broken[name] = Cause.TORN, f"the worker had {len(row_of)} of its {wire['size']} members"
            continue
        try:
            found = known.get(name)
            if found is None or found[0] is not wire:  # a name may come again with another formula
                tag = MemberTag.from_wire(wire)
                found = wire, tag, routine_of(tag.routine)
            rows = [row_of[i] for i in range(wire["size"])]
            groups.append(JointGroup([request_ids[row] for row in rows], rows, *found[1:]))
            tags[name] = found
        except Exception as error:
            broken[name] = _unexpected(error)
    return groups, broken, tags

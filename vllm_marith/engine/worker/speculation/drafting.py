"""Drafts of partial formulas, for all groups of a step together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import marith_kernels
import torch

from vllm_marith.language.names import FREE_DRAFTERS

from ..figures import FIGURES
from ..pipelines import pipeline_of, routine_of
from ..rows import JointGroup
from .dice import Dice


@dataclass(frozen=True)
class Draft:
    """Tokens that a group proposes.

    Attributes:
        length: tokens of the leader's sequence in front of them.
        tokens: int64 ``[k]``.
        logits: float32 ``[k, vocab]``, what each was drawn from: softmax of its row, or its argmax where the
            request is greedy.
    """

    length: int
    tokens: torch.Tensor
    logits: torch.Tensor


class Forward(Protocol):
    """Logits of some members on some tokens, whose keys and values it leaves in their KV cache."""

    def __call__(
        self, rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        """float32 or the model's dtype ``[sum(counts), vocab]``.

        Args:
            rows: request rows of the members.
            firsts: position of each member's first token here.
            counts: each member's number of tokens.
            tokens: int64 ``[sum(counts)]``, one member's behind the other's.
        """


class Shape(Protocol):
    """What a request asks of the sampler: penalties, bias, temperature, top-k and so on."""

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[int], ahead: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """float32 ``[n, vocab]``: logits whose softmax the tokens are drawn from.

        Args:
            logits: ``[n, vocab]``, of formulas.
            rows: request rows of the leaders whose they are.
            ahead: int64, drafted tokens between each leader's sequence and the position.
        """

    def temperature(self, rows: Sequence[int]) -> torch.Tensor:
        """float32 ``[n]``: 0 for greedy requests, 1 for all others, whose logits were divided already."""


class Copy(Protocol):
    """Tokens that followed where the like was said before: n-grams or suffixes, for which no model runs."""

    def __call__(self, lines: Sequence[Line], numbers: Sequence[int]) -> Sequence[torch.Tensor]:
        """int64, so many tokens at the most, for each line, to follow what it has proposed so far."""


@dataclass
class Line:
    """A group that is drafting.

    Attributes:
        group: the group.
        lengths: tokens of each member's sequence.
        last: int64 ``[1]``, the last of them.
        wanted: how many tokens it is to propose.
        tokens: int64 ``[1]`` each, proposed so far.
        logits: float32 ``[vocab]`` each, what they were drawn from; None for copied tokens, until they are
            settled.
        shown: of each member that has run, how many of `last` and `tokens` its KV cache holds.
    """

    group: JointGroup
    lengths: Sequence[int]
    last: torch.Tensor
    wanted: int
    tokens: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor | None] = field(default_factory=list)
    shown: dict[int, int] = field(default_factory=dict)

    @property
    def leader(self) -> int:
        return self.group.rows[0]

    def ahead(self, number: int) -> torch.Tensor:
        """The first so many tokens, int64 ``[number]``."""
        return torch.cat(self.tokens[:number]) if number else self.last[:0]

    def draft(self) -> Draft:
        logits = [row for row in self.logits if row is not None]
        return Draft(self.lengths[0], torch.cat(self.tokens), torch.stack(logits))


class Drafter:
    """Lets lines grow to what they want.

    Args:
        copy: proposes for the first level of formulas that text drafts for; without it, nothing does.
    """

    def __init__(self, forward: Forward, shape: Shape, dice: Dice, copy: Copy | None = None) -> None:
        self._forward = forward
        self._shape = shape
        self._dice = dice
        self._copy = copy
        self._batches: dict[Any, tuple[Any, marith_kernels.StagedBatch]] = {}

    def propose(self, lines: Sequence[Line]) -> list[Draft]:
        """The drafts of lines that have none yet, and want one at least."""
        for depth in sorted({len(line.group.tag.drafts) for line in lines}):
            those = [line for line in lines if len(line.group.tag.drafts) == depth]
            self._grow(those, depth - 1, [line.wanted for line in those])
        return [line.draft() for line in lines]

    def _grow(self, lines: Sequence[Line], level: int, goals: Sequence[int]) -> None:
        """Until each line has its goal's number of tokens, distributed as this level's partial formula.

        But for the last tokens, where they are no more than a level checks at a time: the level below drafts
        them for whoever wants the goal, and checks the tokens next.  To check them here, too, would cost a
        call of each of the level's members, and save less than one of what comes next.
        """
        while growing := [(line, goal) for line, goal in zip(lines, goals, strict=True) if _left(line, goal)]:
            active = [line for line, _ in growing]
            known = [len(line.tokens) for line in active]
            if level:
                targets = [
                    min(goal, len(line.tokens) + lengths_of(line.group)[level - 1]) for line, goal in growing
                ]
                self._grow(active, level - 1, targets)
            else:
                self._add_copies(growing)
            unchecked = [
                (line, first)
                for (line, goal), first in zip(growing, known, strict=True)
                if not level or _left(line, goal)
            ]
            if unchecked:
                self._check([line for line, _ in unchecked], level, [first for _, first in unchecked])

    def _add_copies(self, growing: Sequence[tuple[Line, int]]) -> None:
        """Copied tokens for the lines whose first level checks some, up to their goals."""
        asked = [
            (line, min(_left(line, goal) - 1, line.group.tag.draft_lengths[0]))
            for line, goal in growing
            if line.group.tag.drafter in FREE_DRAFTERS and _left(line, goal) > 1
        ]
        if self._copy is None or not asked:
            return
        lines = [line for line, _ in asked]
        for line, tokens in zip(lines, self._copy(lines, [number for _, number in asked]), strict=True):
            # Often there are none.
            line.tokens += [tokens[place : place + 1] for place in range(len(tokens))]
            line.logits += [None] * len(tokens)

    def _check(self, lines: Sequence[Line], level: int, known: Sequence[int]) -> None:
        """Settles the tokens behind the first `known` of each line; where there are none, draws one."""
        target = self._shaped(lines, level, known)
        leaders = [line.leader for line in lines]
        temperature = self._shape.temperature(leaders)
        numbers = [len(line.tokens) - first for line, first in zip(lines, known, strict=True)]
        rows = target.split([number + 1 for number in numbers])
        if not any(numbers):
            drawn = self._dice.draw(target, leaders, temperature)
            for line, token, row in zip(lines, drawn.split(1), rows, strict=True):
                line.tokens.append(token)
                line.logits.append(row[0])
            return
        drafted = [
            _certain(token, target) if row is None else row
            for line, first in zip(lines, known, strict=True)
            for token, row in zip(line.tokens[first:], line.logits[first:], strict=True)
        ]
        settled = self._dice.settle(
            target,
            torch.stack(drafted),
            torch.cat([line.ahead(len(line.tokens))[f:] for line, f in zip(lines, known, strict=True)]),
            numbers,
            leaders,
            temperature,
        )
        for line, first, accepted, token, row in zip(
            lines, known, settled.accepted.tolist(), settled.following.split(1), rows, strict=True
        ):
            kept = first + accepted
            line.tokens[kept:] = [token]
            line.logits[first:] = list(row[: accepted + 1])
            line.shown = {member: min(number, kept + 1) for member, number in line.shown.items()}

    def _shaped(self, lines: Sequence[Line], level: int, known: Sequence[int]) -> torch.Tensor:
        """float32 ``[positions, vocab]``: the level's formula behind each token of a line from `known` on."""
        rows, firsts, counts, inputs = [], [], [], []
        pipelines, batch_rows, leaders, ahead = [], [], [], []
        total = 0
        for line, first in zip(lines, known, strict=True):
            tag = line.group.tag
            routine = routine_of(tag.drafts[level])
            tokens = torch.cat([line.last, *line.tokens])
            places = {}
            for member in routine.members:
                # What levels above have added without this member, it has not seen.
                begin = min(first, line.shown.get(member, 0))
                places[member] = total + first - begin
                if tag.names:
                    FIGURES.calls[tag.label, tag.names[member]] += 1
                rows.append(line.group.rows[member])
                firsts.append(line.lengths[member] - 1 + begin)
                counts.append(len(tokens) - begin)
                inputs.append(tokens[begin:])
                total += len(tokens) - begin
                line.shown[member] = len(tokens)
            for offset in range(len(tokens) - first):
                dials = line.group.schedules(routine, line.lengths[0], first + offset)
                pipelines.append(pipeline_of(tag.drafts[level], dials))
                # A row that the routine does not read stands for itself.
                some = min(places.values())
                batch_rows.append([places.get(m, some) + offset for m in range(routine.terms)])
                leaders.append(line.leader)
                ahead.append(line.ahead(first + offset))
        logits = self._forward(rows, firsts, counts, torch.cat(inputs))
        shaped = self._shape(self._batch(pipelines, batch_rows, logits).run(logits).logits, leaders, ahead)
        # A model that answers with NaN proposes anything; what becomes of its group, the formula's own rows
        # decide.
        sound = shaped.amax(-1, keepdim=True).isfinite()
        return torch.where(sound, shaped, 0.0)

    def _batch(
        self, pipelines: Sequence[Any], rows: Sequence[Sequence[int]], logits: torch.Tensor
    ) -> marith_kernels.StagedBatch:
        """One token after the other is drafted by the same formulas on the same rows: told once a round."""
        key = tuple(map(id, pipelines)), tuple(map(tuple, rows))
        if key not in self._batches:
            # The pipelines live as long as what they are known by.
            batch = marith_kernels.StagedBatch.build(pipelines, rows, logits.device)
            self._batches[key] = pipelines, batch
        return self._batches[key][1]


def lengths_of(group: JointGroup) -> list[int]:
    """How many tokens each of a group's partial formulas drafts; those that are copied come before."""
    return group.tag.draft_lengths[-len(group.tag.drafts) :]


def _certain(token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Logits ``[vocab]`` from which only this token can be drawn."""
    return torch.full_like(like[0], -torch.inf).index_fill_(0, token, 0.0)


def _left(line: Line, goal: int) -> int:
    return max(0, goal - len(line.tokens))

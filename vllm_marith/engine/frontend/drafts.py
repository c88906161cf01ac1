"""Speculation at admission: what the core and the workers are told of the levels that draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_marith.language import Formula, FormulaError, FormulaRequest
from vllm_marith.plan import Plan, Speculation, encode, lower

from ..group import Drafter


@dataclass(frozen=True)
class Drafts:
    """How a formula is drafted, ready to run.

    Attributes:
        plan: of the formula; its rows are those of all terms that run, the ones that only draft last.
        levels: plans of the levels, over the same rows.
        lengths: as in `vllm_marith.plan.Speculation`.
        drafter: as in `vllm_marith.engine.group.GroupSpec`.
        adaptive: the lengths are upper bounds.
        own: how many of the plan's rows the formula itself reads.
        demanded: the request gave the number of tokens itself: not to draft would be against its word.
    """

    plan: Plan
    levels: tuple[Plan, ...]
    lengths: tuple[int, ...]
    drafter: Drafter
    adaptive: bool
    demanded: bool
    own: int

    @classmethod
    def of(cls, formula: Formula, speculation: Speculation, *, adaptive: bool, demanded: bool) -> Drafts:
        """The plans of a formula and of its levels."""
        own = lower(formula).terms
        rows = own + speculation.drafters
        return cls(
            lower(formula, rows),
            tuple(lower(level.formula, rows) for level in speculation.levels),
            speculation.lengths,
            speculation.free or "formula",
            adaptive,
            demanded,
            len(own),
        )

    def of_group(self, member_of: Sequence[int]) -> dict[str, Any]:
        """The fields of a `GroupSpec`; member_of: for each row of the plans the member that it is."""
        return {
            "drafts": [encode(plan, member_of) for plan in self.levels],
            "draft_lengths": list(self.lengths),
            "drafter": self.drafter,
            "adaptive": self.adaptive,
            "only_draft": max(member_of) - max(member_of[: self.own]),
        }


def only_where_possible(
    drafts: Drafts | None, asked: FormulaRequest, *, scored: bool, explained: bool, seeded: bool
) -> Drafts | None:
    """`drafts`, unless something else that a request asks for stands against it.

    A seed does where the machine's speed would decide what is drafted: its answer must not depend on that.

    Raises:
        FormulaError: the request itself gave the number of tokens to draft.
    """
    if drafts is None:
        return None
    for against, what in (
        (asked.constraints is not None, "constraints"),
        (explained, "an explanation of the tokens"),
        (scored, "log-probabilities of the prompt"),
    ):
        if against and drafts.demanded:
            raise FormulaError(f"'speculative' is {asked.speculative}, which cannot be combined with {what}")
        if against:
            return None
    return None if seeded and drafts.adaptive else drafts

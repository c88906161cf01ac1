"""The end of a round: drafts against the formula's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .dice import Dice
from .drafting import Draft, Shape

NO_TOKEN = -1
"""vLLM's mark for places of a step's tokens that hold none."""


@dataclass(frozen=True)
class Check:
    """A group whose drafts are checked in this step.

    Attributes:
        leader: its leader's request row.
        rows: ``[positions]``, its formula's rows of logits: one more than vLLM scheduled drafts.
        draft: what it had proposed.

    vLLM may have scheduled fewer drafts than were proposed: because there was no room, or because a grammar
    forbids one.  The first of the others is checked all the same, against the last row.  That is right in
    both cases, and necessary in the second: there the draft is rejected for certain, and its place is drawn
    from max(0, P - P_0).  Drawn from P, tokens that P_0 likes would come too often.
    """

    leader: int
    rows: Sequence[int]
    draft: Draft

    @property
    def checked(self) -> int:
        return min(len(self.draft.tokens), len(self.rows))


def settle(
    logits: torch.Tensor, checks: Sequence[Check], shape: Shape, dice: Dice, width: int
) -> torch.Tensor:
    """int64 ``[groups, width]``: the tokens that each group generates in this step, then `NO_TOKEN`.

    Args:
        logits: ``[rows, vocab]`` of the step, the formula in the leaders' rows, grammar applied.
        width: the most positions that any request of the step has.
    """
    device = logits.device
    leaders = [check.leader for check in checks]
    picked = torch.tensor([row for check in checks for row in check.rows], device=device)
    owners = [check.leader for check in checks for _ in check.rows]
    ahead = [check.draft.tokens[:place] for check in checks for place in range(len(check.rows))]
    shaped = shape(logits.index_select(0, picked), owners, ahead)
    target = []
    for check, rows in zip(checks, shaped.split([len(check.rows) for check in checks]), strict=True):
        target.append(rows[: check.checked + 1])
        if check.checked == len(check.rows):
            target.append(rows[-1:])  # nothing is drawn from it: there is no place behind the last row
    settled = dice.settle(
        torch.cat(target),
        torch.cat([check.draft.logits[: check.checked] for check in checks]),
        torch.cat([check.draft.tokens[: check.checked] for check in checks]),
        [check.checked for check in checks],
        leaders,
        shape.temperature(leaders),
    )
    places = torch.arange(width, device=device)
    drafted = torch.stack(
        [torch.nn.functional.pad(check.draft.tokens, (0, width))[:width] for check in checks]
    )
    accepted = settled.accepted[:, None]
    found = torch.where(places < accepted, drafted, NO_TOKEN)
    found = torch.where(places == accepted, settled.following[:, None], found)
    room = torch.tensor([len(check.rows) for check in checks], device=device)[:, None]
    return torch.where(places < room, found, NO_TOKEN)

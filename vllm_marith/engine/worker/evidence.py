"""Why a token was chosen: what each term said about it, kept in the worker until a frontend asks.

Only for requests that want it.  A frontend fetches with ``collective_rpc`` while the answer is on its
way: tokens travel as they always do, and what explains them has no place in vLLM's outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

_KEPT_REQUESTS = 256
"""Requests whose evidence is kept; a client that never comes back leaves one behind."""


class Token(NamedTuple):
    """One generated token and the formula's next best.

    Attributes:
        ids: int64 ``[2]``, the chosen token and the runner-up.
        logprobs: float32 ``[2, members + 1]``, of each member and, last, of the formula.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor


class Evidence:
    """The tokens of the last requests that asked to be explained."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[str, list[Token]] = OrderedDict()

    def add(self, key: str, token: Token) -> None:
        self._tokens.setdefault(key, []).append(token)
        while len(self._tokens) > _KEPT_REQUESTS:
            self._tokens.popitem(last=False)

    def fetch(self, key: str, since: int, last: bool) -> list[tuple[list[int], list[list[float]]]]:
        """(ids, logprobs) of a request's tokens from number `since`, as plain data.

        last: the request has ended, and nobody will ask again.
        """
        tokens = self._tokens.pop(key, []) if last else self._tokens.get(key, [])
        return [(token.ids.tolist(), token.logprobs.tolist()) for token in tokens[since:]]


EVIDENCE = Evidence()
"""This worker process's."""


class Witness:
    """Sees one group's rows through a step: `before` and `after` the fusion, then the token `sampled`.

    The rows are copied, because the fusion and the sampler work in place.

    Args:
        key: of the request.
        rows: of logits of the group's members, leader first.
        request: the leader's request row.
    """

    def __init__(self, key: str, rows: Sequence[int], request: int) -> None:
        self.key = key
        self.rows = list(rows)
        self.request = request
        self._members: torch.Tensor | None = None  # [members, vocab]
        self._formula: torch.Tensor | None = None  # [1, vocab]

    def before(self, logits: torch.Tensor) -> None:
        """logits: ``[rows, vocab]`` of the step, not fused."""
        self._members = logits[self.rows].float()

    def after(self, logits: torch.Tensor) -> None:
        """logits: ``[rows, vocab]``, the formula in its leader's row."""
        self._formula = logits[self.rows[:1]].float()

    def sampled(self, sampled: torch.Tensor) -> None:
        """sampled: ``[rows, 1]``, the step's tokens."""
        members, formula = self._members, self._formula
        if members is None or formula is None:
            return
        self._members = self._formula = None
        chosen = sampled[self.request, :1].to(torch.int64)
        best = formula[0].topk(2).indices
        runner_up = torch.where(best[:1] == chosen, best[1:], best[:1])
        ids = torch.cat([chosen, runner_up])
        logprobs = torch.cat([members, formula]).log_softmax(-1)[:, ids].T
        EVIDENCE.add(self.key, Token(ids, logprobs))

"""The formula's log-probabilities of a prompt: log P(x_k | x_<k), every term behind its own beginning.

All members' prompts end with the same tokens x_1 ... x_n, which the leader's prompt is made of but for its
first token.  The members are computed in chunks that have nothing to do with each other, so the hidden states
in front of x_1 ... x_n are kept as they come, n rows of its model's width for each member, and never logits.
In the step in which the group samples its first token all of them are there: the head then runs over a few
positions of all members at a time, and each position is fused like a step of a group of its own.

vLLM computes the leader's plain log-probabilities on its way; ours take their place.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import marith_kernels
import torch
from vllm.v1.outputs import LogprobsTensors

from ..group import KEY, Cause, Failure, MemberTag
from .constituents.models import Constituents
from .head import Head
from .pipelines import pipeline_of
from .rows import JointGroup

Heads = Callable[[Sequence[int], Sequence[torch.Tensor]], torch.Tensor | None]
"""(constituents, hidden states ``[n, size]`` of each) -> logits ``[n of all, vocab]``, in their order."""

Gather = Callable[[torch.Tensor, torch.Tensor], LogprobsTensors]
"""(logits ``[n, vocab]``, tokens ``[n]``) -> candidates, their scores and the tokens' ranks."""

ROWS = 512
"""Rows of logits that the head makes at a time."""

RAW_LOGITS = ("raw_logits", "processed_logits")
"""Values of vLLM's ``logprobs_mode`` under which logits stand in place of log-probabilities."""


class PromptScorer:
    """The hidden states of a worker's scored groups, from their first chunk to their scores."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._hidden: dict[str, torch.Tensor] = {}  # request id -> [n, size]
        self._constituents: dict[str, int] = {}
        self._failures: dict[str, Failure] = {}

    def keep(self, request_id: str, tag: MemberTag, length: int, start: int, hidden: torch.Tensor) -> None:
        """Keeps what a step has computed of one member's prompt.

        Args:
            length: tokens of the member's prompt.
            start: position of the first of `hidden`.
            hidden: ``[tokens, size]``, the step's hidden states of this request.
        """
        scored = tag.prompt_length - 1
        kept = self._hidden.get(request_id)
        if kept is None:
            kept = self._hidden[request_id] = hidden.new_empty(scored, hidden.shape[1])
            self._constituents[request_id] = tag.constituent
        first = length - 1 - scored  # position whose hidden state gives x_1
        low, high = max(start, first), min(start + len(hidden), length - 1)
        if low < high:
            kept[low - first : high - first] = hidden[low - start : high - start]

    def forget_all_but(self, request_ids: Container[str]) -> None:
        """Lets go of requests that ended without having been scored."""
        for request_id in [kept for kept in self._hidden if kept not in request_ids]:
            del self._hidden[request_id], self._constituents[request_id]

    def score(self, group: JointGroup, heads: Heads, tokens: torch.Tensor, gather: Gather) -> LogprobsTensors:
        """The group's scores, whose hidden states are let go.

        Args:
            heads: the models' ``compute_logits``, without formulas.
            tokens: int64 ``[n]``, x_1 ... x_n on the device.
            gather: the model runner's own way from logits to what a request asked for.

        Returns:
            What `gather` returns for all n positions, on the CPU.
        """
        members = [self._hidden.pop(request_id) for request_id in group.ids]
        constituents = [self._constituents.pop(request_id) for request_id in group.ids]
        pipeline = pipeline_of(group.tag.routine, ())
        step = max(1, ROWS // len(members))
        found = []
        largest = torch.full((), -torch.inf, device=self.device)
        for begin in range(0, len(tokens), step):
            chunk = tokens[begin : begin + step]
            logits = heads(constituents, [hidden[begin : begin + step] for hidden in members])
            assert logits is not None  # ranks that have no logits are never asked for scores
            largest = torch.maximum(largest, logits.amax().float())  # NaN where any logit is
            rows = [range(i, len(members) * len(chunk), len(chunk)) for i in range(len(chunk))]
            batch = marith_kernels.StagedBatch.build([pipeline] * len(chunk), rows, self.device)
            found.append(gather(batch.run(logits).logits, chunk))
        scores = LogprobsTensors(
            torch.cat([part.logprob_token_ids for part in found]).cpu(),
            torch.cat([part.logprobs for part in found]).cpu(),
            torch.cat([part.selected_token_ranks for part in found]).cpu(),
        )
        if not largest < torch.inf or scores.logprobs.isnan().any():
            reason = "a position of its prompt has no distribution"
            self._failures[group.tag.group] = Cause.LOGITS, reason
        return scores

    def add_failures(self, failures: Mapping[str, Failure] | None) -> Mapping[str, Failure] | None:
        """A step's failures, which may be None, with those of the groups that were scored in it.

        Scores were waited for, so where there are failures here, those of the step may be read, too.
        """
        own, self._failures = self._failures, {}
        return failures if not own else own if failures is None else own | dict(failures)


def heads_of(model: Any, head: Head) -> Heads:
    """The heads of a worker's models; head: ``compute_logits`` of the one model, where it is one."""
    if isinstance(model, Constituents):
        return model.heads
    return lambda constituents, hidden: head(torch.cat(list(hidden)))


def scored_tag(extra_args: dict[str, Any] | None) -> MemberTag | None:
    """The tag of a member of a scored group, None for all other requests."""
    wire = (extra_args or {}).get(KEY)
    return MemberTag.from_wire(wire) if wire and wire["scored"] else None

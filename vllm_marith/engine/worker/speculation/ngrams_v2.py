"""What vLLM's n-gram proposer drafts on the V2 model runner: for an operator, and for partial formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds

from .drafting import Line

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from ..rows import JointGroup, RowPlan

_NOTHING = -1  # instead of a token that follows


class NgramRounds:
    """Drafts of an operator's own n-grams: plain requests have theirs, groups those of their leaders.

    vLLM's rejection sampler checks them: they were not drawn from any distribution, and it is exact for
    them.
    """

    def __init__(self) -> None:
        self._runner: Any = None
        self._joint: Sequence[JointGroup] = ()  # of the step

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        """Before the runner's inputs are prepared."""
        self._runner = runner
        self._joint = ()
        runner.speculator.marith_rounds = self

    def map_adapters(self, batch: InputBatch) -> None:
        """Names the adapter of every row of logits; V2 names one a request, however many drafts it checks."""
        runner = self._runner
        if runner is None or runner.lora_config is None or not batch.num_draft_tokens:
            return
        adapters = runner.lora_state.lora_ids[batch.idx_mapping_np]
        runner._set_active_loras(
            tuple(adapters.repeat(np.diff(batch.cu_num_logits_np))),
            tuple(adapters.repeat(batch.num_scheduled_tokens)),
            runner.lora_state.get_activate_loras(batch.req_ids),
        )

    def sample(
        self,
        plan: RowPlan,
        draw: Callable[[torch.Tensor, InputBatch], Any],
        logits: torch.Tensor,
        batch: InputBatch,
    ) -> Any:
        """What vLLM's sampler gives for a step with groups.

        Args:
            draw: vLLM's sampler, or its rejection sampler where the step has drafts.
            logits: ``[rows, vocab]``, formulas in their leaders' rows, grammar applied.
        """
        self._joint = plan.joint
        return draw(logits, batch)

    def propose(
        self, batch: InputBatch, num_sampled: torch.Tensor, ngrams: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """int64 ``[requests, most]``: drafts, the same for all members of a group.

        Args:
            num_sampled: ``[requests]``, how many tokens each generated in this step.
            ngrams: vLLM's own proposals for all requests.
        """
        drafts = ngrams()
        pairs = [(row, group.rows[0]) for group in self._joint for row in group.rows[1:]]
        if pairs:
            followers, leaders = torch.tensor(pairs, device=drafts.device).T
            drafts.index_copy_(0, followers, drafts.index_select(0, leaders))
        return drafts

    def take_drafts(self, found: DraftTokenIds | None) -> DraftTokenIds | None:
        """What the scheduler is told of the step's drafts; found: what vLLM would tell it."""
        return found


class CopyV2:
    """See `drafting.Copy`: by vLLM's own n-gram proposer.

    It reads the runner's table of all requests' tokens, in which what a line has proposed so far does not
    stand: it is given another table, of the lines.

    Args:
        runner: vLLM's ``GPUModelRunner``.
        batch: the step's, whose rows are meant.
    """

    def __init__(self, runner: Any, batch: InputBatch) -> None:
        self._runner = runner
        self._batch = batch

    def __call__(self, lines: Sequence[Line], numbers: Sequence[int]) -> list[torch.Tensor]:
        device, count = self._runner.device, len(lines)
        lengths = [line.lengths[0] + len(line.tokens) for line in lines]
        slots = torch.from_numpy(self._batch.idx_mapping_np[[line.leader for line in lines]]).to(device)
        texts = self._runner.req_states.all_token_ids.gpu[:, : max(lengths)].index_select(0, slots)
        for text, line, length in zip(texts, lines, lengths, strict=True):
            text[line.lengths[0] : length] = line.ahead(len(line.tokens))
        proposer = copy.copy(self._runner.speculator)
        proposer.marith_rounds = None  # vLLM's own method is meant
        proposer.req_states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=texts),
            total_len=SimpleNamespace(gpu=torch.tensor(lengths, dtype=torch.int32, device=device)),
        )
        there = SimpleNamespace(num_reqs=count, idx_mapping=torch.arange(count, device=device))
        found = proposer.propose(
            there,
            *(None,) * 4,
            num_sampled=torch.ones(count, dtype=torch.int32, device=device),
            num_rejected=None,
            last_sampled=torch.full((count, 1), _NOTHING, device=device),  # what it fills up with
            next_prefill_tokens=None,
            temperature=None,
            seeds=None,
        )
        known = (found != _NOTHING).sum(1).tolist()
        return [
            tokens[: min(some, number)].clone()
            for tokens, some, number in zip(found, known, numbers, strict=True)
        ]

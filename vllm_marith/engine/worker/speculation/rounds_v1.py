"""Rounds of speculative sampling on vLLM's V1 model runner.

::

    sample_tokens:  fuse ─▶ grammar mask ─▶ _sample: vLLM's rejection sampler, then SETTLE ─▶ tie
                    ─▶ bookkeeping ─▶ propose_draft_token_ids: DRAFT ─▶ scheduler

vLLM's own rejection sampler serves the requests that it drafted for itself, and formulas whose drafts are
its n-gram or suffix proposer's: those were not drawn from any distribution, and it is exact for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput

from ...group import DRAFTS, Wanted
from .dice import Dice
from .drafting import Draft, Drafter, Line
from .forward_v1 import ForwardV1
from .shape_v1 import ShapeV1
from .verification import NO_TOKEN, Check, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..rows import RowPlan


class Rounds:
    """The drafts of a worker's groups, from one step to the next.

    Args:
        runner: vLLM's ``GPUModelRunner``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._shape = ShapeV1(runner)
        self._forward = ForwardV1(runner)
        self._drafts: dict[str, Draft] = {}  # by group

    # ------------------------------------------------------------------- settling

    def sample(self, plan: RowPlan, sample: Any, logits: torch.Tensor, metadata: Any) -> SamplerOutput:
        """What vLLM's ``_sample`` gives, with the tokens of drafting groups in their leaders' rows.

        Args:
            sample: vLLM's function of (logits, metadata).
            logits: ``[rows, vocab]``, formulas in their leaders' rows, grammar applied.
            metadata: vLLM's ``SpecDecodeMetadata``.
        """
        checks = self._checks(plan)
        if not checks:
            return sample(logits, metadata)
        batch = self._runner.input_batch
        width = metadata.max_spec_len + 1
        drafting = {row for group, _ in checks for row in group.rows}
        discarded = self._runner.discard_request_mask.np
        others = [r for r in range(batch.num_reqs) if r not in drafting and not discarded[r]]
        found = [check for _, check in checks]
        dice = Dice(logits.device, batch.sampling_metadata.generators)
        tokens = settle(logits, found, self._shape, dice, width)
        asks_logprobs = batch.sampling_metadata.max_num_logprobs is not None
        if others:
            with self._without_generators([check.leader for check in found]):
                output = sample(logits.clone() if asks_logprobs else logits, metadata)
            sampled = output.sampled_token_ids
        else:
            sampled = torch.full((batch.num_reqs, width), NO_TOKEN, device=logits.device, dtype=torch.int32)
            sampled[:, 0] = 0  # of rows whose sample is thrown away
            output = SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
        leaders = torch.tensor([check.leader for check in found], device=logits.device)
        sampled.index_copy_(0, leaders, tokens.to(sampled.dtype))
        if asks_logprobs:
            output = replace(output, logprobs_tensors=self._logprobs(plan, logits, metadata, sampled))
        return output

    def _checks(self, plan: RowPlan) -> list[tuple[Any, Check]]:
        """The step's groups that have proposed something, and take it from them."""
        lengths = self._runner.input_batch.num_tokens_no_spec
        checks = []
        for group in plan.joint:
            draft = self._drafts.pop(group.tag.group, None)
            leader = group.rows[0]
            # Tokens were taken away or added since: what was proposed follows another text.
            if draft is not None and draft.length == lengths[leader]:
                rows = range(int(plan.starts[leader]), int(plan.starts[leader + 1]))
                checks.append((group, Check(leader, rows, draft)))
        return checks

    @contextmanager
    def _without_generators(self, rows: Sequence[int]) -> Iterator[None]:
        """Keeps vLLM from advancing the seeds of requests whose tokens are decided here."""
        generators = self._runner.input_batch.generators
        hidden = {row: generators.pop(row) for row in rows if row in generators}
        try:
            yield
        finally:
            generators.update(hidden)

    def _logprobs(self, plan: RowPlan, logits: torch.Tensor, metadata: Any, sampled: torch.Tensor) -> Any:
        sampler = self._runner.rejection_sampler
        whole = self._runner.input_batch.sampling_metadata
        if sampler.is_processed_logprobs_mode:
            drafted = metadata.draft_token_ids.split(metadata.num_draft_tokens)
            numbers = enumerate(metadata.num_draft_tokens)
            places = [(row, t) for row, number in numbers for t in range(number + 1)]
            logits = self._shape(logits, [row for row, _ in places], [drafted[row][:t] for row, t in places])
        return sampler._get_logprobs_tensors(
            whole.max_num_logprobs,
            metadata,
            logits,
            logits[metadata.target_logits_indices],
            logits[metadata.bonus_logits_indices],
            sampled,
        )

    # ------------------------------------------------------------------- drafting

    def _copies(self, lines: Sequence[Line], numbers: Sequence[int]) -> list[torch.Tensor]:
        """See `drafting.Copy`: by vLLM's own n-gram proposer."""
        runner = self._runner
        texts = np.zeros((len(lines), runner.max_model_len), np.int32)
        lengths = np.zeros(len(lines), np.int32)
        for place, line in enumerate(lines):
            drafted = line.ahead(len(line.tokens)).tolist()
            known, lengths[place] = line.lengths[0], line.lengths[0] + len(drafted)
            texts[place, :known] = runner.input_batch.token_ids_cpu[line.leader, :known]
            texts[place, known : lengths[place]] = drafted
        found = runner.drafter.propose(max(numbers), [[0]] * len(lines), lengths, texts)
        return [
            torch.tensor(tokens[:number], dtype=torch.int64, device=runner.device)
            for tokens, number in zip(found, numbers, strict=True)
        ]

    def propose(
        self, plan: RowPlan | None, scheduler_output: Any, sampled: Sequence[Sequence[int]]
    ) -> dict[int, list[int]]:
        """Request row -> drafts, of all members of the groups that propose by partial formulas.

        sampled: the tokens that each request generated in this step.
        """
        batch = self._runner.input_batch
        self._drafts = {g: d for g, d in self._drafts.items() if g in self._runner.requests}
        wanted: dict[str, Wanted] = getattr(scheduler_output, DRAFTS, {})
        lines = []
        for group in plan.joint if plan else ():
            asked, new = wanted.get(group.tag.group), len(sampled[group.rows[0]])
            number = asked.after(new) if asked and new and group.tag.drafts else 0
            if number:
                last = torch.tensor([sampled[group.rows[0]][-1]], device=self._runner.device)
                lengths = [int(batch.num_tokens_no_spec[row]) for row in group.rows]
                lines.append(Line(group, lengths, last, number))
        if not lines:
            return {}
        dice = Dice(self._runner.device, batch.sampling_metadata.generators)
        drafter = Drafter(self._forward, self._shape, dice, self._copies)
        proposals: dict[int, list[int]] = {}
        for line, draft in zip(lines, drafter.propose(lines), strict=True):
            self._drafts[line.group.tag.group] = draft
            tokens = draft.tokens.tolist()
            proposals.update((row, list(tokens)) for row in line.group.rows)
        return proposals

"""Rounds of speculative sampling on vLLM's V1 model runner.

::

    sample_tokens:  fuse ─▶ grammar mask ─▶ _sample: vLLM's rejection sampler, then SETTLE ─▶ tie
                    ─▶ bookkeeping ─▶ propose_draft_token_ids: DRAFT ─▶ scheduler

vLLM's own rejection sampler serves the requests that it drafted for itself, and formulas whose drafts
are copied text: n-grams or suffixes, which were not drawn from any distribution, and it is exact for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

from vllm_marith.language.names import NGRAM, SUFFIX

from ...group import DRAFTS, Wanted
from ...settings import Settings
from .dice import Dice
from .drafting import Draft, Drafter, Line
from .forward_v1 import ForwardV1
from .shape_v1 import ShapeV1
from .suffixes import Suffixes, trees
from .verification import NO_TOKEN, Check, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..rows import JointGroup, RowPlan


def compile_ngrams(config: Any) -> None:
    """Compiles vLLM's n-gram proposer where it drafts.

    vLLM means to, but asks for no request's n-grams; so it would compile under the first request that drafts,
    for more than a second.
    """
    asked = config.speculative_config
    if asked is not None and asked.method == NGRAM:
        NgramProposer(config).propose(1, [[0]], np.full(1, 2, np.int32), np.zeros((1, 2), np.int32))


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
        """See `drafting.Copy`: by vLLM's own n-gram proposer, or by suffixes."""
        ahead = [line.ahead(len(line.tokens)).tolist() for line in lines]
        ngrams = [place for place, line in enumerate(lines) if line.group.tag.drafter == NGRAM]
        found = [
            [] if place in ngrams else self._suffixes.propose(line.group.ids[0], tokens, number)
            for place, (line, tokens, number) in enumerate(zip(lines, ahead, numbers, strict=True))
        ]
        if ngrams:
            texts = [(lines[place], ahead[place]) for place in ngrams]
            proposed = self._ngrams(texts, max(numbers[place] for place in ngrams))
            for place, tokens in zip(ngrams, proposed, strict=True):
                found[place] = tokens[: numbers[place]]
        device = self._runner.device
        return [torch.tensor(tokens, dtype=torch.int64, device=device) for tokens in found]

    def _ngrams(self, texts: Sequence[tuple[Line, list[int]]], number: int) -> list[list[int]]:
        """What once followed the last tokens of each line and of what is drafted behind it."""
        lengths = np.array([line.lengths[0] + len(drafted) for line, drafted in texts], np.int32)
        table = np.zeros((len(texts), lengths.max()), np.int32)
        for row, (line, drafted) in zip(table, texts, strict=True):
            known = line.lengths[0]
            row[:known] = self._runner.input_batch.token_ids_cpu[line.leader, :known]
            row[known : known + len(drafted)] = drafted
        found: list[list[int]] = self._runner.drafter.propose(number, [[0]] * len(texts), lengths, table)
        return found

    @cached_property
    def _suffixes(self) -> Suffixes:
        return Suffixes(trees(Settings.of(self._runner.vllm_config).remembered_answers))

    def _follow(self, group: JointGroup) -> None:
        """Takes in what the step has added to a text for which suffixes draft, now or later."""
        batch, name, row = self._runner.input_batch, group.ids[0], group.rows[0]

        def read(start: int, stop: int) -> np.ndarray:
            tokens: np.ndarray = batch.token_ids_cpu[row, start:stop]
            return tokens

        length = int(batch.num_tokens_no_spec[row])
        self._suffixes.follow(name, group.tag.prompt_length, length, read, self._runner.requests[name])

    def propose(
        self, plan: RowPlan | None, scheduler_output: Any, sampled: Sequence[Sequence[int]]
    ) -> dict[int, list[int]]:
        """Request row -> drafts, of all members of the groups that draft.

        sampled: the tokens that each request generated in this step.
        """
        batch, requests = self._runner.input_batch, self._runner.requests
        self._drafts = {g: d for g, d in self._drafts.items() if g in requests}
        if "_suffixes" in self.__dict__:
            self._suffixes.forget_all_but(requests)
        wanted: dict[str, Wanted] = getattr(scheduler_output, DRAFTS, {})
        growing, copied = list[Line](), list[Line]()
        for group in plan.joint if plan else ():
            if group.tag.drafter == SUFFIX:
                self._follow(group)
            asked, new = wanted.get(group.tag.group), len(sampled[group.rows[0]])
            number = asked.after(new) if asked and new and group.tag.drafter else 0
            if number:
                last = torch.tensor([sampled[group.rows[0]][-1]], device=self._runner.device)
                lengths = [int(batch.num_tokens_no_spec[row]) for row in group.rows]
                lines = growing if group.tag.drafts else copied
                lines.append(Line(group, lengths, last, number))
        proposals: dict[int, list[int]] = {}
        if copied:
            # The formula checks them with no more ado: vLLM does it.
            copies = self._copies(copied, [line.wanted for line in copied])
            for line, tokens in zip(copied, copies, strict=True):
                proposals.update((row, tokens.tolist()) for row in line.group.rows)
        if growing:
            dice = Dice(self._runner.device, batch.sampling_metadata.generators)
            drafter = Drafter(self._forward, self._shape, dice, self._copies)
            for line, draft in zip(growing, drafter.propose(growing), strict=True):
                self._drafts[line.group.tag.group] = draft
                proposals.update((row, draft.tokens.tolist()) for row in line.group.rows)
        return proposals

"""Rounds of speculative sampling on vLLM's V2 model runner.

::

    execute_model:  BEGIN
    sample_tokens:  fuse ─▶ grammar mask ─▶ vLLM's sampler or rejection sampler, then SETTLE ─▶ tie
                    ─▶ history ─▶ NgramGPUSpeculator.propose: DRAFT
    take_draft_token_ids: TELL

vLLM is configured with its n-gram proposer (`engine.speculation`), whose `propose` is where drafts are made;
it proposes itself for formulas that are drafted by n-grams, and for everybody where an operator has asked for
n-grams himself (`ngrams_v2`); suffixes are the host's (`suffixes`).  V2 without asynchronous scheduling has
every request check as many drafts as there is room for; it is told which have any.

Noise: V2's sampler draws from a request's seed and the token's position, and so do rounds.  The seed is the
same in all tensor-parallel ranks, and answers do not depend on who else is in the batch.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.outputs import DraftTokenIds

from vllm_marith.language.names import NGRAM, SUFFIX

from ... import patches
from ...group import DRAFTS, Wanted
from ...settings import Settings
from .dice import Dice
from .drafting import Draft, Drafter, Line
from .forward_v2 import ForwardV2
from .ngrams_v2 import CopyV2, NgramRounds
from .shape_v2 import ShapeV2
from .suffixes import Suffixes, trees
from .verification import NO_TOKEN, Check, settle

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from ..rows import JointGroup, RowPlan

_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_PROPOSE = "vllm.v1.worker.gpu.spec_decode.ngram.speculator:NgramGPUSpeculator.propose"
_DRAFTING, _SETTLING = 0, 1  # what a request's noise is for


def install() -> None:
    """Wraps the runner's functions; idempotent, once V2's modules are there."""
    patches.patch(f"{_RUNNER}.execute_model", _with_begin)
    patches.patch(f"{_RUNNER}.take_draft_token_ids", _with_own_drafts)
    patches.patch(_PROPOSE, _with_drafts)


def _rounds(runner: Any) -> NgramRounds | None:
    """None where nothing drafts."""
    found: NgramRounds | None = getattr(getattr(runner, "model_state", None), "rounds", None)
    return found


def _with_begin(execute_model: Any) -> Any:
    @functools.wraps(execute_model)
    def executing(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        rounds = _rounds(self)
        if rounds is not None:
            rounds.begin_step(self, scheduler_output)
        return execute_model(self, scheduler_output, *args, **kwargs)

    return executing


def _with_own_drafts(take_draft_token_ids: Any) -> Any:
    @functools.wraps(take_draft_token_ids)
    def taking(self: Any) -> Any:
        found = take_draft_token_ids(self)
        rounds = _rounds(self)
        return found if rounds is None else rounds.take_drafts(found)

    return taking


def _with_drafts(propose: Any) -> Any:
    @functools.wraps(propose)
    def proposing(
        self: Any,
        input_batch: InputBatch,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Any,
        aux_hidden_states: Any,
        num_sampled: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        def ngrams() -> torch.Tensor:
            hidden = last_hidden_states, aux_hidden_states
            found: torch.Tensor = propose(
                self, input_batch, attn_metadata, slot_mappings, *hidden, num_sampled, *args, **kwargs
            )
            return found

        rounds: NgramRounds | None = self.__dict__.get("marith_rounds")
        if rounds is None or kwargs.get("dummy_run"):
            return ngrams()
        return rounds.propose(input_batch, num_sampled, ngrams)

    return proposing


class RoundsV2(NgramRounds):
    """The drafts of a worker's groups, from one step to the next, where formulas draft.

    Args:
        sampler: vLLM's ``Sampler``.
        owners: request -> its constituent.
        most: the most tokens that are drafted at a time.
    """

    def __init__(self, sampler: Any, owners: Mapping[str, int], most: int) -> None:
        super().__init__()
        self._sampler = sampler
        self._owners = owners
        self._most = most
        self._drafts: dict[str, Draft] = {}  # by group
        self._wanted: Mapping[str, Wanted] = {}  # by group, at the end of the step
        self._told: DraftTokenIds | None = None

    def begin_step(self, runner: Any, scheduler_output: Any) -> None:
        super().begin_step(runner, scheduler_output)
        # Not those that are preempted, too: whether a draft is checked must not depend on what it says, and
        # for how many drafts there has to be room may decide who is preempted.
        for request_id in scheduler_output.finished_req_ids:
            self._drafts.pop(request_id, None)
        if "_suffixes" in self.__dict__:
            self._suffixes.forget(scheduler_output.finished_req_ids)
        self._wanted, self._told = getattr(scheduler_output, DRAFTS, {}), None
        scheduler_output.num_spec_tokens_to_schedule = self._most

    # ------------------------------------------------------------------- settling

    def sample(
        self,
        plan: RowPlan,
        draw: Callable[[torch.Tensor, InputBatch], Any],
        logits: torch.Tensor,
        batch: InputBatch,
    ) -> Any:
        """As in `NgramRounds`, with the tokens of drafting groups in their leaders' rows."""
        self._joint = plan.joint
        found = self._checks(plan, batch)
        if not found:
            return draw(logits, batch)
        checks = [check for _, check in found]
        drafted = np.diff(plan.starts) - 1
        drafted[[row for group, _ in found for row in group.rows]] = 0
        if batch.num_draft_tokens and not drafted.any():
            # No draft is vLLM's to check: all other requests are sampled as in any step.
            output = self._sampler(*_without_drafts(logits, batch, plan.starts[:-1]))
            width = max(len(check.rows) for check in checks)
            output.sampled_token_ids = output.sampled_token_ids.repeat(1, width)
        else:
            output = draw(logits, batch)
        device, sampled = logits.device, output.sampled_token_ids
        dice = self._dice(batch, {check.leader: check.draft.length for check in checks}, _SETTLING)
        tokens = settle(logits, checks, ShapeV2(self._sampler, batch, 0), dice, sampled.shape[1])
        numbers = (tokens != NO_TOKEN).sum(1)
        leaders = torch.tensor([check.leader for check in checks], device=device)
        rows = torch.tensor([len(check.rows) for check in checks], device=device)
        sampled.index_copy_(0, leaders, tokens.to(sampled.dtype))
        for kept, values in ((output.num_sampled, numbers), (output.num_rejected, rows - numbers)):
            kept.index_copy_(0, leaders, values.to(kept.dtype))
        if output.logprobs_tensors is not None:
            output.logprobs_tensors = self._logprobs(logits, batch, output)
        return output

    def _checks(self, plan: RowPlan, batch: InputBatch) -> list[tuple[JointGroup, Check]]:
        """The step's groups that have proposed something, which is taken from them."""
        checks = []
        lengths = lengths_of(batch)
        for group in plan.joint:
            draft = self._drafts.pop(group.tag.group, None)
            leader = group.rows[0]
            # Tokens were taken away or added since: what was proposed follows another text.
            if draft is not None and draft.length == lengths[leader]:
                rows = range(int(plan.starts[leader]), int(plan.starts[leader + 1]))
                checks.append((group, Check(leader, rows, draft)))
        return checks

    def _dice(self, batch: InputBatch, lengths: Mapping[int, int], purpose: int) -> Dice:
        """lengths: of the sequences in these rows."""
        device, seeds = batch.idx_mapping.device, self._sampler.sampling_states.seeds.np
        generators = {}
        for row, length in lengths.items():
            key = struct.pack("<qqq", int(seeds[batch.idx_mapping_np[row]]), length, purpose)
            digest = hashlib.blake2b(key, digest_size=8).digest()
            generators[row] = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
        return Dice(device, generators)

    def _logprobs(self, logits: torch.Tensor, batch: InputBatch, output: Any) -> Any:
        """As vLLM's samplers make them."""
        from vllm.config.model import PROCESSED_LOGPROBS_MODES
        from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

        sampler = self._sampler
        local, owners = batch.expanded_local_pos.long(), batch.expanded_idx_mapping
        if sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            logits = sampler.apply_sampling_params(
                logits,
                owners,
                batch.idx_mapping,
                batch.idx_mapping_np,
                batch.positions[batch.logits_indices],
                batch.input_ids[batch.logits_indices],
                batch.expanded_local_pos,
                batch.seq_lens_cpu_upper_bound.numpy(),
            )
        counts = np.diff(batch.cu_num_logits_np)
        rows = torch.from_numpy(np.arange(len(counts)).repeat(counts)).to(logits.device)
        tokens = output.sampled_token_ids[rows, local]
        tokens = torch.where(local < output.num_sampled[rows], tokens, 0)
        drafted = batch.num_draft_tokens > 0
        number, of_request = sampler.get_logprobs_dims(batch.idx_mapping_np, include_token_ids=not drafted)
        return compute_topk_scores(
            logits,
            number,
            tokens,
            batch.cu_num_logits_np.tolist() if drafted else None,
            logprob_token_ids_state=sampler.logprob_token_ids_state,
            expanded_idx_mapping=owners,
            max_per_req_token_ids=of_request,
            logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )

    # ------------------------------------------------------------------- drafting

    def propose(
        self, batch: InputBatch, num_sampled: torch.Tensor, ngrams: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """As in `NgramRounds`.

        What is beyond a request's own drafts, and in the rows of requests without any, is not scheduled.
        """
        states = self._sampler.req_states
        wanted = {g.tag.group: self._wanted[g.tag.group] for g in self._joint if g.tag.group in self._wanted}
        growing, copied, lengths = list[Line](), list[Line](), lengths_of(batch)
        counted = [
            group
            for group in self._joint
            if group.tag.drafter == SUFFIX or (group.tag.drafts and group.tag.group in wanted)
        ]
        if counted:
            # Where the host waits for the device: positions of what is drafted are the host's to choose.
            new = num_sampled[[group.rows[0] for group in counted]].tolist()
            for group, more in zip(counted, new, strict=True):
                slot, asked = int(batch.idx_mapping_np[group.rows[0]]), wanted.get(group.tag.group)
                if group.tag.drafter == SUFFIX:
                    self._follow(group, slot, int(lengths[group.rows[0]]) + more)
                if asked and (number := asked.after(more)):
                    lines = growing if group.tag.drafts else copied
                    last = states.last_sampled_tokens[slot]
                    lines.append(Line(group, [int(lengths[row]) + more for row in group.rows], last, number))
        drafts = num_sampled.new_zeros(batch.num_reqs, self._most, dtype=torch.int64)
        numbers = [0] * batch.num_reqs

        def give(group: JointGroup, tokens: torch.Tensor) -> None:
            drafts[group.rows, : len(tokens)] = tokens
            for row in group.rows:
                numbers[row] = len(tokens)

        copies = self._copies(batch, copied, [line.wanted for line in copied])
        for line, copy in zip(copied, copies, strict=True):
            give(line.group, copy)
        if growing:
            drafter = Drafter(
                ForwardV2(self._runner, self._owners, batch),
                ShapeV2(self._sampler, batch, 2 * self._most + 1),
                self._dice(batch, {line.leader: line.lengths[0] for line in growing}, _DRAFTING),
                functools.partial(self._copies, batch),
            )
            for line, draft in zip(growing, drafter.propose(growing), strict=True):
                self._drafts[line.group.tag.group] = draft
                give(line.group, draft.tokens)
        copying = [g for g in self._joint if g.tag.drafter == NGRAM and not g.tag.drafts]
        copying = [group for group in copying if group.tag.group in wanted]
        if copying:
            found = ngrams()
            for group in copying:
                give(group, found[group.rows[0], : wanted[group.tag.group].number])
        # vLLM's scheduler has to know the tokens for a grammar only.
        unknown = [[NO_TOKEN] * self._most] * batch.num_reqs
        tokens = drafts.tolist() if batch.has_structured_output_reqs else unknown
        told = [row[:number] for row, number in zip(tokens, numbers, strict=True)]
        self._told = DraftTokenIds(batch.req_ids, told)
        return drafts

    @cached_property
    def _suffixes(self) -> Suffixes:
        return Suffixes(trees(Settings.of(self._runner.vllm_config).remembered_answers))

    def _follow(self, group: JointGroup, slot: int, length: int) -> None:
        """Takes in what the step has added to a text for which suffixes draft, now or later."""
        table = self._sampler.req_states.all_token_ids.gpu

        def read(start: int, stop: int) -> np.ndarray:
            tokens: np.ndarray = table[slot, start:stop].cpu().numpy()
            return tokens

        self._suffixes.follow(group.ids[0], group.tag.prompt_length, length, read)

    def _copies(self, batch: InputBatch, lines: Sequence[Line], numbers: Sequence[int]) -> list[torch.Tensor]:
        """See `drafting.Copy`: by vLLM's own n-gram proposer, or by suffixes."""
        found: dict[int, torch.Tensor] = {}
        ngrams = []
        for place, (line, number) in enumerate(zip(lines, numbers, strict=True)):
            if line.group.tag.drafter == NGRAM:
                ngrams.append(place)
                continue
            tokens = self._suffixes.propose(line.group.ids[0], line.ahead(len(line.tokens)).tolist(), number)
            found[place] = torch.tensor(tokens, dtype=torch.int64, device=line.last.device)
        if ngrams:
            copy = CopyV2(self._runner, batch)
            copies = copy([lines[place] for place in ngrams], [numbers[place] for place in ngrams])
            found |= zip(ngrams, copies, strict=True)
        return [found[place] for place in range(len(lines))]

    def take_drafts(self, found: DraftTokenIds | None) -> DraftTokenIds | None:
        """What was proposed in this step, for the scheduler."""
        told, self._told = self._told, None
        return told


def lengths_of(batch: InputBatch) -> np.ndarray:
    """int32 ``[requests]``: tokens of each sequence in front of the first that the step samples."""
    bounds: np.ndarray = batch.seq_lens_cpu_upper_bound.numpy()[: batch.num_reqs]
    return bounds - (np.diff(batch.cu_num_logits_np) - 1)


def _without_drafts(
    logits: torch.Tensor, batch: InputBatch, firsts: np.ndarray
) -> tuple[torch.Tensor, InputBatch]:
    """The step's logits and batch as if no request had drafts.

    firsts: of each request, its first row of logits.
    """
    index = torch.from_numpy(firsts).to(logits.device)
    number = batch.num_reqs
    return logits.index_select(0, index), replace(
        batch,
        expanded_idx_mapping=batch.idx_mapping,
        expanded_local_pos=batch.expanded_local_pos.new_zeros(number),
        logits_indices=batch.logits_indices.index_select(0, index),
        cu_num_logits=torch.arange(number + 1, device=logits.device, dtype=batch.cu_num_logits.dtype),
        cu_num_logits_np=np.arange(number + 1, dtype=batch.cu_num_logits_np.dtype),
        num_draft_tokens=0,
        num_draft_tokens_per_req=None,
    )

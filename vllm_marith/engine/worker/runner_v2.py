"""Fusion and tie on vLLM's V2 model runner.

Order within ``GPUModelRunner.sample``::

    compute_logits ─▶ FUSE ─▶ grammar mask ─▶ Sampler: bias, penalties, T, top-k/p, token, log-probs ─▶ TIE

so that whatever a request asks of the sampler acts on the formula's distribution, once.  Both ends
hang on one seam of vLLM's own: the *model state*, which it makes for every model right after loading
it and asks on the way for everything that is particular to the model.

    add_request / remove_request    who is a member of which group; a resumed request comes as a new one
    prepare_inputs                  the step's batch, whose rows are in another order every time
    model.compute_logits            wrapped on the model that the state was made for: FUSE
    custom_sampler                  the samplers in wrappers: TIE

``GPUModelRunner.sample_tokens`` is wrapped, too: its output reports the groups that failed.  What drafts
take besides is in `speculation.rounds_v2`.

Noise: the V2 sampler draws Gumbel noise from a request's seed and the token's position in its own
sequence.  A formula's token is drawn in its leader's row, with the leader's seed and position, so other
terms' prompts do not matter to it, and a formula of one term draws the tokens of the plain request.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from .. import patches
from ..group import FAILURES, KEY, Failure, MemberTag, constituent_of
from ..settings import Settings
from .answers import CONTEXT, Answers, Continuation
from .classifiers.loading import load_classifiers
from .classifiers.rows import ClassifierRows
from .constituents.models import Constituents
from .head import Head, obeys_law
from .rows import RowPlan, RowPlans, ban, failing_all
from .scoring import RAW_LOGITS, PromptScorer, heads_of, scored_tag
from .speculation.ngrams_v2 import NgramRounds
from .speculation.rounds_v2 import RoundsV2, lengths_of
from .speculation.rounds_v2 import install as install_rounds

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState as ModelState
    from vllm.v1.worker.gpu.states import RequestState
else:
    ModelState = object

logger = init_logger(__name__)

_RESOLVE = "vllm.v1.worker.gpu.model_states:resolve_model_state_cls"
_SAMPLE_TOKENS = "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens"
_SCORES = "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs"


def install() -> None:
    """Makes vLLM's model states ours; idempotent, once per worker process, before the model is loaded."""
    patches.patch(_RESOLVE, _with_formulas)
    patches.patch(_SCORES, _with_scores)


def installed() -> bool:
    """Whether models loaded in this process serve formulas."""
    return patches.is_patched(_RESOLVE)


def _with_formulas(resolve_model_state_cls: Any) -> Any:
    @functools.wraps(resolve_model_state_cls)
    def resolve(vllm_config: Any, model: Any) -> type[ModelState]:
        found = resolve_model_state_cls(vllm_config, model)
        # A plain engine may start later in the same process.
        return _over(found) if _named(vllm_config) else found

    return resolve


def _with_failures(sample_tokens: Any) -> Any:
    @functools.wraps(sample_tokens)
    def reporting(self: Any, grammar_output: Any) -> Any:
        output = sample_tokens(self, grammar_output)
        if isinstance(self.model_state, FormulaState):
            if self.kv_block_zeroer is None:
                self._init_kv_zero_meta()  # for `_get_new_block_ids_to_zero` of the scheduler
            # Asynchronous output carries what the scheduler gets in the end.
            failures = self.model_state.groups.take_failures()
            if failures is not None:
                setattr(getattr(output, "model_runner_output", output), FAILURES, failures)
        return output

    return reporting


def _with_scores(compute_prompt_logprobs: Any) -> Any:
    @functools.wraps(compute_prompt_logprobs)
    def scored(
        self: Any, logits_fn: Any, hidden_states: torch.Tensor, input_batch: InputBatch, *args: Any
    ) -> Any:
        found = compute_prompt_logprobs(self, logits_fn, hidden_states, input_batch, *args)
        groups: StepGroups | None = getattr(logits_fn, "marith_groups", None)
        if groups is None or not self.in_progress_prompt_logprobs:
            return found
        all_token_ids, _, prompt_lengths = args
        scorer = groups.scorer
        scorer.forget_all_but(groups.members)
        starts = input_batch.query_start_loc_np
        for row, request_id in enumerate(input_batch.req_ids):
            tag = scored_tag(groups.members.get(request_id))
            length = int(prompt_lengths[input_batch.idx_mapping_np[row]])
            if tag is not None and length == input_batch.prefill_len_np[row]:  # else it was scored before
                begin = int(input_batch.num_computed_prefill_tokens_np[row])
                several = isinstance(groups.model, Constituents)
                part = (
                    groups.model.states_of(row) if several else hidden_states[starts[row] : starts[row + 1]]
                )
                scorer.keep(request_id, tag, length, begin, part)
        for group in groups.plans.groups:
            leader = group.ids[0]
            if group.tag.scored and leader in found:
                index = input_batch.idx_mapping_np[group.rows[0]]
                ids = all_token_ids[index, 1 : group.tag.prompt_length].long()
                asked = int(self.num_prompt_logprobs[index])
                gather = functools.partial(_gather, self.logprobs_mode in RAW_LOGITS, asked)
                found[leader] = scorer.score(group, heads_of(groups.model, logits_fn), ids, gather)
        return found

    return scored


def _gather(raw: bool, asked: int, logits: torch.Tensor, tokens: torch.Tensor) -> Any:
    from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

    number = logits.shape[1] if asked == -1 else asked
    return compute_topk_scores(logits, number, tokens, logits_mode=raw)


def _named(vllm_config: Any) -> bool:
    from ..processor import FormulaLogitsProcessor as Ours

    name = f"{Ours.__module__}:{Ours.__qualname__}"
    return any(p in (Ours, name) for p in vllm_config.model_config.logits_processors or ())


def _combines(vllm_config: VllmConfig, head: Head, device: torch.device) -> bool:
    """Whether linear formulas are applied before this model's head: asked for, and lawful."""
    if not Settings.of(vllm_config).combine_hidden_states:
        return False
    model = vllm_config.model_config
    if vllm_config.lora_config is not None:
        logger.warning("marith: combine_hidden_states is off: an adapter may sit on the head")
        return False
    if Settings.of(vllm_config).constituents:
        logger.warning("marith: combine_hidden_states is off: constituents have heads of their own")
        return False
    assert isinstance(model.dtype, torch.dtype)
    if not obeys_law(head, model.get_hidden_size(), model.dtype, device):
        logger.warning("marith: combine_hidden_states is off: this model's head is not affine")
        return False
    return True


@functools.cache
def _over(base: type[ModelState]) -> type[ModelState]:
    return type(f"Formula{base.__name__}", (FormulaState, base), {"__module__": __name__})


class FormulaState(ModelState):
    """Mixin over the model state class that vLLM resolved."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        patches.patch(_SAMPLE_TOKENS, _with_failures)  # V2's module is there by now
        compute_logits = model.compute_logits
        self.owners: dict[str, int] = {}  # request -> its constituent
        combines = _combines(vllm_config, compute_logits, device)
        self.groups = StepGroups(device, combines, load_classifiers(vllm_config, device), model)
        self.rounds: NgramRounds | None = None  # where there are drafts
        self._own_drafts = Settings.of(vllm_config).speculates
        self._drafts = vllm_config.speculative_config
        if self._drafts is not None:
            install_rounds()

        @functools.wraps(compute_logits)
        def fused(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | None:
            def head(rows: torch.Tensor) -> torch.Tensor | None:
                return compute_logits(rows, *args, **kwargs)

            return self.groups.compute_logits(head, hidden_states)

        fused.__dict__["marith_groups"] = self.groups  # the way from vLLM's other users of the head to them
        model.compute_logits = fused

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        params = new_req_data.sampling_params
        extra_args = params.extra_args if params else None
        self.groups.add_request(new_req_data.req_id, extra_args)
        self.owners[new_req_data.req_id] = constituent_of(extra_args)
        super().add_request(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        self.groups.remove_request(req_id)
        self.owners.pop(req_id, None)
        super().remove_request(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if isinstance(self.model, Constituents):
            ids = input_batch.req_ids
            # A dummy batch's requests were never added.
            if all(i in self.owners for i in ids):
                counts = input_batch.num_scheduled_tokens[: len(ids)].tolist()
                drafted = (np.diff(input_batch.cu_num_logits_np) - 1).tolist()
                self.model.router.begin_step([self.owners[i] for i in ids], counts, drafted)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        self.groups.begin_step(input_batch, functools.partial(_answers, input_batch, req_states))
        if self.rounds is not None:
            self.rounds.map_adapters(input_batch)
        return super().prepare_inputs(input_batch, req_states)

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any]:
        sampler, rejection_sampler = super().custom_sampler(sampler) or (sampler, None)
        if self._drafts is None:
            return TyingSampler(sampler, self.groups), rejection_sampler
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

        # Both settle: a grammar may have cut all of a step's drafts.
        most = self._drafts.num_speculative_tokens
        self.rounds = RoundsV2(sampler, self.owners, most) if self._own_drafts else NgramRounds()
        if rejection_sampler is None:
            rejection_sampler = RejectionSampler(sampler, self._drafts, self.groups.plans.device)
        return (
            TyingSampler(sampler, self.groups, self.rounds),
            TyingSampler(rejection_sampler, self.groups, self.rounds),
        )


class StepGroups:
    """The groups of a worker and what one step does with their rows.

    `begin_step`, `compute_logits` and `tie` follow each other once a step that has members in it.  vLLM
    computes logits and samples for other purposes too (prompt log-probabilities, profiling, warm-up):
    without a begun step both functions change nothing.
    """

    def __init__(
        self,
        device: torch.device,
        combine_hidden_states: bool = False,
        classifiers: ClassifierRows | None = None,
        model: Any = None,
    ) -> None:
        """model: the worker's, for whoever needs more of it than its logits."""
        self.model = model
        self.plans = RowPlans(device, combine_hidden_states, classifiers)
        self.scorer = PromptScorer(device)
        # Request id -> SamplingParams.extra_args, for members of groups only.
        self.members: dict[str, dict[str, Any]] = {}
        # Leader's request id -> its tag, where that bans tokens.
        self.banning: dict[str, MemberTag] = {}
        # The begun step whose logits have not been computed.
        self.batch: InputBatch | None = None
        self.answers: Answers | None = None
        # The plan of the step whose logits were fused and whose tokens have not been sampled.
        self.plan: RowPlan | None = None
        # Groups of that step that could not be computed.
        self.failures: Mapping[str, Failure] | None = None

    def add_request(self, request_id: str, extra_args: dict[str, Any] | None) -> None:
        if extra_args and KEY in extra_args:
            self.members[request_id] = extra_args
            tag = MemberTag.from_wire(extra_args[KEY])
            if tag.banned:
                self.banning[request_id] = tag
            # The id of a request that ended may come back with another formula.
            self.plans.forget()

    def remove_request(self, request_id: str) -> None:
        self.members.pop(request_id, None)
        self.banning.pop(request_id, None)

    def begin_step(self, batch: InputBatch, answers: Answers) -> None:
        # A dummy batch has no member in it, whatever requests wait for their turn.
        has_members = bool(self.members) and not self.members.keys().isdisjoint(batch.req_ids)
        self.batch = batch if has_members else None
        self.answers = answers
        self.plan = None

    def compute_logits(self, head: Head, hidden: torch.Tensor) -> torch.Tensor | None:
        """The step's logits ``[rows, vocab]`` with each joint group's formula in its leader's row.

        Planned here rather than in `begin_step`: on a GPU the forward pass is running meanwhile.

        Args:
            head: the model's ``compute_logits``.
            hidden: ``[rows, size]``.
        """
        batch, self.batch = self.batch, None
        if batch is None:
            return head(hidden)
        starts = batch.cu_num_logits_np
        if len(hidden) != starts[-1]:
            raise RuntimeError(f"expected one row a request and draft, {starts[-1]}, found {len(hidden)}")
        drafted = np.diff(starts) - 1
        # What is short of its prompt is a chunk of it, or a held member.
        lengths = lengths_of(batch)
        held = lengths < batch.prefill_len_np[: len(lengths)]
        assert self.answers is not None
        try:
            self.plan = self.plans.plan_step(
                batch.req_ids, held, lengths, self.members.get, self.answers, drafted
            )
            if self.plan is None:
                return head(hidden)
            logits, self.failures = self.plan.compute_logits(head, hidden)
        except Exception as error:
            self.plan, self.failures = None, failing_all(batch.req_ids, held, self.members.get, error)
            self.plans.forget()
            return head(hidden)
        if self.banning and logits is not None:
            for row, request_id in enumerate(batch.req_ids):
                tag = self.banning.get(request_id)
                if tag is not None and lengths[row] == tag.banned_at:
                    ban(logits, starts[row], tag.banned)
        return logits

    def take_failures(self) -> Mapping[str, Failure] | None:
        """What became of the step: group -> why its formula could not be computed."""
        failures, self.failures = self.failures, None
        return self.scorer.add_failures(failures)

    def tie(self, sampled: torch.Tensor, *numbers: torch.Tensor) -> None:
        """Gives every follower its leader's tokens ``[rows, positions]`` and `numbers`, in place."""
        if self.batch is not None:
            self.batch = None
            raise RuntimeError("a step's tokens were sampled from logits that compute_logits did not give")
        plan, self.plan = self.plan, None
        if plan is not None:
            plan.tie(sampled, *numbers)


class TyingSampler:
    """vLLM's sampler or rejection sampler, except that followers come out with their leader's tokens.

    Before anything reads them: the runner's output, the next step's inputs and the penalties' counts.
    """

    def __init__(self, sampler: Any, groups: StepGroups, rounds: NgramRounds | None = None) -> None:
        """rounds: where there are drafts."""
        self._sampler = sampler
        self._groups = groups
        self._rounds = rounds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        def draw(logits: torch.Tensor, batch: InputBatch) -> Any:
            return self._sampler(logits, batch, *args, **kwargs)

        plan = self._groups.plan
        if plan is None or self._rounds is None:
            output = draw(logits, input_batch)
        else:
            output = self._rounds.sample(plan, draw, logits, input_batch)
        self._groups.tie(output.sampled_token_ids, output.num_sampled, output.num_rejected)
        return output


def _answers(batch: InputBatch, states: RequestState, request_ids: Sequence[str]) -> list[Continuation]:
    """`Answers` from the runner's request states, where the device writes every token that it samples."""
    slots = [states.req_id_to_index[i] for i in request_ids]
    prompts = states.prompt_len.np[slots].tolist()
    starts = [max(0, prompt - CONTEXT) for prompt in prompts]
    lengths = dict(zip(batch.req_ids, lengths_of(batch).tolist(), strict=True))
    ends = [lengths[i] for i in request_ids]
    # One window of the same width for all, in which each row begins where its own context does.
    width = max(end - start for start, end in zip(starts, ends, strict=True))
    table = states.all_token_ids.gpu  # int32 [slots, max_model_len]
    where = torch.tensor([slots, starts], device=table.device)[:, :, None]
    positions = (where[1] + torch.arange(width, device=table.device)).clamp_(max=table.shape[1] - 1)
    windows = table[where[0], positions].tolist()
    return [
        Continuation(row[: prompt - start], row[prompt - start : end - start])
        for row, prompt, start, end in zip(windows, prompts, starts, ends, strict=True)
    ]

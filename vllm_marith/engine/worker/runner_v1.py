"""Fusion and tie on vLLM's V1 model runner.

Order within ``GPUModelRunner.sample_tokens``::

    logits ─▶ FUSE ─▶ grammar mask ─▶ raw log-probs ─▶ bias, penalties, T, top-k/p ─▶ token ─▶ TIE

so that whatever a request asks of the sampler acts on the formula's distribution, once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import patches
from ..group import BANS, FAILURES, KEY, Failure, constituent_of
from ..settings import Settings
from .answers import CONTEXT, Continuation
from .classifiers.rows import ClassifierRows
from .constituents.models import Constituents
from .rows import RowPlan, RowPlans, ban, failing_all
from .scoring import RAW_LOGITS, PromptScorer, heads_of, scored_tag
from .speculation.rounds_v1 import Rounds, compile_ngrams

_PROCESSOR = "vllm_marith.engine.processor:FormulaLogitsProcessor"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"


def prepare() -> None:
    """Lets a runner that speculates have the registered logits processor; before the runner is made."""
    patches.patch("vllm.v1.worker.gpu_model_runner:build_logitsprocs", _with_processors)


def install(*, constituents: bool = False) -> None:
    """Wraps the runner's functions; idempotent, once per worker process.

    constituents: whether the runner's model is several, see `engine.worker.constituents`.
    """
    patches.patch(f"{_RUNNER}.sample_tokens", _with_fusion)
    patches.patch(f"{_RUNNER}._sample", _with_tie)
    patches.patch(f"{_RUNNER}.propose_draft_token_ids", _with_drafts)
    patches.patch(f"{_RUNNER}._get_prompt_logprobs_dict", _with_scores)
    if constituents:
        patches.patch(f"{_RUNNER}._build_attention_metadata", _with_routing)


def installed() -> bool:
    """Whether models that run in this process serve formulas."""
    return patches.is_patched(f"{_RUNNER}.sample_tokens")


def _with_processors(build_logitsprocs: Any) -> Any:
    """vLLM refuses processors beside speculation, because it cannot apply them to drafts.

    Ours changes nothing.  Where only formulas draft, vLLM's own for bias and min-p stay, too: plain requests
    have no drafts, and those of formulas are shaped with them (`speculation.shape_v1`).
    """

    @functools.wraps(build_logitsprocs)
    def build(vllm_config: Any, device: Any, pin: bool, pooling: bool, custom: Any = ()) -> Any:
        from ..processor import FormulaLogitsProcessor

        others = [p for p in custom if p is not FormulaLogitsProcessor and p != _PROCESSOR]
        if vllm_config.speculative_config is None or len(others) == len(custom):
            return build_logitsprocs(vllm_config, device, pin, pooling, custom)
        settings = Settings.of(vllm_config)
        if settings.warmup:
            compile_ngrams(vllm_config)
        if settings.speculates:
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = None
            return build_logitsprocs(vllm_config, device, pin, pooling, custom)
        built = build_logitsprocs(vllm_config, device, pin, pooling, others)
        return type(built)([*built.all, FormulaLogitsProcessor(vllm_config, device, pin)])

    return build


def _with_routing(build_attention_metadata: Any) -> Any:
    @functools.wraps(build_attention_metadata)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.get_model()
        counts = kwargs.get("num_scheduled_tokens")
        # A plain engine may live in this process, too; a dummy run schedules nothing.
        if counts is not None and isinstance(model, Constituents):
            ids = self.input_batch.req_ids
            owners = [constituent_of(self.requests[i].sampling_params.extra_args) for i in ids]
            drafted = [len(drafts) for drafts in self.input_batch.spec_token_ids[: len(ids)]]
            model.router.begin_step(owners, [counts[i] for i in ids], drafted)
        return build_attention_metadata(self, *args, **kwargs)

    return routed


def _with_fusion(sample_tokens: Any) -> Any:
    @functools.wraps(sample_tokens)
    def fused(self: Any, grammar_output: Any) -> Any:
        state = self.execute_model_state
        if state is None or state.logits is None:
            return sample_tokens(self, grammar_output)
        plans = self.__dict__.get("marith_plans")
        if plans is None:
            plans = self.marith_plans = RowPlans(self.device, classifiers=_classifiers(self))
            if self.device.type != "cpu" and not hasattr(self, "_kv_block_zeroer"):
                self._init_kv_zero_meta()  # for `_get_new_block_ids_to_zero` of the scheduler
        if state.scheduler_output.scheduled_new_reqs:
            plans.forget()  # the id of a request that ended may come back with another formula
        ids = self.input_batch.req_ids
        discarded = self.discard_request_mask.np[: len(ids)]
        requests = self.requests

        def extra_args(request_id: str) -> dict[str, Any] | None:
            return requests[request_id].sampling_params.extra_args

        drafted = np.zeros(len(ids), np.int64)
        if state.spec_decode_metadata is not None:
            drafted = np.asarray(state.spec_decode_metadata.num_draft_tokens, np.int64)
        lengths = self.optimistic_seq_lens_cpu.numpy()[: len(ids)] - drafted
        answers = functools.partial(_answers, self)
        plan: RowPlan | None = None
        failures: Mapping[str, Failure] | None = None
        try:
            plan = plans.plan_step(ids, discarded, lengths, extra_args, answers, drafted)
            if plan is not None:
                with torch.inference_mode():
                    logits, failures = plan.fuse(state.logits)
        except Exception as error:
            plan, failures = None, failing_all(ids, discarded, extra_args, error)
            plans.forget()
        if plan is not None:
            with torch.inference_mode():
                for request_id, (tokens, seed) in getattr(state.scheduler_output, BANS, {}).items():
                    ban(logits, plan.starts[self.input_batch.req_id_to_index[request_id]], tokens)
                    if seed is not None:
                        requests[request_id].generator.manual_seed(seed)
                self.execute_model_state = state._replace(logits=logits)
        self.marith_plan = plan
        try:
            with _hidden_generators(self.input_batch, discarded, extra_args):
                output = sample_tokens(self, grammar_output)
        finally:
            self.marith_plan = None
        if "marith_scorer" in self.__dict__:
            failures = self.marith_scorer.add_failures(failures)
        if failures is not None:
            # Asynchronous output carries what the scheduler gets in the end.
            setattr(getattr(output, "_model_runner_output", output), FAILURES, failures)
        return output

    return fused


def _classifiers(runner: Any) -> ClassifierRows | None:
    """Those that the registered logits processor has loaded."""
    from ..processor import FormulaLogitsProcessor

    processors = runner.input_batch.logitsprocs.all
    return next((p.classifiers for p in processors if isinstance(p, FormulaLogitsProcessor)), None)


def _with_tie(sample: Any) -> Any:
    @functools.wraps(sample)
    def tied(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        plan = getattr(self, "marith_plan", None)
        rounds = _rounds(self)

        def draw(logits: Any, metadata: Any) -> Any:
            # A step without drafts is any step; vLLM's rejection sampler has no top-k for no rows at all.
            drafts = metadata is not None and (rounds is None or metadata.max_spec_len)
            return sample(self, logits, metadata if drafts else None)

        if plan is None or rounds is None:
            output = draw(logits, spec_decode_metadata)
        else:
            with torch.inference_mode():
                output = rounds.sample(plan, draw, logits, spec_decode_metadata)
        if plan is not None:
            plan.tie(output.sampled_token_ids)
        return output

    return tied


def _rounds(runner: Any) -> Rounds | None:
    """None where formulas do not draft."""
    if "marith_rounds" not in runner.__dict__:
        speculates = Settings.of(runner.vllm_config).speculates
        runner.marith_rounds = Rounds(runner) if speculates else None
        if speculates:
            # Groups draft as long as there is room for them; vLLM would drop the drafts of all requests.
            runner.effective_drafter_max_model_len = 2 * runner.max_model_len
    found: Rounds | None = runner.marith_rounds
    return found


def _with_drafts(propose_draft_token_ids: Any) -> Any:
    @functools.wraps(propose_draft_token_ids)
    def proposing(self: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        rounds, plan = _rounds(self), getattr(self, "marith_plan", None)
        if rounds is None:
            if plan is not None:
                # An operator's own proposer, which may remember what it is told: followers have their
                # leader's drafts (`engine.core.speculation`), and their answer is its answer once more.
                followers = {row for group in plan.joint for row in group.rows[1:]}
                tokens = enumerate(sampled_token_ids)
                sampled_token_ids = [[] if row in followers else new for row, new in tokens]
            return propose_draft_token_ids(self, scheduler_output, sampled_token_ids, *args, **kwargs)
        with torch.inference_mode():
            drafts = rounds.propose(plan, scheduler_output, sampled_token_ids)
        return [drafts.get(row, []) for row in range(self.input_batch.num_reqs)]

    return proposing


def _with_scores(get_prompt_logprobs_dict: Any) -> Any:
    @functools.wraps(get_prompt_logprobs_dict)
    def scored(self: Any, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        asked = dict(self.num_prompt_logprobs)  # vLLM forgets a request in the step that completes it
        if not asked:
            return get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens)
        scorer = self.__dict__.setdefault("marith_scorer", PromptScorer(self.device))
        scorer.forget_all_but(self.requests)
        model = self.get_model()
        for request_id, tokens in num_scheduled_tokens.items():
            request = self.requests[request_id]
            tag = scored_tag(request.sampling_params.extra_args)
            if tag is not None and tag.group in asked:
                row = self.input_batch.req_id_to_index[request_id]
                begin = self.query_start_loc.np[row]
                several = isinstance(model, Constituents)
                part = model.states_of(row) if several else hidden_states[begin : begin + tokens]
                scorer.keep(request_id, tag, request.num_prompt_tokens, request.num_computed_tokens, part)
        found = get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens)
        plans = self.__dict__.get("marith_plans")
        for group in plans.groups if plans else ():
            leader = group.ids[0]
            if group.tag.scored and found.get(leader) is not None:
                ids = torch.tensor(self.requests[leader].prompt_token_ids[1:], device=self.device)
                gather = functools.partial(_gather, self, asked[leader])
                heads = heads_of(model, self.model.compute_logits)
                found[leader] = scorer.score(group, heads, ids, gather)
        return found

    return scored


def _gather(runner: Any, asked: int, logits: torch.Tensor, tokens: torch.Tensor) -> Any:
    raw = runner.model_config.logprobs_mode in RAW_LOGITS
    scores = logits if raw else runner.sampler.compute_logprobs(logits)
    return runner.sampler.gather_logprobs(scores, asked, tokens)


@contextmanager
def _hidden_generators(input_batch: Any, discarded: Any, extra_args: Any) -> Iterator[None]:
    """Keeps a held leader's seed from advancing.

    vLLM samples every row and rewinds the generators of the rows it throws away, which a CPU
    generator cannot do (``Generator.set_offset``).  A held leader always has such rows.
    """
    generators = input_batch.generators
    hidden = {}
    for row in [row for row in generators if discarded[row]] if generators else ():
        args = extra_args(input_batch.req_ids[row])
        if args and KEY in args:
            hidden[row] = generators.pop(row)
    try:
        yield
    finally:
        generators.update(hidden)


def _answers(runner: Any, request_ids: Sequence[str]) -> list[Continuation]:
    """`Answers` from the runner's cached requests.

    Must be called in every step of these requests, or under asynchronous scheduling tokens are lost: there
    the runner knows its last tokens on the device only and remembers -1 in their place.  That is mended as
    ``InputBatch.update_async_output_token_ids`` does it, which vLLM calls for penalties only.
    """
    requests = runner.requests
    answers = [requests[i].output_token_ids for i in request_ids]
    unknown = [(i, ids) for i, ids in zip(request_ids, answers, strict=True) if ids and ids[-1] == -1]
    if unknown:
        batch = runner.input_batch
        sampled = batch.prev_sampled_token_ids[:, 0].tolist()
        for request_id, ids in unknown:
            ids[-1] = sampled[batch.prev_req_id_to_index[request_id]]
    return [
        Continuation(requests[i].prompt_token_ids[-CONTEXT:], tuple(ids))
        for i, ids in zip(request_ids, answers, strict=True)
    ]

"""The ledger's entries that drafts of formulas need, in all processes."""

from __future__ import annotations

from .entry import Entry

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu"
_V2_RUNNER = f"{_V2}.model_runner:GPUModelRunner"
_PROPOSER_API = "a proposer that is given the runner, its requests and a number of tokens for each"
_VERIFIER_API = "a rejection sampler of one's own, with the probabilities that drafts were drawn with"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "vllm.sampling_params:SamplingParams._validate_spec_decode",
        "bias and min-p are refused beside speculation, which drafts of formulas do know",
        "wraps",
        "bias and min-p under speculation",
        ("self", "speculative_config"),
    ),
    *(
        Entry(f"{_SCHEDULER}.{name}", why, "overrides", "a scheduler plugin API for drafts", parameters)
        for name, why, parameters in (
            (
                "update_draft_token_ids",
                "members check the same drafts, and a grammar cuts their leader's only",
                ("self", "draft_token_ids"),
            ),
            (
                "make_spec_decoding_stats",
                "a group drafts once, not once a member",
                (
                    *("self", "spec_decoding_stats", "num_draft_tokens", "num_accepted_tokens"),
                    *("num_invalid_spec_tokens", "request_id"),
                ),
            ),
        )
    ),
    Entry(
        _SCHEDULER,
        "the room that drafts take",
        "reads",
        "a scheduler plugin API for drafts",
        attributes=("num_spec_tokens", "num_lookahead_tokens", "scheduler_config"),
    ),
    Entry(
        "vllm.v1.request:Request",
        "drafts of a group are cut alike",
        "reads",
        "a scheduler plugin API for drafts",
        attributes=("spec_token_ids",),
    ),
    Entry(
        "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        "on CPUs drafts that vLLM checks meet temperatures, top-k and top-p that nobody has written",
        "wraps",
        "vLLM's version for CPUs writing into the tensor that it is given",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.utils:AttentionGroup.build_metadata",
        "attention of drafting members",
        "reads",
        _PROPOSER_API,
        ("self", "common_attn_metadata"),
    ),
    Entry(
        f"{_V1}:build_logitsprocs",
        "the registered processor is refused beside speculation, and with it vLLM's own for bias and min-p",
        "wraps",
        "logits processors under speculation, as the V2 model runner has them",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
    ),
    Entry(
        f"{_V1}:GPUModelRunner.propose_draft_token_ids",
        "groups draft with their partial formulas, and plain requests do not draft",
        "wraps",
        _PROPOSER_API,
        ("self", "scheduler_output", "sampled_token_ids"),
        runner="v1",
    ),
    Entry(
        f"{_V1}:GPUModelRunner",
        "forward passes of drafting members, with what vLLM keeps of requests and caches",
        "reads",
        _PROPOSER_API,
        runner="v1",
        attributes=(
            *("attn_groups", "kv_cache_config", "input_ids", "lora_config", "max_model_len"),
            *("effective_drafter_max_model_len", "sampler", "rejection_sampler", "vllm_config"),
            "num_spec_tokens",
        ),
    ),
    Entry(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        "where a request's tokens and blocks are",
        "reads",
        _PROPOSER_API,
        runner="v1",
        attributes=(
            *("block_table", "num_tokens_no_spec", "sampling_metadata", "spec_token_ids", "num_reqs"),
            *("request_lora_mapping", "lora_id_to_lora_request"),
        ),
    ),
    *(
        Entry(target, why, "reads", _VERIFIER_API, parameters, runner="v1")
        for target, why, parameters in (
            (
                "vllm.v1.sample.sampler:Sampler.apply_logits_processors",
                "drafts are shaped by vLLM's own sampler, up to the draw",
                ("self", "logits", "sampling_metadata", "predict_bonus_token"),
            ),
            (
                "vllm.v1.sample.sampler:Sampler.apply_temperature",
                "as apply_logits_processors",
                ("logits", "temp", "all_random"),
            ),
            (
                "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
                "as apply_logits_processors",
                ("logits", "k", "p"),
            ),
            (
                "vllm.v1.sample.rejection_sampler:RejectionSampler._get_logprobs_tensors",
                "log-probabilities of checked tokens, as vLLM returns them",
                (
                    *("self", "max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits"),
                    "sampled_token_ids",
                ),
            ),
            (
                "vllm.v1.attention.backend:CommonAttentionMetadata",
                "attention of drafting members",
                (
                    *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs"),
                    *("num_actual_tokens", "max_query_len", "max_seq_len", "block_table_tensor"),
                    *("slot_mapping", "positions", "is_prefilling", "seq_lens_cpu_upper_bound"),
                ),
            ),
            (
                "vllm.forward_context:set_forward_context",
                "attention of drafting members",
                ("attn_metadata", "vllm_config", "num_tokens", "cudagraph_runtime_mode", "slot_mapping"),
            ),
        )
    ),
    *(
        Entry(target, why, "wraps", _PROPOSER_API, parameters, runner="v2")
        for target, why, parameters in (
            (
                f"{_V2_RUNNER}.execute_model",
                "a step says which groups draft, and which requests have ended",
                ("self", "scheduler_output"),
            ),
            (
                f"{_V2_RUNNER}.take_draft_token_ids",
                "plain requests do not draft, and groups not always as far as they may",
                ("self",),
            ),
            (
                f"{_V2}.spec_decode.ngram.speculator:NgramGPUSpeculator.propose",
                "groups draft with their partial formulas, or as their leaders",
                (
                    *("self", "input_batch", "attn_metadata", "slot_mappings", "last_hidden_states"),
                    *("aux_hidden_states", "num_sampled", "num_rejected", "last_sampled"),
                    *("next_prefill_tokens", "temperature", "seeds", "dummy_run"),
                ),
            ),
        )
    ),
    *(
        Entry(target, why, "reads", _PROPOSER_API, runner="v2", attributes=attributes)
        for target, why, attributes in (
            (
                _V2_RUNNER,
                "forward passes of drafting members, with what vLLM keeps of requests and caches",
                (
                    *("attn_groups", "kv_cache_config", "input_buffers", "lora_config", "lora_state"),
                    *("block_tables", "speculator", "vllm_config"),
                ),
            ),
            (
                f"{_V2}.block_table:BlockTables",
                "where a request's blocks are",
                ("block_tables", "block_sizes"),
            ),
            (
                f"{_V2}.lora_utils:LoraState",
                "which adapter a request has",
                ("lora_ids", "lora_requests"),
            ),
            (
                f"{_V2}.states:RequestState",
                "a request's tokens, the last of them, and how many it has",
                ("all_token_ids", "last_sampled_tokens", "total_len"),
            ),
            (
                f"{_V2}.spec_decode.ngram.speculator:NgramGPUSpeculator",
                "n-grams propose for a formula's first level, behind what it has drafted so far",
                ("req_states",),
            ),
            (
                f"{_V2}.sample.states:SamplingStates",
                "a request's seed and temperature",
                ("seeds", "temperature"),
            ),
            (
                f"{_V2}.sample.sampler:Sampler",
                "drafts are shaped by vLLM's own sampler, up to the draw",
                (
                    *("sampling_states", "req_states", "needs_logits_processing", "logprobs_mode"),
                    "logprob_token_ids_state",
                ),
            ),
        )
    ),
    *(
        Entry(target, why, "reads", _VERIFIER_API, parameters, runner="v2")
        for target, why, parameters in (
            (
                f"{_V2}.sample.sampler:Sampler.apply_sampling_params",
                "drafts are shaped by vLLM's own sampler, up to the draw",
                (
                    *("self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos"),
                    *("input_ids", "expanded_local_pos", "seq_lens_upper_bound_np"),
                ),
            ),
            (
                f"{_V2}.sample.sampler:Sampler.get_logprobs_dims",
                "log-probabilities of checked tokens, as vLLM returns them",
                ("self", "idx_mapping_np", "include_token_ids"),
            ),
            (
                f"{_V2}.sample.logprob:compute_topk_scores",
                "as get_logprobs_dims",
                (
                    *("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits"),
                    *("logprob_token_ids_state", "expanded_idx_mapping", "max_per_req_token_ids"),
                    "logits_mode",
                ),
            ),
            (
                f"{_V2}.spec_decode.rejection_sampler:RejectionSampler",
                "vLLM makes none beside a custom sampler: plain rows, and drafts of n-grams",
                ("sampler", "spec_config", "device"),
            ),
            (
                f"{_V2}.sample.output:SamplerOutput",
                "the tokens of a round and their number",
                ("sampled_token_ids", "logprobs_tensors", "num_sampled", "num_rejected"),
            ),
            (
                f"{_V2}.input_batch:InputBatch",
                "which rows of logits a request has, and where the runner keeps it",
                (
                    *("cu_num_logits_np", "idx_mapping", "expanded_idx_mapping", "expanded_local_pos"),
                    *("num_draft_tokens", "input_ids", "positions", "logits_indices", "num_reqs"),
                    "has_structured_output_reqs",
                ),
            ),
        )
    ),
    *(
        Entry(target, why, "reads", _PROPOSER_API, runner="v2", calls=calls)
        for target, why, calls in (
            (
                f"{_V2}.spec_decode:init_speculator",
                "the speculator whose method is wrapped is the one that vLLM makes",
                ("NgramGPUSpeculator",),
            ),
            (
                f"{_V2_RUNNER}.sample_tokens",
                "groups draft behind the tokens that the step gave them",
                ("sample", "postprocess_sampled", "propose", "set_draft_tokens"),
            ),
        )
    ),
)

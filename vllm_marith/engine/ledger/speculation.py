"""The ledger's entries that drafts of formulas need, in all processes."""

from __future__ import annotations

from .entry import Entry

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_V1 = "vllm.v1.worker.gpu_model_runner"
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
)

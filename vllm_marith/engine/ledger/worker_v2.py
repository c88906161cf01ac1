"""The ledger's entries of worker processes with the V2 model runner."""

from __future__ import annotations

from .entry import Entry

_V2 = "vllm.v1.worker.gpu"
_V2_API = "a V2 logits hook ahead of the grammar mask, and one on the sampled tokens"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "vllm.config.parallel:ParallelConfig",
        "a worker's hooks must be there before it loads its model",
        "reads",
        "logits processors that are made before the model state",
        ("worker_extension_cls",),
        runner="v2",
    ),
    Entry(
        f"{_V2}.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs",
        "log-probabilities of a prompt are the formula's, and need all members' hidden states",
        "wraps",
        "a hook on the hidden states of prompt tokens",
        (
            *("self", "logits_fn", "hidden_states", "input_batch", "all_token_ids"),
            *("num_computed_tokens", "prompt_lens"),
        ),
        runner="v2",
    ),
    Entry(
        f"{_V2}.model_states:resolve_model_state_cls",
        "the model state is asked for all that is particular to a model: ours extends the one vLLM chose",
        "wraps",
        "a model state class named by the configuration",
        ("vllm_config", "model"),
        runner="v2",
    ),
    *(
        Entry(f"{_V2}.model_states.interface:ModelState.{name}", why, "overrides", _V2_API, parameters, "v2")
        for name, why, parameters in (
            (
                "__init__",
                "the model's compute_logits is wrapped: fusion must come before the grammar mask",
                ("self", "vllm_config", "model", "encoder_cache", "device"),
            ),
            ("add_request", "who is a member of which group", ("self", "req_index", "new_req_data")),
            ("remove_request", "who is no longer a member", ("self", "req_id")),
            (
                "prepare_inputs",
                "the step's requests in the order of its rows",
                ("self", "input_batch", "req_states"),
            ),
            (
                "custom_sampler",
                "followers receive their leader's token before anything reads it",
                ("self", "sampler"),
            ),
        )
    ),
    *(
        Entry(f"{_V2}.{name}", why, "reads", _V2_API, parameters, "v2")
        for name, why, parameters in (
            (
                "input_batch:InputBatch",
                "which request sits in which row, and whether its prompt is complete",
                (
                    *("req_ids", "seq_lens_cpu_upper_bound", "prefill_len_np", "idx_mapping_np"),
                    *("query_start_loc_np", "num_computed_prefill_tokens_np"),
                ),
            ),
            ("sample.output:SamplerOutput", "the tokens that are tied", ("sampled_token_ids",)),
            (
                "sample.logprob:compute_topk_scores",
                "scores of a prompt in vLLM's own form",
                ("logits", "num_logprobs", "sampled_token_ids", "logits_mode"),
            ),
            (
                "sample.logits_processor.interface:LogitsProcessor",
                "the registered class is one of these, too",
                ("vllm_config", "req_states"),
            ),
        )
    ),
    *(
        Entry(target, why, "reads", _V2_API, runner="v2", calls=calls)
        for target, why, calls in (
            (
                "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
                "looking up the extension class installs the hooks before there is a worker",
                ("load_general_plugins", "resolve_obj_by_qualname", "worker_class"),
            ),
            (
                f"{_V2}.model_states:init_model_state",
                "the replaced function is the one that is called",
                ("resolve_model_state_cls",),
            ),
            (
                f"{_V2}.model_runner:GPUModelRunner.load_model",
                "the model state is asked for a sampler after the logits processors were made",
                ("init_model_state", "build_custom_logits_processors", "custom_sampler"),
            ),
            (
                f"{_V2}.model_runner:GPUModelRunner.execute_model",
                "members are known before a step's inputs are prepared",
                ("add_requests", "prepare_inputs"),
            ),
            (
                f"{_V2}.model_runner:GPUModelRunner.sample",
                "the grammar mask and the sampler see fused rows",
                ("compute_logits", "apply_grammar_bitmask", "sampler"),
            ),
            (
                f"{_V2}.model_runner:GPUModelRunner.sample_tokens",
                "tokens are tied before they become output, history and input of the next step",
                ("sample", "AsyncOutput", "postprocess_sampled"),
            ),
        )
    ),
)

"""The ledger's entries: what is touched in vLLM, why, how, and what would make it unnecessary.

Data only; `vllm_marith.engine.patches` probes and applies it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One vLLM symbol.

    Attributes:
        target: ``module:qualified.name``.
        why: what we cannot do without it.
        how: ``wraps`` (called through, result kept or amended), ``overrides`` (a subclass's method)
            or ``reads`` (an attribute or method that we use as it is).
        removal: the upstream change that would make the entry unnecessary.
        parameters: names that the signature must accept, the first of which is ``self`` for methods;
            for a class, names that its instances are made with.  What ``overrides`` is called by vLLM with
            whatever the original takes: there, these and `newer` must be all of its names.
        runner: ``v1`` or ``v2``, the model runner that needs the entry; empty for both.
        newer: names that only some supported releases have.
        attributes: names that a class's methods must set or read on ``self``, or that its body defines.
        calls: names that the body must call in this order.

    Attributes and calls take the source: an entry without parameters is left to scripts/check_vllm.py.
    """

    target: str
    why: str
    how: str
    removal: str
    parameters: tuple[str, ...] = ()
    runner: str = ""
    newer: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    def objection(self, accepted: Iterable[str]) -> str:
        """What is wrong with a signature that accepts these names; empty if nothing is."""
        accepted = list(accepted)
        lacking = [name for name in self.parameters if name not in accepted]
        if lacking:
            return f"takes no {', '.join(lacking)}"
        unknown = [name for name in accepted if name not in self.parameters + self.newer]
        if unknown and self.how == "overrides":
            return f"also takes {', '.join(unknown)}"
        return ""


_V1_API = "a logits hook ahead of the grammar mask"
_V2 = "vllm.v1.worker.gpu"
_V2_API = "a V2 logits hook ahead of the grammar mask, and one on the sampled tokens"
_TEXT_API = "a logits hook that is told the tokens so far"
_FAILURE_API = "an error of one request in ModelRunnerOutput"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_SCHEDULER_API = "a scheduler plugin API with an all-or-none scheduling hook"

LEDGER: tuple[Entry, ...] = (
    Entry(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "`--logits-processor marith` must become a class name, and unsupported options must stop the start",
        "wraps",
        "an entry point group for named, opt-in logits processors",
        ("self", "usage_context"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_cmpl",
        "terms are rendered from the request's text, which the rendered prompt no longer holds",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "prompts", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_cmpl_async",
        "as render_cmpl, for the server",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "prompts", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_chat",
        "each term has its own system message, and the rendered prompt no longer holds the messages",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "conversations", "chat_params", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        "as render_chat, for the server",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "conversations", "chat_params", "tok_params"),
    ),
    Entry(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_cmpl",
        "a bad formula must be HTTP 400 before a stream starts",
        "wraps",
        "validate_params called before the response starts, with access to the rendered prompt",
        ("self", "request", "prompts"),
    ),
    Entry(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        "a bad formula must be HTTP 400 before a stream starts",
        "wraps",
        "validate_params called before the response starts, with access to the rendered prompt",
        ("self", "request", "messages"),
    ),
    Entry(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "every request passes here with tokenizer, configuration and a private copy of its parameters",
        "wraps",
        "a request-expansion hook for plugins",
        ("self", "request_id", "prompt", "params"),
    ),
    *(
        Entry(
            f"vllm.v1.engine.{engine}.{name}_lora",
            "in Python, terms name the adapters that the engine was given",
            "wraps",
            "an engine that lists its adapters by name",
            ("self", parameter),
        )
        for engine in ("llm_engine:LLMEngine", "async_llm:AsyncLLM")
        for name, parameter in (("add", "lora_request"), ("remove", "lora_id"))
    ),
    Entry(
        "vllm.lora.request:LoRARequest",
        "a follower has an adapter of its own, which travels as plain data",
        "reads",
        "a request-expansion hook for plugins",
        attributes=("lora_name", "lora_int_id", "load_inplace"),
    ),
    Entry(
        "vllm.plugins:load_endpoint_plugins",
        "our routes are an endpoint plugin, which vLLM loads only where VLLM_PLUGINS names it",
        "wraps",
        "endpoint plugins that another option can switch on",
        ("supported_tasks",),
    ),
    Entry(
        "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        "a preset's name in `model` stands for the base model and the preset's formula",
        "wraps",
        "a public hook between a request and its model's name",
        ("self", "request"),
    ),
    Entry(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name",
        "the answer carries the name that the client used",
        "wraps",
        "responses that repeat the request's model",
        ("self", "lora_request"),
    ),
    Entry(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels",
        "the served names, beside which presets are listed, and the renderer that knows the presets",
        "reads",
        "a public hook between a request and its model's name",
        attributes=("base_model_paths", "lora_requests", "renderer", "model_config", "show_available_models"),
    ),
    Entry(
        "vllm.v1.engine.core:EngineCore",
        "the scheduler that has the figures",
        "reads",
        "SchedulerStats with a field for plugins",
        attributes=("scheduler",),
    ),
    Entry(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        "frontends ask for the figures of the scheduler, which no remote call reaches",
        "wraps",
        "SchedulerStats with a field for plugins",
        ("self", "method", "timeout", "args", "kwargs"),
    ),
    Entry(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        "every engine is asked for its figures, where there are several",
        "reads",
        "EngineClient.collective_rpc answering for all engines",
        ("self", "method"),
    ),
    *(
        Entry(f"{_SCHEDULER}.{name}", why, "overrides", _SCHEDULER_API, parameters)
        for name, why, parameters in (
            (
                "schedule",
                "a group's rows are ordered and reserved before each step",
                ("self", "throttle_prefills"),
            ),
            ("add_request", "a group is fanned out where its requests are scheduled", ("self", "request")),
            (
                "update_from_output",
                "followers end with their leader and stay invisible",
                ("self", "scheduler_output", "model_runner_output"),
            ),
            (
                "finish_requests",
                "an abort of the leader is an abort of the group",
                ("self", "request_ids", "finished_status"),
            ),
            (
                "_enqueue_waiting_request",
                "members wait as a group, and plain requests do not overtake it for ever",
                ("self", "request"),
            ),
            (
                "_free_request",
                "the end of a member is the end of its group",
                ("self", "request", "delay_free_blocks"),
            ),
            (
                "reset_prefix_cache",
                "groups in flight start again as a whole",
                ("self", "reset_running_requests", "reset_connector"),
            ),
            (
                "_preempt_request",
                "a preempted member waits with its whole group",
                ("self", "request", "timestamp", "drop_stale_output"),
            ),
            (
                "_reserve_prefill_lookahead",
                "a member is held one token short of its prompt until all members are",
                ("self", "request", "num_computed_tokens", "num_new_tokens"),
            ),
            ("get_request_counts", "requests in our backlog are waiting requests", ("self",)),
        )
    ),
    Entry(
        f"{_SCHEDULER}._get_local_prefix_cache_hit",
        "a prefix-cache hit of all but one token leaves nothing to hold back",
        "overrides",
        _SCHEDULER_API,
        ("self", "request"),
        newer=("max_cache_hit_length",),  # 0.33
    ),
    *(
        Entry(f"{_SCHEDULER}.{name}", why, "reads", _SCHEDULER_API, parameters)
        for name, why, parameters in (
            ("_handle_blocked_waiting_request", "a leader's grammar comes first", ("self", "request")),
            ("_is_blocked_waiting_status", "a leader's grammar comes first", ("status",)),
            ("_holds_kv_blocks", "a streaming session keeps its place", ("request",)),
            ("_request_remaining_blocks", "blocks that a prompt still needs", ("self", "request")),
            ("_inflight_prefill_reserved_blocks", "blocks promised to running prefills", ("self",)),
        )
    ),
    *(
        Entry(
            target,
            "the state that a group's scheduling decides by",
            "reads",
            _SCHEDULER_API,
            attributes=names,
        )
        for target, names in (
            (
                _SCHEDULER,
                (
                    *("requests", "running", "waiting", "deferred_waiting", "kv_holding_waiting"),
                    *("_inflight_prefills", "kv_cache_manager", "policy", "lora_config", "max_model_len"),
                    *("max_num_active_reqs", "max_num_scheduled_tokens", "num_waiting_for_streaming_input"),
                    *("finished_req_ids_dict", "_pause_state", "pause_state"),
                    *("vllm_config", "prev_step_scheduled_req_ids"),
                ),
            ),
            (
                "vllm.v1.request:Request",
                (
                    *("request_id", "status", "priority", "arrival_time", "sampling_params", "lora_request"),
                    *("num_tokens", "num_prompt_tokens", "num_computed_tokens", "num_tokens_with_spec"),
                    *("num_output_placeholders", "num_in_flight_tokens", "num_stale_output_tokens"),
                    *("max_tokens", "block_hashes", "_block_hasher", "cache_salt", "client_index"),
                    *("trace_headers", "skip_reading_prefix_cache", "take_events", "is_finished"),
                    *("get_finished_reason", "num_output_tokens", "output_token_ids"),
                    # Taken back: both lists and the hashes made of them.
                    *("_output_token_ids", "_all_token_ids", "update_block_hashes", "drop_stale_output"),
                ),
            ),
            (
                "vllm.v1.engine:EngineCoreOutput",
                (
                    *("request_id", "new_token_ids", "finish_reason", "stop_reason", "finished"),
                    *("events", "prefill_stats", "trace_headers"),
                ),
            ),
            (
                "vllm.v1.core.kv_cache_manager:KVCacheManager",
                (
                    *("block_pool", "coordinator", "watermark_blocks"),
                    *("create_kv_cache_blocks", "empty_kv_cache_blocks"),
                ),
            ),
            (_COORDINATOR, ("single_type_managers",)),
            ("vllm.v1.core.block_pool:BlockPool", ("num_gpu_blocks", "get_num_free_blocks")),
        )
    ),
    *(
        Entry(target, why, "reads", "a scheduler hook on sampled tokens that may refuse them", parameters)
        for target, why, parameters in (
            (
                "vllm.v1.core.sched.utils:check_stop",
                "whether an answer ends with a token is known before vLLM appends it: its rules are ours",
                ("request", "max_model_len"),
            ),
            (
                "vllm.v1.core.sched.utils:check_sequence_repetition",
                "as check_stop",
                ("token_ids", "params"),
            ),
            (
                "vllm.v1.engine.detokenizer:IncrementalDetokenizer.from_new_request",
                "what is forbidden is the text that the client would see",
                ("tokenizer", "request"),
            ),
            ("vllm.tokenizers:cached_tokenizer_from_config", "as from_new_request", ("model_config",)),
        )
    ),
    Entry(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        "our scheduler extends the one that vLLM chose",
        "reads",
        _SCHEDULER_API,
        ("self",),
    ),
    *(
        Entry(
            f"vllm.lora.{module}:{product}",
            "on CPUs a row without an adapter, index -1, is computed with the adapter in the last slot",
            "wraps",
            "vLLM's torch LoRA products skipping the index -1, as its Triton kernels do",
            ("inputs", "lora_b_weights", "output_tensor", "lora_indices_tensor"),
        )
        for module in ("ops.torch_ops.lora_ops", "punica_wrapper.punica_cpu")
        for product in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        "fusion must come before the grammar mask, penalties and raw log-probabilities",
        "wraps",
        _V1_API,
        ("self", "grammar_output"),
        runner="v1",
        calls=("apply_grammar_bitmask", "_sample"),
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        "followers receive their leader's token before anything reads it",
        "wraps",
        "a hook on the sampled token ids",
        ("self", "logits", "spec_decode_metadata"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict",
        "log-probabilities of a prompt are the formula's, and need all members' hidden states",
        "wraps",
        "a hook on the hidden states of prompt tokens",
        ("self", "hidden_states", "num_scheduled_tokens"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
        "fused logits take the place of the step's own",
        "reads",
        _V1_API,
        ("logits",),
        runner="v1",
    ),
    *(
        Entry(
            target,
            "which request sits in which row, and whether it is held",
            "reads",
            _V1_API,
            (),
            "v1",
            attributes=names,
        )
        for target, names in (
            (
                "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
                (
                    "execute_model_state",
                    "input_batch",
                    "discard_request_mask",
                    "optimistic_seq_lens_cpu",
                    "num_prompt_logprobs",
                    "query_start_loc",
                    "requests",
                    "device",
                ),
            ),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                ("req_ids", "req_id_to_index", "generators", "logitsprocs"),
            ),
        )
    ),
    *(
        Entry(target, "classifiers read the answer so far", "reads", _TEXT_API, (), runner, attributes=names)
        for target, runner, names in (
            (
                "vllm.v1.worker.gpu_input_batch:CachedRequestState",
                "v1",
                ("prompt_token_ids", "output_token_ids"),
            ),
            (
                "vllm.v1.worker.gpu_input_batch:InputBatch",
                "v1",
                ("prev_sampled_token_ids", "prev_req_id_to_index"),
            ),
            (f"{_V2}.states:RequestState", "v2", ("req_id_to_index", "all_token_ids", "prompt_len")),
        )
    ),
    Entry(
        "vllm.tokenizers.registry:cached_tokenizer_from_config",
        "candidates of classifiers are texts",
        "reads",
        _TEXT_API,
        ("model_config",),
    ),
    Entry(
        f"{_V2}.model_runner:GPUModelRunner.sample_tokens",
        "groups that a classifier failed are reported with the step's output",
        "wraps",
        _FAILURE_API,
        ("self", "grammar_output"),
        runner="v2",
    ),
    *(
        Entry(
            target,
            "asynchronous output carries what the scheduler gets in the end",
            "reads",
            _FAILURE_API,
            runner=runner,
            attributes=(name,),
        )
        for target, runner, name in (
            ("vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput", "v1", "_model_runner_output"),
            (f"{_V2}.async_utils:AsyncOutput", "v2", "model_runner_output"),
        )
    ),
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

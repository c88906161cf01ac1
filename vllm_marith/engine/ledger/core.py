"""The ledger's entries of the engine core process: groups in the scheduler, and its figures."""

from __future__ import annotations

from .entry import Entry

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_SCHEDULER_API = "a scheduler plugin API with an all-or-none scheduling hook"

ENTRIES: tuple[Entry, ...] = (
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
            ("_get_new_block_ids_to_zero", "blocks that hold NaN must not reach another request", ("self",)),
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
                    *("block_pool", "coordinator", "watermark_blocks", "get_blocks"),
                    *("create_kv_cache_blocks", "empty_kv_cache_blocks"),
                ),
            ),
            (_COORDINATOR, ("single_type_managers",)),
            (
                "vllm.v1.core.block_pool:BlockPool",
                ("num_gpu_blocks", "get_num_free_blocks", "blocks", "evict_blocks"),
            ),
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
)

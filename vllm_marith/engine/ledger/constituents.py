"""The ledger's entries of engines with several base models."""

from __future__ import annotations

from .entry import Entry

_COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
_SINGLE = "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
_GROUPS = "models of several base models, with KV-cache groups that a request need not have blocks in"

_MANAGERS = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
_MANAGER = "models that bring a LoRA manager of their own"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        "whose rows a step has, where several base models run: each one's attention sees its own",
        "wraps",
        "attention metadata builders that see the batch's requests",
        ("self", "num_scheduled_tokens"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
        "each constituent has a LoRA manager of its own, told of its own rows",
        "wraps",
        _MANAGER,
        ("self", "model", "vllm_config", "device"),
    ),
    Entry(
        f"{_MANAGERS}.set_active_adapters",
        "each constituent's manager is told of its own rows",
        "reads",
        _MANAGER,
        ("self", "requests", "mapping"),
    ),
    Entry(
        "vllm.lora.layers:LoRAMapping",
        "each constituent's manager is told of its own rows",
        "reads",
        _MANAGER,
        ("index_mapping", "prompt_mapping"),
    ),
    Entry(
        f"{_MANAGERS}._load_adapter",
        "an adapter of another model's shape is not for this one",
        "overrides",
        "adapters whose shapes are checked",
        ("self", "lora_request"),
    ),
    Entry(
        "vllm.lora.model_manager:LoRAModelManager",
        "an adapter of another model's shape is not for this one",
        "reads",
        "adapters whose shapes are checked",
        attributes=("modules", "packed_modules"),
    ),
    *(
        Entry(
            f"{_MANAGERS}.{name}",
            "adapters of all constituents are managed as one's",
            "reads",
            _MANAGER,
            names,
        )
        for name, names in (
            ("create_lora_manager", ("self", "model", "vllm_config")),
            ("add_adapter", ("self", "lora_request")),
            ("remove_adapter", ("self", "adapter_id")),
            ("pin_adapter", ("self", "adapter_id")),
            ("list_adapters", ("self",)),
            ("remove_all_adapters", ("self",)),
            ("dummy_lora_cache", ("self",)),
            ("get_dummy_lora_warmup_rank", ("self", "default_rank")),
            ("add_dummy_lora", ("self", "lora_request", "rank")),
        )
    ),
    Entry(
        "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_attn",
        "whose rows a step has: each constituent's attention sees its own",
        "overrides",
        _GROUPS,
        (
            *("self", "input_batch", "cudagraph_mode", "block_tables", "slot_mappings"),
            *("attn_groups", "kv_cache_config", "for_capture", "ubatch_idx"),
        ),
        runner="v2",
    ),
    *(
        Entry(
            f"{_COORDINATOR}.{name}",
            "a request has blocks in its constituent's group only",
            how,
            _GROUPS,
            names,
        )
        for name, how, names in (
            (
                "get_num_blocks_to_allocate",
                "overrides",
                (
                    *("self", "request_id", "num_tokens", "new_computed_blocks", "num_encoder_tokens"),
                    *("total_computed_tokens", "num_local_computed_tokens", "num_tokens_main_model"),
                    *("apply_admission_cap", "prefill_end"),
                ),
            ),
            (
                "allocate_new_computed_blocks",
                "overrides",
                (
                    *("self", "request_id", "new_computed_blocks", "num_local_computed_tokens"),
                    *("num_external_computed_tokens", "skip_zeroing_group_ids"),
                ),
            ),
            (
                "allocate_new_blocks",
                "overrides",
                ("self", "request_id", "num_tokens", "num_tokens_main_model", "num_encoder_tokens"),
            ),
            ("cache_blocks", "overrides", ("self", "request", "num_computed_tokens")),
            (
                "get_num_cacheable_tokens",
                "overrides",
                ("self", "num_computed_tokens", "kv_cache_group_id"),
            ),
            (
                "find_longest_cache_hit",
                "overrides",
                ("self", "block_hashes", "max_cache_hit_length"),
            ),
        )
    ),
    *(
        Entry(f"{_SINGLE}.{name}", "blocks of one constituent's group", "reads", _GROUPS, names)
        for name, names in (
            (
                "get_num_blocks_to_allocate",
                (
                    *("self", "request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens"),
                    *("num_local_computed_tokens", "num_tokens_main_model", "apply_admission_cap"),
                ),
            ),
            (
                "add_local_computed_blocks",
                (
                    *("self", "request_id", "new_computed_blocks", "num_local_computed_tokens"),
                    "num_external_computed_tokens",
                ),
            ),
            ("allocate_new_blocks", ("self", "request_id", "num_tokens", "num_tokens_main_model")),
            ("cache_blocks", ("self", "request", "num_tokens", "retention_interval", "replay_boundaries")),
            (
                "find_longest_cache_hit",
                (
                    *("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"),
                    *("drop_eagle_block", "alignment_tokens"),
                ),
            ),
        )
    ),
    *(
        Entry(target, why, "reads", _GROUPS, names)
        for target, why, names in (
            (
                "vllm.v1.attention.backend:subclass_attention_backend_with_overrides",
                "attention of one constituent sees its own rows",
                ("name_prefix", "attention_backend_cls", "overrides"),
            ),
            (
                "vllm.v1.attention.backend:AttentionBackend.customize_spec",
                "layers of different constituents never share a KV-cache group",
                ("spec",),
            ),
            (
                "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
                "a constituent's metadata is built with its own configuration",
                ("self", "kv_cache_spec", "layer_names", "vllm_config"),
            ),
            (
                "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
                "a constituent's metadata is cut out of the batch's",
                ("self", "common_prefix_len", "common_attn_metadata"),
            ),
            (
                "vllm.v1.attention.backend:CommonAttentionMetadata",
                "a constituent's metadata is cut out of the batch's",
                (
                    *("query_start_loc", "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound"),
                    *("num_reqs", "num_actual_tokens", "max_query_len", "max_seq_len"),
                    *("block_table_tensor", "slot_mapping", "positions", "is_prefilling", "req_idx"),
                    *("rswa_prefix_lens", "_num_computed_tokens_cache", "_token_to_req_indices_cache"),
                ),
            ),
            (
                "vllm.v1.kv_cache_interface:replace_as",
                "layers of different constituents never share a KV-cache group",
                ("spec", "target_cls", "drop"),
            ),
            (
                "vllm.forward_context:ForwardContext",
                "a constituent's layers write to its own slots",
                ("attn_metadata", "slot_mapping", "cudagraph_runtime_mode", "batch_descriptor"),
            ),
            (
                "vllm.forward_context:override_forward_context",
                "a constituent's layers write to its own slots",
                ("forward_context",),
            ),
            (
                "vllm.model_executor.model_loader:register_model_loader",
                "constituents are loaded by a loader of ours",
                ("load_format",),
            ),
            (
                "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
                "each constituent is loaded as vLLM loads it alone",
                ("self", "vllm_config", "model_config", "prefix"),
            ),
            (
                "vllm.config.vllm:VllmConfig.get_quantization_config",
                "each constituent keeps its own quantisation",
                ("model_config", "load_config"),
            ),
        )
    ),
)

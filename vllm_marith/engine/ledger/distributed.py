"""The ledger's entries for engines on Ray: where nodes are asked, before a worker is made, what they have."""

from __future__ import annotations

from .entry import Entry

_EXECUTOR_API = "a hook between the placement of Ray workers and their making"

ENTRIES: tuple[Entry, ...] = (
    *(
        Entry(
            f"vllm.v1.executor.{module}:{executor}._init_executor",
            "every node of the placement group must have this package before vLLM makes a worker there",
            "overrides",
            _EXECUTOR_API,
            ("self",),
            "ray",
        )
        for module, executor in (
            ("ray_executor_v2", "RayExecutorV2"),
            ("ray_executor", "RayDistributedExecutor"),
        )
    ),
    Entry(
        "vllm.v1.executor.ray_utils:initialize_ray_cluster",
        "the placement group, which vLLM's executors then find made",
        "reads",
        _EXECUTOR_API,
        ("parallel_config", "require_gpu_on_driver"),
        "ray",
    ),
    Entry(
        "vllm.v1.executor.ray_utils:_wait_until_pg_ready",
        "which node a data-parallel engine is placed on is known once it is placed",
        "reads",
        _EXECUTOR_API,
        ("current_placement_group",),
        "ray",
    ),
    Entry(
        "vllm.v1.executor.abstract:Executor.get_class",
        "which of vLLM's two Ray executors was chosen",
        "reads",
        _EXECUTOR_API,
        ("vllm_config",),
        "ray",
    ),
    Entry(
        "vllm.v1.engine.utils:CoreEngineActorManager.create_dp_placement_groups",
        "as _init_executor, for data-parallel engines that are Ray actors",
        "wraps",
        _EXECUTOR_API,
        ("vllm_config",),
        "ray",
    ),
    Entry(
        "vllm.v1.engine.utils:wait_for_engine_startup",
        "a server whose engine refused to start ends with the engine's sentence",
        "wraps",
        "engine processes that can tell the server why they did not start",
        ("launch",),
        "ray",
    ),
    Entry(
        "vllm.v1.engine.utils:CoreEngineProcManager",
        "how an engine's process ended",
        "reads",
        "engine processes that can tell the server why they did not start",
        attributes=("processes",),
    ),
)

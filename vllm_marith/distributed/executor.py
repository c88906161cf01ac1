"""vLLM's Ray executors, started only where every node can serve formulas.

vLLM lets the configuration name an executor class.  Ours are vLLM's own with two questions: before workers
are made, whether their nodes have this package (`nodes`); afterwards, whether each worker serves formulas.
Steps go vLLM's way.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

import ray
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.ray_executor import RayDistributedExecutor
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
from vllm.v1.executor.ray_utils import _wait_until_pg_ready, initialize_ray_cluster

from vllm_marith.engine import patches
from vllm_marith.engine.plugin import UnsupportedError
from vllm_marith.engine.settings import Settings
from vllm_marith.engine.worker import runner_v1, runner_v2

from . import nodes

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from vllm.config import VllmConfig

logger = init_logger("vllm.marith")  # within vLLM's, whose level and handlers the operator sets


class _OnNodesWithFormulas(Executor):
    """The two questions, over either of vLLM's executors."""

    driver_needs_device: bool
    """Whether vLLM's executor wants its first worker on the driver's node."""

    def _init_executor(self) -> None:
        parallel = self.parallel_config
        # The workers' vLLM compares the name, and a class of ours could not be sent to a node without it.
        parallel.distributed_executor_backend = "ray"
        # vLLM's executor does this first as well, and then finds it done.
        initialize_ray_cluster(parallel, require_gpu_on_driver=self.driver_needs_device)
        assert parallel.placement_group is not None
        refuse(nodes.objection([parallel.placement_group], parallel.ray_runtime_env))
        super()._init_executor()  # type: ignore[safe-super]  # the other base's
        workers = self.collective_rpc(describe)
        refuse(disagreement(workers, describe_settings(self.vllm_config)))
        for rank, worker in enumerate(workers):
            logger.info("Formulas: rank %d on the Ray node %s (%s)", rank, worker["node"], worker["address"])


class FormulaRayExecutorV2(_OnNodesWithFormulas, RayExecutorV2):
    """What vLLM chooses unless VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0."""

    driver_needs_device = False


class FormulaRayExecutor(_OnNodesWithFormulas, RayDistributedExecutor):
    """vLLM's older Ray executor, with a compiled graph."""

    driver_needs_device = True


_EXECUTORS: dict[type[Executor], type[Executor]] = {
    RayExecutorV2: FormulaRayExecutorV2,
    RayDistributedExecutor: FormulaRayExecutor,
}


def install(config: VllmConfig) -> None:
    """Makes a configuration that runs on Ray ask its nodes first; any other is left as it is.

    An executor class of the operator's own is kept.
    """
    parallel = config.parallel_config
    if parallel.distributed_executor_backend == "ray":
        chosen = Executor.get_class(config)
        parallel.distributed_executor_backend = _EXECUTORS.get(chosen, chosen)
    if parallel.data_parallel_backend == "ray":
        patches.patch(_PLACEMENT, _asking_first)


_PLACEMENT = "vllm.v1.engine.utils:CoreEngineActorManager.create_dp_placement_groups"


def _asking_first(create_dp_placement_groups: Any) -> Any:
    @functools.wraps(create_dp_placement_groups)
    def create(vllm_config: VllmConfig) -> tuple[list[PlacementGroup], list[int]]:
        groups, local_ranks = create_dp_placement_groups(vllm_config)
        for group in groups:
            _wait_until_pg_ready(group)  # which says what it waits for, and gives up
        refuse(nodes.objection(groups, vllm_config.parallel_config.ray_runtime_env))
        return groups, local_ranks

    return create


_REFUSED = 78
"""What an engine's process that refused ends with: EX_CONFIG of sysexits.h, and nothing of vLLM's."""


def refuse(sentence: str) -> None:
    """Ends a start for a reason, unless that is empty.

    Raises:
        SystemExit: in a process that vLLM made for an engine, where a traceback says nothing more.
        UnsupportedError: anywhere else.
    """
    if not sentence:
        return
    if multiprocessing.current_process().name.startswith("EngineCore"):
        print(f"marith: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(_REFUSED)
    raise UnsupportedError(sentence)


def install_in_server() -> None:
    """Lets a server whose engine refused end with the engine's sentence, and no traceback of its own."""
    patches.patch("vllm.v1.engine.utils:wait_for_engine_startup", _ending_with_a_sentence)


def _ending_with_a_sentence(wait_for_engine_startup: Any) -> Any:
    @functools.wraps(wait_for_engine_startup)
    def wait(*args: Any, **kwargs: Any) -> Any:
        try:
            return wait_for_engine_startup(*args, **kwargs)
        except RuntimeError:
            launch = inspect.signature(wait_for_engine_startup).bind(*args, **kwargs).arguments["launch"]
            for process in getattr(launch.engine_manager, "processes", ()):
                process.join(5)  # vLLM may notice that it ends before it has ended
                if process.exitcode == _REFUSED:
                    raise SystemExit(1) from None
            raise

    return wait


def describe(worker: Any) -> dict[str, Any]:
    """Where a worker is, and whether its model runner serves formulas; runs in the worker."""
    config = worker.vllm_config
    runner = runner_v2 if config.use_v2_model_runner else runner_v1
    return {
        "node": ray.get_runtime_context().get_node_id(),
        "address": ray.util.get_node_ip_address(),
        "serves": runner.installed(),
        "settings": describe_settings(config),
    }


def describe_settings(config: VllmConfig) -> str:
    return Settings.of(config).model_dump_json()


def disagreement(workers: list[dict[str, Any]], settings: str) -> str:
    """One sentence on the workers that do not serve formulas as this engine would, or ""."""
    wrong = [
        f"rank {rank} on the Ray node {worker['address']} (node id {worker['node']}) "
        + ("does not serve formulas" if not worker["serves"] else "has other settings")
        for rank, worker in enumerate(workers)
        if not worker["serves"] or worker["settings"] != settings
    ]
    return "the workers of this engine disagree: " + "; ".join(wrong) if wrong else ""

"""vLLM engines inside the test's own process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
BLOCK_SIZE = 32


def prepare_environment() -> None:
    """Before anything imports vLLM."""
    os.environ.update(ENVIRONMENT)


@contextmanager
def engine(model: Any, *, formulas: bool = True, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` over `model`, shut down at the end so that the next one can start."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = dict(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=32,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        block_size=BLOCK_SIZE,
        disable_log_stats=True,
        seed=0,
    )
    if formulas:
        defaults["logits_processors"] = ["marith"]
    # Threads that wait for each other spin: with models this small, on cores that have other work too,
    # a second thread makes everything several times slower.
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    set_num_threads(1)
    try:
        llm = LLM(str(model), **{**defaults, **options})
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
    finally:
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker disables it for the whole process
        set_num_threads(threads)


def scheduler(llm: Any) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def assert_all_returned(llm: Any) -> None:
    """No request, group, row or block is left behind."""
    found = scheduler(llm)
    pool = found.kv_cache_manager.block_pool
    left = (len(found.requests), len(found.running), found.get_request_counts())
    assert left == (0, 0, (0, 0))
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    if hasattr(found, "groups"):
        assert not found.groups
        assert not found._group_of
        assert not found._released
        assert not found._followers
        assert not found._answers
        assert not found._compiling
        assert not found._last_outputs
        assert len(found.backlog) == 0
        assert not found.backlog._order

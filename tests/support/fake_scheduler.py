"""vLLM's real scheduler classes, with groups or without, for a model that is never loaded."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from .fake_worker import BLOCK_SIZE

MAX_MODEL_LEN = 128


@dataclass(frozen=True)
class Options:
    """One engine.

    formulas: False makes vLLM's own scheduler.
    drafts: the most tokens that are drafted at once; 0 for no speculation.
    drafts_for_all: the operator has vLLM draft for all requests, in place of formulas for themselves.
    """

    asynchronous: bool = False
    by_priority: bool = False
    prefix_caching: bool = True
    num_blocks: int = 200
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    watermark: float = 0.0
    sliding_window: int | None = None
    v2_runner: bool = False
    max_adapters: int | None = None
    max_num_scheduled_tokens: int | None = None
    formulas: bool = True
    drafts: int = 0
    drafts_for_all: bool = False


@cache
def _base_config(model: str, drafts: int = 0, drafts_for_all: bool = False) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_marith.engine.speculation import configured, mark

    args = EngineArgs(
        model=model, dtype="float32", max_model_len=MAX_MODEL_LEN, enforce_eager=True, block_size=32
    )
    if drafts_for_all:
        args.speculative_config = {"method": "ngram", "num_speculative_tokens": drafts}
    elif drafts:
        args.additional_config = {"marith": {"speculative": "auto", "max_speculative_tokens": drafts}}
    with configured(args):
        config = args.create_engine_config()
    mark(config)
    return config


@cache
def _structured_output_manager(model: str) -> Any:
    from vllm.v1.structured_output import StructuredOutputManager

    return StructuredOutputManager(_base_config(model))


def make_scheduler(model: Any, options: Options, **kwargs: Any) -> Any:
    """A scheduler as the engine core would build it, but for a KV cache of `options.num_blocks`."""
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from vllm_marith.engine.core.scheduler import AsyncGroupScheduler, GroupScheduler

    config = copy.copy(_base_config(str(model), options.drafts, options.drafts_for_all))
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.scheduler_config.policy = "priority" if options.by_priority else "fcfs"
    config.scheduler_config.max_num_seqs = options.max_num_seqs
    config.scheduler_config.max_num_batched_tokens = options.max_num_batched_tokens
    config.scheduler_config.max_num_scheduled_tokens = options.max_num_scheduled_tokens
    config.scheduler_config.watermark = options.watermark
    config.scheduler_config.async_scheduling = options.asynchronous
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.block_size = BLOCK_SIZE
    config.cache_config.num_gpu_blocks = options.num_blocks
    config.cache_config.enable_prefix_caching = options.prefix_caching

    shape = dict(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if options.sliding_window:
        spec = SlidingWindowSpec(**shape, sliding_window=options.sliding_window)
        groups.append(KVCacheGroupSpec(["sliding"], spec))

    if options.formulas:
        chosen = AsyncGroupScheduler if options.asynchronous else GroupScheduler
    else:
        chosen = AsyncScheduler if options.asynchronous else Scheduler

    class Watched(chosen):
        """Remembers whom vLLM's loop preempted by itself, and which groups were ever let in."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.preempted_by_vllm: list[str] = []
            self.released_once: set[str] = set()

        def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            if sys._getframe(1).f_code is Scheduler.schedule.__code__:
                self.preempted_by_vllm.append(request.request_id)
            super()._preempt_request(request, *args, **kwargs)

        def _release_group(self, group: Any) -> None:
            self.released_once.add(group.name)
            super()._release_group(group)

    scheduler = Watched(
        config,
        KVCacheConfig(options.num_blocks, [], groups),
        _structured_output_manager(str(model)),
        block_size=BLOCK_SIZE,
        **kwargs,
    )
    scheduler.use_v2_model_runner = options.v2_runner
    if options.max_adapters is not None:
        scheduler.lora_config = SimpleNamespace(max_loras=options.max_adapters)
    return scheduler

"""`vllm.LLM` with this project's defaults, for programs that run the engine in their own process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from vllm_marith.language import Formula

QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

CPU_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: starts in seconds instead of half a minute
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # do not pin threads to cores that others may use
}

CPU_OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # bfloat16 products are far slower on CPUs without matrix units for it
    "enforce_eager": True,  # compiling takes longer than a small model's whole run
    "kv_cache_memory_bytes": 256 << 20,
}


def offline_llm(model: str | Path, **options: Any) -> LLM:
    """A `vllm.LLM` that accepts formulas, in this process, with vLLM's start-up talk kept quiet.

    Without a GPU, vLLM's defaults are replaced by ones that suit a small model on a few cores
    (`CPU_OPTIONS`).  `options` go to `vllm.LLM` and win over all defaults; so do environment variables that
    are set already.  Call it before anything imports vllm: some of the variables are read on import.
    """
    import torch

    on_cpu = not torch.cuda.is_available()
    for name, value in (QUIET | CPU_ENVIRONMENT if on_cpu else QUIET).items():
        os.environ.setdefault(name, value)
    defaults: dict[str, Any] = {"logits_processors": ["marith"], "use_tqdm_on_load": False}
    if on_cpu:
        defaults |= CPU_OPTIONS
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from vllm import LLM

    return LLM(str(model), **(defaults | options))


def sampling_params(formula: Formula | None = None, **options: Any) -> SamplingParams:
    """`vllm.SamplingParams(**options)` that carry `formula`, or none: a plain request."""
    if formula is not None:
        return formula.sampling_params(**options)
    from vllm import SamplingParams

    return SamplingParams(**options)

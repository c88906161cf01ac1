"""`vllm.LLM` with this project's defaults, for programs that run the engine in their own process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from vllm_marith.language import Formula

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads take the cores from each other where anything else runs
}

QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

CHATTY_LOGGERS = ("torch._library.triton", "vllm.triton_utils.importing")
"""Warn that a CPU has no Triton, before vLLM has read its level."""

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
    """A `vllm.LLM` that accepts formulas, in this process.

    Without a GPU, vLLM's defaults are replaced by ones that suit a small model on a few cores
    (`CPU_OPTIONS`).  `options` go to `vllm.LLM` and win over all defaults; so do environment variables that
    are set already.  What vLLM and torch say while starting is kept quiet unless VLLM_LOGGING_LEVEL is set.
    torch and vLLM read some of the variables on import; a program that imports them earlier calls
    `prepare_environment` first.
    """
    with _quiet() if prepare_environment() else nullcontext():
        import torch

        defaults: dict[str, Any] = {"logits_processors": ["marith"], "use_tqdm_on_load": False}
        if not torch.cuda.is_available():
            _set_defaults(CPU_ENVIRONMENT)
            defaults |= CPU_OPTIONS
        if Path(model).is_dir():
            _set_defaults({"HF_HUB_OFFLINE": "1"})

        from vllm import LLM

        return LLM(str(model), **(defaults | options))


def prepare_environment() -> bool:
    """Set what torch and vLLM read on import; whether they shall be quiet, i.e. the user set no log level."""
    _set_defaults(ENVIRONMENT)
    if os.environ.get("VLLM_LOGGING_LEVEL", "ERROR") != "ERROR":
        return False
    _set_defaults(QUIET)
    return True


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Python's warnings and those of `CHATTY_LOGGERS`."""
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sampling_params(formula: Formula | None = None, **options: Any) -> SamplingParams:
    """`vllm.SamplingParams(**options)` that carry `formula`, or none: a plain request."""
    if formula is not None:
        return formula.sampling_params(**options)
    from vllm import SamplingParams

    return SamplingParams(**options)

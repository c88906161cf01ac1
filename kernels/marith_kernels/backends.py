"""Which implementation serves a call, and what every call has to bring."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MODULES = {
    ("fuse", "reference"): "reference",
    ("fuse", "torch"): "torch_eager",
    ("fuse", "numba"): "numba_cpu",
    ("fuse", "triton"): "triton_gpu",
    ("replace", "numba"): "numba_replace",
    ("decoding", "reference"): "reference_decoding",
    ("decoding", "torch"): "torch_decoding",
    ("decoding", "numba"): "numba_decoding",
    ("decoding", "triton"): "triton_decoding",
}
FUSE_BACKENDS = ("auto", *(name for operation, name in _MODULES if operation == "fuse"))
DECODING_BACKENDS = ("auto", *(name for operation, name in _MODULES if operation == "decoding"))


def resolve(backend: str, device: torch.device, known: Sequence[str] = FUSE_BACKENDS) -> str:
    """The backend that `backend` stands for on this device, checked to be usable there.

    Raises ValueError for a backend that is not known, RuntimeError for one that cannot run here.
    """
    if backend not in known:
        raise ValueError(f"Unknown backend {backend!r}; known are {', '.join(known)}.")
    if backend == "auto":
        if device.type == "cpu":
            return "numba" if "numba" in known and _installed("numba") else "torch"
        if device.type != "cuda":
            return "torch"
        backend = "triton"
    if backend in ("numba", "triton") and not _installed(backend):
        raise RuntimeError(
            f"The {backend} backend needs {backend}, which is not installed; torch needs nothing."
        )
    if backend == "numba" and device.type != "cpu":
        raise RuntimeError(f"The numba backend computes on CPU tensors, these are on {device}.")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"The triton backend computes on CUDA tensors, these are on {device}.")
    return backend


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def module_of(operation: str, backend: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[operation, backend]}", __package__)


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"Logits are float32, bfloat16 or float16, not {dtype}.")


def check_logits(logits: torch.Tensor, vocab_size: int | None) -> int:
    """The number of columns that count; ValueError if these cannot be logits."""
    if logits.dim() != 2:
        raise ValueError(f"Logits are [rows, vocabulary], not {tuple(logits.shape)}.")
    check_dtype(logits.dtype)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("The tokens of a row of logits must lie next to each other (stride 1).")
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    if not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"vocab_size is {vocab_size} and the logits have {logits.shape[1]} columns.")
    return vocab_size

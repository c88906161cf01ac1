"""The door to the fusion operation: one function, one backend behind it for each kind of machine."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from .program import Batch

BACKENDS = ("auto", "reference", "torch", "numba", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fused(NamedTuple):
    """What `fuse` returns, for G groups."""

    logits: torch.Tensor  # float32 [G, V] energies; log_softmax of a row is the formula's log-distribution
    lse: torch.Tensor  # float32 [G] log-sum-exp of each row; 0 for a row of -inf
    argmax: torch.Tensor  # int64 [G] first token of the highest energy; 0 for a row of -inf


def fuse(
    logits: torch.Tensor,
    batch: Batch,
    *,
    vocab_size: int | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> Fused:
    """Fuse the logits of every group's terms into one row of energies a group.

        for g, program in enumerate(batch.programs):
            if program.linear:   E = sum_i w_i * logits[row_i]                 on the raw logits, no exp
            else:                E, N = program(log_softmax(logits[rows]))     see marith_kernels.program
                                 E = (E / N if program.divide else E) + logsumexp(logits[leader])
            out[g] = E;  lse[g] = logsumexp(E);  argmax[g] = argmax(E)

    log_softmax(out[g]) = out[g] - lse[g] is the log-distribution of formula g. A constant added to a row
    does not change it, and the constants are chosen so that the row lives on the scale of raw logits: a
    formula of one term with weight 1 returns its row bit for bit, and a row with a union in it sits where
    the leader (term 0) sits. Repetition penalties, which are not shift-invariant, then act alike on all.

    -inf: under a non-zero weight in a sum it bans the token, whatever the weight's sign. Under max and min
    it is an ordinary value. A row of nothing but -inf has lse = 0. NaN never comes out of logits that are
    finite or -inf; logits that hold NaN or +inf, and energies beyond the range of float32, give undefined
    values in their group.

    logits: [R, >= vocab_size] float32, bfloat16 or float16, on the batch's device, any row stride.
    vocab_size: columns that count (default: all).
    out: float32 [G, >= vocab_size], any row stride, not overlapping logits; what lies beyond vocab_size
    becomes -inf.
        Default: a new [G, vocab_size].
    backend: "auto" takes triton for CUDA tensors, and for CPU tensors numba, or torch where numba is not
    installed.
        "reference" computes in float64.

    Raises ValueError if shapes, dtypes or devices do not fit or the backend is unknown, RuntimeError if the
    backend is not installed or not for this device.
    """
    vocab_size = logits.shape[-1] if vocab_size is None else vocab_size
    _check(logits, batch, vocab_size, out)
    name = resolve(backend, logits.device)
    if out is None:
        out = torch.empty(batch.n_groups, vocab_size, device=logits.device)
    if batch.n_groups == 0:
        return Fused(out, out.new_empty(0), torch.empty(0, dtype=torch.int64, device=out.device))
    lse, argmax = _module(name).fuse(logits, batch, vocab_size, out)
    return Fused(out, lse, argmax)


def resolve(backend: str, device: torch.device) -> str:
    """The backend that `backend` stands for on this device, checked to be usable there."""
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}; known are {', '.join(BACKENDS)}.")
    if backend == "auto":
        if device.type == "cpu":
            return "numba" if _installed("numba") else "torch"
        if device.type == "cuda":
            backend = "triton"
        else:
            return "torch"
    if backend in ("numba", "triton") and not _installed(backend):
        raise RuntimeError(
            f"The {backend} backend needs {backend}, which is not installed; torch needs nothing."
        )
    if backend == "numba" and device.type != "cpu":
        raise RuntimeError(f"The numba backend computes on CPU tensors, these are on {device}.")
    return backend


def warmup(
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> str:
    """Compile what serving logits of these dtypes will need, and return the backend's name.

    A cold compilation takes seconds to a minute; numba and triton both keep the result on disk.
    """
    name = resolve(backend, torch.device(device))
    _check_dtypes(dtypes)
    module = _module(name)
    if hasattr(module, "warmup"):
        module.warmup(dtypes)
    return name


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _module(name: str) -> ModuleType:
    modules = {
        "reference": "reference",
        "torch": "torch_eager",
        "numba": "numba_cpu",
        "triton": "triton_gpu",
    }
    return importlib.import_module(f".{modules[name]}", __package__)


def _check_dtypes(dtypes: Sequence[torch.dtype]) -> None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"Logits are float32, bfloat16 or float16, not {dtype}.")


def _check(logits: torch.Tensor, batch: Batch, vocab_size: int, out: torch.Tensor | None) -> None:
    if logits.dim() != 2:
        raise ValueError(f"Logits are [rows, vocabulary], not {tuple(logits.shape)}.")
    if logits.dtype not in DTYPES:
        raise ValueError(f"Logits are float32, bfloat16 or float16, not {logits.dtype}.")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("The tokens of a row of logits must lie next to each other (stride 1).")
    if not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"vocab_size is {vocab_size} and the logits have {logits.shape[1]} columns.")
    if batch.n_rows > logits.shape[0]:
        raise ValueError(
            f"The batch reads row {batch.n_rows - 1} and the logits have {logits.shape[0]} rows."
        )
    if batch.code.device != logits.device:
        raise ValueError(f"The batch is on {batch.code.device} and the logits are on {logits.device}.")
    if out is None:
        return
    if out.dtype != torch.float32 or out.device != logits.device or out.dim() != 2:
        raise ValueError(f"out must be a float32 matrix on {logits.device}, not {out.dtype} on {out.device}.")
    if out.shape[0] != batch.n_groups or out.shape[1] < vocab_size or out.stride(1) != 1:
        raise ValueError(
            f"out must be [{batch.n_groups}, >= {vocab_size}] of stride 1, not {tuple(out.shape)}."
        )

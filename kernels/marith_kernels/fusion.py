"""The door to the fusion operation: one function, one backend behind it for each kind of machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .backends import check_dtype, check_logits, module_of, resolve
from .batch import Batch


class Extra(NamedTuple):
    """Rows that `fuse` reads beside the logits: rows of an earlier `fuse`, or made by other means."""

    logits: torch.Tensor  # float32 [S, >= vocab_size], any row stride
    lse: torch.Tensor  # float32 [S] log-sum-exp of each row; 0 where the row is read as weightless


class Fused(NamedTuple):
    """What `fuse` returns, for G groups."""

    logits: torch.Tensor  # float32 [G, V] energies; log_softmax of a row is the formula's log-distribution
    lse: torch.Tensor  # float32 [G] log-sum-exp of each row; 0 for a row of -inf
    argmax: torch.Tensor  # int64 [G] first token of the highest energy; 0 for a row of -inf


def fuse(
    logits: torch.Tensor,
    batch: Batch,
    *,
    extra: Extra | Fused | None = None,
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
    extra: what the batch's rows from `first_extra` on are, in place of logits; their log-sum-exp is taken as
    it is given. Nothing of the logits is copied.
    vocab_size: columns that count (default: all).
    out: float32 [G, >= vocab_size], any row stride, not overlapping logits or extra rows; what lies beyond
    vocab_size becomes -inf.
        Default: a new [G, vocab_size]; on a GPU its row stride is a multiple of 16.
    backend: "auto" takes triton for CUDA tensors, and for CPU tensors numba, or torch where numba is not
    installed.
        "reference" computes in float64.

    Raises ValueError if shapes, dtypes or devices do not fit or the backend is unknown, RuntimeError if the
    backend is not installed or not for this device.
    """
    vocab_size = check_logits(logits, vocab_size)
    check_rows(logits, batch, out, vocab_size)
    rows, row_lse = None, None
    if batch.n_extra_rows:
        rows, lse = _check_extra(extra, batch, vocab_size)
        row_lse = torch.cat([lse.new_empty(batch.first_extra), lse])
    name = resolve(backend, logits.device)
    if out is None:
        out = empty_rows(batch.n_groups, vocab_size, logits.device)[:, :vocab_size]
    return run(logits, batch, vocab_size, out, name, rows, row_lse)


def run(
    logits: torch.Tensor,
    batch: Batch,
    vocab_size: int,
    out: torch.Tensor,
    backend: str,
    extra: torch.Tensor | None = None,
    row_lse: torch.Tensor | None = None,
) -> Fused:
    """`fuse` without its checks, on a backend that `resolve` has named.

    row_lse: float32 [first_extra + S], log-sum-exps by row as the batch counts. Those at `batch.lse_row` are
    filled in here; those of the extra rows, and of logits rows in the batch's `known_lse`, are read. None
    where there is nothing to read.
    """
    if batch.n_groups == 0:
        return Fused(out, out.new_empty(0), torch.empty(0, dtype=torch.int64, device=out.device))
    lse, argmax = module_of("fuse", backend).fuse(logits, batch, vocab_size, out, extra, row_lse)
    return Fused(out, lse, argmax)


def empty_rows(n: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """float32 [n, >= vocab_size], not initialised; on a GPU its stride is a multiple of 16."""
    width = vocab_size if device.type == "cpu" else -(-vocab_size // 16) * 16
    return torch.empty(n, width, device=device)


def warmup(
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    vocab_size: int = 151_936,
    stride: int | None = None,
) -> str:
    """Compile what `fuse` will need for logits of these dtypes and sampling and verification for fused ones.

    Returns the backend's name.

    A cold compilation takes seconds to a minute; numba and triton both keep the result on disk. Triton
    compiles anew for a vocabulary or a row stride (default: the vocabulary) that is divisible by 16 where
    the other was not, so tell it those of the model.
    """
    device = torch.device(device)
    name = resolve(backend, device)
    for dtype in dtypes:
        check_dtype(dtype)
    module = module_of("fuse", name)
    if name == "numba":
        module.warmup(dtypes)
        module_of("replace", name).warmup(dtypes)
        module_of("decoding", name).warmup([torch.float32])
    elif name == "triton":
        module.warmup(dtypes, device, vocab_size, stride or vocab_size)
        module_of("decoding", name).warmup(device, vocab_size, stride or vocab_size)
    return name


def check_rows(logits: torch.Tensor, batch: Batch, out: torch.Tensor | None, vocab_size: int) -> None:
    """ValueError if the batch does not fit the logits, or `out` does not fit the batch."""
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


def _check_extra(
    extra: Extra | Fused | None, batch: Batch, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if extra is None:
        raise ValueError(f"The batch reads {batch.n_extra_rows} extra rows and extra is None.")
    rows, lse = extra.logits, extra.lse
    device = batch.code.device
    for what, tensor, dims in (("extra.logits", rows, 2), ("extra.lse", lse, 1)):
        if tensor.dtype != torch.float32 or tensor.device != device or tensor.dim() != dims:
            raise ValueError(
                f"{what} must be float32 of {dims} dimensions on {device}, not {tensor.dtype} of "
                f"{tensor.dim()} on {tensor.device}."
            )
    if len(rows) < batch.n_extra_rows or len(lse) != len(rows):
        raise ValueError(
            f"The batch reads {batch.n_extra_rows} extra rows; there are {len(rows)}, and {len(lse)} lse."
        )
    if rows.shape[1] < vocab_size or (rows.stride(1) != 1 and rows.shape[1] > 1):
        raise ValueError(
            f"extra.logits must be [rows, >= {vocab_size}] of stride 1, not {tuple(rows.shape)}."
        )
    return rows, lse

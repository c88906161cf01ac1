"""The fused operation on GPUs: one launch for a batch of weighted sums, two for any other.

No host synchronisation, no allocation whose size depends on data, so a CUDA graph may hold it. Every kernel
takes formulas as data; what is compiled are a few variants by logits dtype, number of terms or stack slots,
whether the batch is `extended`, and whether the row stride and the vocabulary are divisible by 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import triton_combine, triton_lse
from .batch import Batch
from .fusion import empty_rows
from .program import Program


def fuse(
    logits: torch.Tensor,
    batch: Batch,
    vocab_size: int,
    out: torch.Tensor,
    extra: torch.Tensor | None = None,
    row_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `marith_kernels.fusion.run`. Returns (lse, argmax)."""
    if batch.n_lse_rows:
        row_lse = logits.new_empty(logits.shape[0], dtype=torch.float32) if row_lse is None else row_lse
        triton_lse.fill(row_lse, logits, batch, vocab_size)
    return triton_combine.combine(logits, row_lse, batch, vocab_size, out, extra)


def warmup(dtypes: Sequence[torch.dtype], device: torch.device, vocab_size: int, stride: int) -> None:
    """Compile every variant for logits of this shape; nothing is left to compile while requests wait."""
    rows = [list(range(triton_combine.MAX_TERMS))]
    programs = []
    n_terms = 1
    while n_terms <= triton_combine.MAX_TERMS:
        programs.append(Program([("push", 0, 1.0)] + [("add", t, 1.0) for t in range(1, n_terms)]))
        n_terms *= 2
    for every, last in ((triton_combine.SLOTS, "max"), (triton_combine.EXTENDED_SLOTS, "logadd")):
        for slots in every:
            deep = [("push", 0, 1.0)] * slots + [("pop_add", -1, 1.0)] * (slots - 1) + [(last, 1, 1.0)]
            programs += [Program(deep), Program(deep, divide=True)]
    for dtype in dtypes:
        logits = torch.zeros(triton_combine.MAX_TERMS, stride, dtype=dtype, device=device)
        for program in programs:
            out = empty_rows(1, vocab_size, device)
            fuse(logits, Batch.build([program], rows, device), vocab_size, out)

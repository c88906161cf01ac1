"""The LM head on one row per linear group instead of one per member.

A linear formula whose weights sum to 1 may be applied before the head as well as after it::

    sum_i w_i (W h_i + b)  =  W (sum_i w_i h_i) + b            for sum_i w_i = 1

so the head runs on one combined hidden state per group.  The law needs a head that is affine: soft-capped
logits, or a head that mixes its rows otherwise, break it.  Whether a model's head obeys it is not guessed
from its class but tried once, on random hidden states (`obeys_law`).

Off by default (``combine_hidden_states`` in the settings).  It pays where the head is bound by arithmetic,
which on GPUs takes hundreds of rows; scripts/bench_head.py measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import marith_kernels
import torch

Head = Callable[[torch.Tensor], torch.Tensor | None]

TOLERANCE = 1e-4
"""Largest difference between both orders, relative to the largest logit, that float32 rounding explains;
for other dtypes it grows with their precision, see `obeys_law`."""

_WEIGHT_SUM_TOLERANCE = 1e-5


def combinable(program: marith_kernels.Program) -> bool:
    """Whether a formula may be applied to hidden states: linear, and its weights sum to 1."""
    if not program.linear:
        return False
    codes = program.encoded
    terms, weights = codes[1], codes[2].view("float32")
    # The number one is no row of the head, and a single term has nothing to combine.
    if len(terms) < 2 or (terms < 0).any():
        return False
    return abs(float(weights.sum()) - 1.0) < _WEIGHT_SUM_TOLERANCE


@dataclass(frozen=True)
class HeadPlan:
    """Which rows of a step the head needs not see.

    Attributes:
        batch: programs of the combinable groups, over rows of hidden states.
        leaders: int64 ``[groups]``, the row that receives the combined hidden state.
        kept: int64 ``[kept]``, all rows but the followers of those groups.
    """

    batch: marith_kernels.Batch
    leaders: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def build(
        cls,
        programs: Sequence[marith_kernels.Program],
        rows: Sequence[Sequence[int]],
        num_rows: int,
        device: torch.device,
    ) -> HeadPlan:
        """programs, rows: of the combinable groups; ``rows[g][0]`` is the leader's."""
        skipped = {row for members in rows for row in members[1:]}
        kept = [row for row in range(num_rows) if row not in skipped]
        return cls(
            marith_kernels.Batch.build(programs, rows, device),
            torch.tensor([members[0] for members in rows]).to(device, non_blocking=True),
            torch.tensor(kept).to(device, non_blocking=True),
        )

    def run(self, head: Head, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[rows, vocab]`` of ``hidden [rows, size]``, with the leaders' rows fused.

        The followers' rows are zero: nothing reads them, their tokens are replaced.
        """
        combined = marith_kernels.fuse(hidden, self.batch).logits
        hidden = hidden.index_copy(0, self.leaders, combined.to(hidden.dtype))
        logits = head(hidden.index_select(0, self.kept))
        if logits is None:
            return None
        return logits.new_zeros(len(hidden), logits.shape[1]).index_copy_(0, self.kept, logits)


@torch.inference_mode()
def obeys_law(head: Head, size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``head`` is affine, tried with weights that amplify: 2.5 and -1.5.

    Hidden states of unit variance, as a final norm leaves them, times 4 so that a soft cap would show.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(8, size, generator=generator)).to(device=device, dtype=dtype)
    weights = torch.tensor([[2.5], [-1.5]], device=device)
    pairs = hidden.float().view(4, 2, size)
    combined = head((pairs * weights).sum(1).to(dtype))
    each = head(hidden)
    if combined is None or each is None:
        return False
    fused = (each.float().view(4, 2, -1) * weights).sum(1)
    scale = each.float().abs().amax()
    precision = TOLERANCE * (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps)
    return bool((combined.float() - fused).abs().amax() <= min(0.05, precision) * scale)

"""`Shape` on the V2 model runner: vLLM's sampler up to the point where it draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class ShapeV2:
    """See `drafting.Shape`.

    V2's sampler knows drafts by the rows of logits that a request has: the one behind k drafts stands k rows
    behind the request's first.  So a row is given those in front of it, too, where the caller has none.

    Args:
        sampler: vLLM's ``Sampler``.
        batch: the step's, whose rows are meant.
        most: tokens that a sequence may be longer than `batch` says.
    """

    def __init__(self, sampler: Any, batch: InputBatch, most: int) -> None:
        self._sampler = sampler
        self._batch = batch
        self._most = most

    def temperature(self, rows: Sequence[int]) -> torch.Tensor:
        temperatures = self._sampler.sampling_states.temperature.np[self._slots(rows)]
        return torch.from_numpy((temperatures != 0).astype(np.float32)).to(self._batch.idx_mapping.device)

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[int], ahead: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        sampler, device = self._sampler, logits.device
        if not sampler.needs_logits_processing[self._slots(rows)].any():
            return logits.float()
        runs = list(_runs(rows, [len(drafted) for drafted in ahead]))
        lengths = [len(ahead[end - 1]) + 1 for _, end in runs]
        ends = np.cumsum(lengths)
        picked = np.concatenate(
            [np.arange(last - (end - first), last) for (first, end), last in zip(runs, ends, strict=True)]
        )
        total = int(ends[-1])
        whole = logits.float()
        where = torch.from_numpy(picked).to(device)
        if total > len(logits):
            whole = whole.new_zeros(total, logits.shape[1]).index_copy_(0, where, whole)
        owners = self._slots([rows[first] for first, _ in runs])
        expanded = torch.from_numpy(owners.repeat(lengths)).to(device)
        local = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)).to(device)
        states = sampler.req_states
        tokens = [
            part
            for (_, end), slot in zip(runs, owners.tolist(), strict=True)
            for part in (states.last_sampled_tokens[slot], ahead[end - 1])
        ]
        shaped: torch.Tensor = sampler.apply_sampling_params(
            whole,
            expanded,
            torch.from_numpy(owners).to(device),
            owners,
            # What a request's first row was computed from is the last of its tokens.
            states.total_len.gpu[expanded].long() - 1 + local,
            torch.cat(tokens).to(self._batch.input_ids.dtype),
            local,
            self._batch.seq_lens_cpu_upper_bound.numpy()[[rows[first] for first, _ in runs]] + self._most,
        )
        return shaped if total == len(logits) else shaped.index_select(0, where)

    def _slots(self, rows: Sequence[int]) -> np.ndarray:
        """Where the runner keeps the requests of these rows."""
        slots: np.ndarray = self._batch.idx_mapping_np[list(rows)]
        return slots


def _runs(rows: Sequence[int], drafted: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of stretches of one request in which every row has one draft more than that before."""
    begins = [
        i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1] or drafted[i] != drafted[i - 1] + 1
    ]
    return list(zip(begins, [*begins[1:], len(rows)], strict=True))

"""`Forward` on the V1 model runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...group import constituent_of
from .forward import MemberForward


class ForwardV1(MemberForward):
    """See `forward.MemberForward`."""

    def _constituent(self, row: int) -> int:
        request = self._runner.requests[self._runner.input_batch.req_ids[row]]
        return constituent_of(request.sampling_params.extra_args)

    def _blocks(self, group: int, rows: Sequence[int]) -> tuple[torch.Tensor, int]:
        batch = self._runner.input_batch
        table = batch.block_table[group]
        index = torch.tensor(rows, device=self._runner.device)
        return table.get_device_tensor(batch.num_reqs)[index], table.block_size

    def _adapters(self, rows: Sequence[int]) -> tuple[np.ndarray, set[Any]]:
        batch = self._runner.input_batch
        return batch.request_lora_mapping[list(rows)], set(batch.lora_id_to_lora_request.values())

    def _ids(self) -> torch.Tensor:
        ids: torch.Tensor = self._runner.input_ids.gpu
        return ids

"""`Forward` on the V2 model runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .forward import MemberForward

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class ForwardV2(MemberForward):
    """See `forward.MemberForward`.

    Args:
        owners: request -> its constituent.
        batch: the step's, whose rows are meant.
    """

    def __init__(self, runner: Any, owners: Mapping[str, int], batch: InputBatch) -> None:
        super().__init__(runner)
        self._owners = owners
        self._batch = batch

    def _constituent(self, row: int) -> int:
        return self._owners[self._batch.req_ids[row]]

    def _blocks(self, group: int, rows: Sequence[int]) -> tuple[torch.Tensor, int]:
        tables = self._runner.block_tables
        index = torch.from_numpy(self._batch.idx_mapping_np[list(rows)]).to(self._runner.device)
        return tables.block_tables[group].gpu[index], tables.block_sizes[group]

    def _adapters(self, rows: Sequence[int]) -> tuple[np.ndarray, set[Any]]:
        state = self._runner.lora_state
        of_rows: np.ndarray = state.lora_ids[self._batch.idx_mapping_np[list(rows)]]
        return of_rows, state.get_activate_loras(self._batch.req_ids)

    def _ids(self) -> torch.Tensor:
        ids: torch.Tensor = self._runner.input_buffers.input_ids
        return ids

"""Which rows and tokens of a step belong to which constituent.

All of it is known on the host before the forward pass, so that nothing has to be asked of the device: index
tensors are made here once and copied over without waiting, and again only when rows or their lengths change.
While every row decodes, they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class Share:
    """One constituent's part of a step.  Indices are int64 and on the device, if nothing else is said.

    Attributes:
        rows: ``[rows]``, its rows in the step's batch, ascending; `rows_cpu` on the host.
        tokens: ``[tokens]``, its tokens in the step's batch.
        last: ``[rows]``, each row's last token, counted among `tokens`.
        starts: int32 ``[rows + 1]``, each row's first token, counted among `tokens`; `starts_cpu` on the
            host.
        longest: tokens of the longest row.
    """

    rows: torch.Tensor
    rows_cpu: torch.Tensor
    tokens: torch.Tensor
    last: torch.Tensor
    starts: torch.Tensor
    starts_cpu: torch.Tensor
    longest: int

    @classmethod
    def build(cls, rows: np.ndarray, counts: np.ndarray, device: torch.device) -> Share:
        """rows: ascending row numbers; counts: tokens of *every* row of the step."""
        own = counts[rows]
        starts = np.concatenate([[0], own.cumsum()])
        shift = (counts.cumsum() - counts)[rows] - starts[:-1]
        tokens = np.repeat(shift, own) + np.arange(starts[-1])

        def there(values: np.ndarray, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
            on_host = torch.from_numpy(values).to(dtype)
            if device.type == "cuda":  # a copy from ordinary memory may wait for the device
                on_host = on_host.pin_memory()
            return on_host, on_host.to(device, non_blocking=True)

        rows_cpu, rows_there = there(rows)
        starts_cpu, starts_there = there(starts, torch.int32)
        last, tokens_there = there(starts[1:] - 1)[1], there(tokens)[1]
        return cls(rows_there, rows_cpu, tokens_there, last, starts_there, starts_cpu, int(own.max()))

    def of(self, batch: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The part of a step's common attention metadata that is this share's."""

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            return values.index_select(0, self.rows_cpu if values.device.type == "cpu" else self.rows)

        bounds = of_rows(batch.seq_lens_cpu_upper_bound)
        return batch.replace(
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts_cpu,
            seq_lens=of_rows(batch.seq_lens),
            seq_lens_cpu_upper_bound=bounds,
            num_reqs=len(self.rows),
            num_actual_tokens=len(self.tokens),
            max_query_len=self.longest,
            max_seq_len=batch.max_seq_len if bounds is None else int(bounds.max()),
            block_table_tensor=of_rows(batch.block_table_tensor),
            slot_mapping=batch.slot_mapping.index_select(0, self.tokens),
            positions=None if batch.positions is None else batch.positions.index_select(0, self.tokens),
            is_prefilling=of_rows(batch.is_prefilling),
            req_idx=None if batch.req_idx is None else batch.req_idx[self.rows_cpu.numpy()],
            rswa_prefix_lens=of_rows(batch.rswa_prefix_lens),
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


@dataclass(frozen=True)
class Routing:
    """A step's rows by constituent.

    Attributes:
        num_rows: of the step.
        shares: of the constituents that have rows in it, by their numbers.
    """

    num_rows: int
    shares: dict[int, Share]

    @property
    def only(self) -> int | None:
        """The constituent that has all rows, if there is one: then nothing needs to be cut."""
        return next(iter(self.shares)) if len(self.shares) == 1 else None

    def place(self, row: int) -> tuple[int, int, int]:
        """A row's constituent, and the first and the end of its tokens among that one's."""
        for j, share in self.shares.items():
            rows = share.rows_cpu.numpy()
            found = int(np.searchsorted(rows, row))
            if found < len(rows) and rows[found] == row:
                return j, int(share.starts_cpu[found]), int(share.starts_cpu[found + 1])
        raise IndexError(f"the step has no row {row}")


class Router:
    """Where a runner says, before each step, whose rows it has.

    `routing` is the step's; None outside of steps, when vLLM runs the model for other purposes (memory
    profiling, warm-up).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.routing: Routing | None = None
        self._key: tuple[bytes, bytes] | None = None
        self._last: Routing | None = None

    def begin_step(self, constituents: Sequence[int], counts: Sequence[int]) -> None:
        """constituents, counts: of each row, its constituent and its number of tokens in this step."""
        owners, lengths = np.asarray(constituents, np.int64), np.asarray(counts, np.int64)
        key = owners.tobytes(), lengths.tobytes()
        if key != self._key:
            shares = {
                int(j): Share.build(np.flatnonzero(owners == j), lengths, self.device)
                for j in np.unique(owners)
            }
            self._key, self._last = key, Routing(len(owners), shares)
        self.routing = self._last

    def end_step(self) -> Routing | None:
        """The begun step's routing, which is over."""
        routing, self.routing = self.routing, None
        return routing

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


def _spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... counts[0] numbers, then the same from starts[1], and so on."""
    ends = counts.cumsum()
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])


@dataclass(frozen=True)
class Share:
    """One constituent's part of a step.  Indices are int64 and on the device, if nothing else is said.

    Attributes:
        rows: ``[rows]``, its rows in the step's batch, ascending; `rows_cpu` on the host.
        tokens: ``[tokens]``, its tokens in the step's batch; `tokens_cpu` on the host.
        last: ``[outputs]``, the tokens that logits are wanted of, counted among `tokens`: each row's last,
            and those before it where it checks drafts.
        outputs: ``[outputs]``, their places in the step's logits; `outputs_cpu` on the host.
        starts: int32 ``[rows + 1]``, each row's first token, counted among `tokens`; `starts_cpu` on the
            host.
        longest: tokens of the longest row.
    """

    rows: torch.Tensor
    rows_cpu: torch.Tensor
    tokens: torch.Tensor
    tokens_cpu: torch.Tensor
    last: torch.Tensor
    outputs: torch.Tensor
    outputs_cpu: torch.Tensor
    starts: torch.Tensor
    starts_cpu: torch.Tensor
    longest: int

    @classmethod
    def build(cls, rows: np.ndarray, counts: np.ndarray, outputs: np.ndarray, device: torch.device) -> Share:
        """rows: ascending row numbers; counts, outputs: of *every* row of the step, its tokens and those of
        them that logits are wanted of."""
        own, wanted = counts[rows], outputs[rows]
        starts = np.concatenate([[0], own.cumsum()])
        tokens = _spans((counts.cumsum() - counts)[rows], own)

        def there(values: np.ndarray, dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
            on_host = torch.from_numpy(values).to(dtype)
            if device.type == "cuda":  # a copy from ordinary memory may wait for the device
                on_host = on_host.pin_memory()
            return on_host, on_host.to(device, non_blocking=True)

        rows_cpu, rows_there = there(rows)
        starts_cpu, starts_there = there(starts, torch.int32)
        tokens_cpu, tokens_there = there(tokens)
        outputs_cpu, outputs_there = there(_spans((outputs.cumsum() - outputs)[rows], wanted))
        return cls(
            rows=rows_there,
            rows_cpu=rows_cpu,
            tokens=tokens_there,
            tokens_cpu=tokens_cpu,
            last=there(_spans(starts[1:] - wanted, wanted))[1],
            outputs=outputs_there,
            outputs_cpu=outputs_cpu,
            starts=starts_there,
            starts_cpu=starts_cpu,
            longest=int(own.max()),
        )

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
        num_outputs: rows of the step's logits: one a request, and one more for each draft that it checks.
        shares: of the constituents that have rows in it, by their numbers.
    """

    num_outputs: int
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
        self._key: tuple[bytes, ...] | None = None
        self._last: Routing | None = None

    def begin_step(
        self, constituents: Sequence[int], counts: Sequence[int], drafted: Sequence[int] | None = None
    ) -> None:
        """constituents, counts: of each row, its constituent and its number of tokens in this step.

        drafted: how many of them, at the row's end, are drafts to be checked; none by default.
        """
        owners, lengths = np.asarray(constituents, np.int64), np.asarray(counts, np.int64)
        outputs = np.ones_like(lengths) if drafted is None else np.asarray(drafted, np.int64) + 1
        key = owners.tobytes(), lengths.tobytes(), outputs.tobytes()
        if key != self._key:
            shares = {
                int(j): Share.build(np.flatnonzero(owners == j), lengths, outputs, self.device)
                for j in np.unique(owners)
            }
            self._key, self._last = key, Routing(int(outputs.sum()), shares)
        self.routing = self._last

    def end_step(self) -> Routing | None:
        """The begun step's routing, which is over."""
        routing, self.routing = self.routing, None
        return routing

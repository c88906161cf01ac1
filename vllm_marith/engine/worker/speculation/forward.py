"""`Forward` with vLLM's model runners: some members' next tokens, outside of vLLM's steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..constituents.models import Constituents


class MemberForward(ABC):
    """See `drafting.Forward`.

    The members' blocks reach over the tokens that are drafted: the scheduler allocates them ahead of every
    step (``num_lookahead_tokens``).  What is written there for drafts that do not stand is overwritten by
    whatever takes their place.

    Args:
        runner: vLLM's ``GPUModelRunner``, of which the two differ in where they keep things: see the abstract
            methods.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @abstractmethod
    def _constituent(self, row: int) -> int:
        """The base model of a request row."""

    @abstractmethod
    def _blocks(self, group: int, rows: Sequence[int]) -> tuple[torch.Tensor, int]:
        """int32 ``[rows, blocks]``, block numbers of request rows in a KV-cache group; and a block's size."""

    @abstractmethod
    def _adapters(self, rows: Sequence[int]) -> tuple[np.ndarray, set[Any]]:
        """int32 ``[rows]``, LoRA ids of request rows; and the LoRA requests of the whole step."""

    @abstractmethod
    def _ids(self) -> torch.Tensor:
        """The runner's buffer of token ids."""

    @torch.inference_mode()
    def __call__(
        self, rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        model = self._runner.get_model()
        ends = np.cumsum(counts)
        if not isinstance(model, Constituents):
            return self._logits_of(0, rows, firsts, counts, tokens)
        owners = np.asarray([self._constituent(row) for row in rows])
        parts, places = [], []
        for j in np.unique(owners):
            its = np.flatnonzero(owners == j)
            place = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in its])
            picked = torch.from_numpy(place).to(tokens.device)
            parts.append(
                self._logits_of(
                    int(j),
                    [rows[i] for i in its],
                    [firsts[i] for i in its],
                    [counts[i] for i in its],
                    tokens.index_select(0, picked),
                ).float()
            )
            places.append(picked)
        if len(parts) == 1:
            return parts[0]
        logits = parts[0].new_empty(len(tokens), parts[0].shape[1])
        for part, picked in zip(parts, places, strict=True):
            logits.index_copy_(0, picked, part)
        return logits

    def _logits_of(
        self, j: int, rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        """As `__call__`, for members of one constituent."""
        runner = self._runner
        model = runner.get_model()
        several = isinstance(model, Constituents)
        first, count = np.asarray(firsts), np.asarray(counts)
        starts = torch.from_numpy(np.concatenate([[0], count.cumsum()]).astype(np.int32))
        lengths = torch.from_numpy((first + count).astype(np.int32))
        owner = np.repeat(np.arange(len(rows)), count)
        positions_cpu = first[owner] + np.arange(len(owner)) - starts.numpy()[owner]
        positions = torch.from_numpy(positions_cpu).to(runner.device)
        owner_there = torch.from_numpy(owner).to(runner.device)
        metadata: dict[str, Any] = {}
        slots_of: dict[str, torch.Tensor] = {}
        for group, spec in enumerate(runner.kv_cache_config.kv_cache_groups):
            if several and group != j:
                continue
            blocks, block_size = self._blocks(group, rows)
            block = blocks[owner_there, positions // block_size]
            slots = block.long() * block_size + positions % block_size
            batch = CommonAttentionMetadata(
                query_start_loc=starts.to(runner.device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(runner.device),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=len(rows),
                num_actual_tokens=len(tokens),
                max_query_len=int(count.max()),
                max_seq_len=int(lengths.max()),
                block_table_tensor=blocks,
                slot_mapping=slots,
                positions=positions,
                is_prefilling=torch.zeros(len(rows), dtype=torch.bool),
            )
            for attention in runner.attn_groups[group]:
                made = attention.build_metadata(batch)
                metadata.update(dict.fromkeys(attention.layer_names, made))
            slots_of.update(dict.fromkeys(spec.layer_names, slots))
        self._activate_adapters(j, rows, count)
        context = set_forward_context(
            metadata,
            runner.vllm_config,
            num_tokens=len(tokens),
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=slots_of,
        )
        with context:
            if several:
                slots = next(iter(slots_of.values()))
                hidden = model.run(j, tokens, positions, slots, metadata)
                logits = model.head(j, hidden)
            else:
                # The device's own type for token ids, as in vLLM's steps: another would compile anew.
                ids = tokens.to(self._ids().dtype)
                hidden = runner.model(input_ids=ids, positions=positions, intermediate_tensors=None)
                logits = runner.model.compute_logits(hidden)
        assert logits is not None
        return logits

    def _activate_adapters(self, j: int, rows: Sequence[int], counts: np.ndarray) -> None:
        runner = self._runner
        if runner.lora_config is None:
            return
        of_rows, requests = self._adapters(rows)
        adapters = tuple(of_rows.repeat(counts))
        runner._set_active_loras(adapters, adapters, requests)
        model = runner.get_model()
        if isinstance(model, Constituents):
            assert model.adapters is not None
            model.adapters.begin_alone(j)

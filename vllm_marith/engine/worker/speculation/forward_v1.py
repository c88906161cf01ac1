"""`Forward` on the V1 model runner: some members' next tokens, outside of vLLM's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...group import constituent_of
from ..constituents.models import Constituents


class ForwardV1:
    """See `drafting.Forward`.

    The members' blocks reach over the tokens that are drafted: the scheduler allocates them ahead of every
    step (``num_lookahead_tokens``).  What is written there for drafts that do not stand is overwritten by
    whatever takes their place.

    Args:
        runner: vLLM's ``GPUModelRunner``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner

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
        index, owner_there = torch.tensor(rows), torch.from_numpy(owner)
        metadata: dict[str, Any] = {}
        slots_of: dict[str, torch.Tensor] = {}
        for group, spec in enumerate(runner.kv_cache_config.kv_cache_groups):
            if several and group != j:
                continue
            table = runner.input_batch.block_table[group]
            blocks = table.get_device_tensor(runner.input_batch.num_reqs)[index.to(runner.device)]
            block = blocks[owner_there.to(runner.device), positions // table.block_size]
            slots = block.long() * table.block_size + positions % table.block_size
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
                made = attention.get_metadata_builder().build(0, batch)
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
                ids = tokens.to(runner.input_ids.gpu.dtype)
                hidden = runner.model(input_ids=ids, positions=positions, intermediate_tensors=None)
                logits = runner.model.compute_logits(hidden)
        assert logits is not None
        return logits

    def _activate_adapters(self, j: int, rows: Sequence[int], counts: np.ndarray) -> None:
        runner = self._runner
        if runner.lora_config is None:
            return
        adapters = runner.input_batch.request_lora_mapping[list(rows)].repeat(counts)
        requests = set(runner.input_batch.lora_id_to_lora_request.values())
        runner._set_active_loras(tuple(adapters), tuple(adapters), requests)
        model = runner.get_model()
        if isinstance(model, Constituents):
            assert model.adapters is not None
            model.adapters.begin_alone(j)

    def _constituent(self, row: int) -> int:
        request = self._runner.requests[self._runner.input_batch.req_ids[row]]
        return constituent_of(request.sampling_params.extra_args)

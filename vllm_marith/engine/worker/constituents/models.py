"""The model of an engine with several constituents, as vLLM's runners see it.

A step's rows are divided by constituent (`routing`); each constituent runs on its own rows and tokens, with
its own attention metadata, slots and LM head.  What comes out has the shape of one model's: hidden states
``[tokens, size]`` and logits ``[rows, vocab]``.

The hidden states of the constituents differ in size and dtype and never meet.  Those of the base model are
returned; all are kept here until the next step begins.  When the step's logits are asked for, once, each
constituent's last rows go through its own head, so the heads do no more work than they would in engines of
their own; `states_of` and `heads` are for whoever scores a prompt's other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available, override_forward_context

from .attention import backend_of
from .routing import Router, Routing

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .adapters import ConstituentAdapters


NO_TOKEN = -1e4
"""Logit of a number that is padding in one of the models' vocabularies and thus stands for no token.

The same in all of them and finite: whatever a formula of weight N > 0 makes of such rows, it stays far below
any token.  float16 holds it.
"""


class Constituents(nn.Module):
    """All base models of an engine; number 0 is the one that it was started with."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        models: Sequence[nn.Module],
        configs: Sequence[VllmConfig],
        layers: Sequence[Sequence[str]],
        block_sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        """
        Args:
            models, configs: of each constituent.
            layers: names of each constituent's attention layers.
            block_sizes: tokens in a KV-cache block of each constituent.
        """
        super().__init__()
        self.models = nn.ModuleList(models)
        self.configs = configs
        self.layers = layers
        self.adapters: ConstituentAdapters | None = None  # where LoRA is on
        self.router = Router(device)
        sizes = [config.model_config.get_vocab_size() for config in configs]
        self.num_columns, self.num_tokens = sizes[0], min(sizes)
        # What the step's forward pass left, and whether its logits have not been asked for yet.
        self._step: tuple[Routing, dict[int, torch.Tensor]] | None = None
        self._pending = False
        registry = vllm_config.compilation_config.static_forward_context
        for j, (names, config) in enumerate(zip(layers, configs, strict=True)):
            backends: dict[type, type] = {}
            for layer in (registry[name] for name in names):
                base = layer.attn_backend
                if base not in backends:
                    backends[base] = backend_of(base, j, block_sizes[j], config, self.router)
                layer.attn_backend = backends[base]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base model's embeddings: vLLM asks every model for some, and uses none of them here."""
        base: Any = self.models[0]
        return base.embed_input_ids(input_ids)

    def run(
        self,
        constituent: int,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor | None,
        metadata: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[tokens, size]`` of one constituent on tokens of its own rows.

        Args:
            constituent: its number.
            input_ids, positions: int64 ``[tokens]``.
            slots: int64 ``[tokens]``, where their keys and values go in its KV cache; None to keep none.
            metadata: attention metadata by layer, cut to the same tokens; by default the forward context's.
        """
        with self._context(constituent, slots, metadata):
            return self.models[constituent](input_ids, positions)

    def head(self, constituent: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[rows, vocab]`` of a constituent's hidden states ``[rows, size]``.

        As many columns as the base model has.  None where tensor parallelism gathers them on another rank.
        """
        model: Any = self.models[constituent]
        logits = model.compute_logits(hidden)
        if logits is None or logits.shape[1] == self.num_columns == self.num_tokens:
            return logits
        padded = logits.new_full((len(logits), self.num_columns), NO_TOKEN)
        padded[:, : self.num_tokens] = logits[:, : self.num_tokens]
        return padded

    def heads(self, constituents: Sequence[int], hidden: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Logits ``[rows, vocab]`` of hidden states ``[rows of each, size of each]``, in their order.

        constituents: whose they are.
        """
        if len(set(constituents)) == 1:
            return self.head(constituents[0], torch.cat(list(hidden)))
        found = [self.head(j, states) for j, states in zip(constituents, hidden, strict=True)]
        given = [logits for logits in found if logits is not None]
        if not given:
            return None
        dtype = reduce(torch.promote_types, (logits.dtype for logits in given))
        return torch.cat([logits.to(dtype) for logits in given])

    def states_of(self, row: int) -> torch.Tensor:
        """Hidden states ``[tokens, size]`` of one row of the step whose forward pass was the last."""
        assert self._step is not None
        routing, states = self._step
        constituent, first, end = routing.place(row)
        return states[constituent][first:end]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states ``[tokens, size]`` of the base model; zero, or anything, for others' tokens.

        Outside of a step every constituent runs on every token, one after the other: that is the most memory
        that a step can take.
        """
        routing, self._step = self.router.end_step(), None
        self._pending = routing is not None
        if self.adapters is not None:
            self.adapters.begin(routing)
        if routing is None:
            every = [self.run(j, input_ids, positions, None) for j in range(len(self.models))]
            return every[0]
        if routing.only is not None:
            slots = self._slots(routing.only)
            states = {routing.only: self.run(routing.only, input_ids, positions, slots)}
        else:
            states = {
                j: self.run(
                    j,
                    input_ids.index_select(0, share.tokens),
                    positions.index_select(0, share.tokens),
                    self._slots(j).index_select(0, share.tokens),
                )
                for j, share in routing.shares.items()
            }
        self._step = routing, states
        if routing.only == 0:
            return states[0]
        base = self.configs[0].model_config
        size, dtype = base.get_hidden_size(), base.dtype
        assert isinstance(dtype, torch.dtype)
        if 0 not in states:
            # What vLLM makes of it nobody reads; it takes one row's memory.
            return input_ids.new_zeros(1, size, dtype=dtype).expand(len(input_ids), size)
        hidden = states[0].new_zeros(len(input_ids), size)
        return hidden.index_copy_(0, routing.shares[0].tokens, states[0])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits ``[rows, vocab]`` of the last token of each of the step's requests, and of their drafts.

        The first call after a step's forward pass is that; any other takes the hidden states that it is
        given for the base model's (a plain request's prompt log-probabilities).
        """
        pending, self._pending = self._pending, False
        if not pending:
            return self.head(0, hidden_states)
        assert self._step is not None
        routing, states = self._step
        if len(hidden_states) != routing.num_outputs:
            raise RuntimeError(
                f"expected one row a request and draft, {routing.num_outputs}, found {len(hidden_states)}"
            )
        if routing.only is not None:
            last = routing.shares[routing.only].last
            return self.head(routing.only, states[routing.only].index_select(0, last))
        parts = [
            (share.outputs, self.head(j, states[j].index_select(0, share.last)))
            for j, share in routing.shares.items()
        ]
        given = [logits for _, logits in parts if logits is not None]
        if not given:
            return None
        dtype = reduce(torch.promote_types, (logits.dtype for logits in given))
        combined = given[0].new_empty(routing.num_outputs, given[0].shape[1], dtype=dtype)
        for rows, logits in parts:
            assert logits is not None
            combined.index_copy_(0, rows, logits.to(dtype))
        return combined

    def _slots(self, constituent: int) -> torch.Tensor:
        """Where the step's tokens go in a constituent's KV cache, int64 ``[tokens]`` of the whole batch."""
        slots = get_forward_context().slot_mapping
        assert isinstance(slots, dict), "dual-batch overlap is refused at the start"
        return slots[self.layers[constituent][0]]

    def _context(
        self, constituent: int, slots: torch.Tensor | None, metadata: Mapping[str, Any] | None
    ) -> Any:
        """The forward context in which a constituent's layers see its own tokens."""
        if not is_forward_context_available():
            return nullcontext()
        changes: dict[str, Any] = {}
        if slots is not None:
            changes["slot_mapping"] = dict.fromkeys(self.layers[constituent], slots)
        if metadata is not None:
            changes["attn_metadata"] = metadata
        # Graphs are captured for a number of tokens that is not this constituent's.
        return override_forward_context(
            replace(
                get_forward_context(),
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                batch_descriptor=None,
                **changes,
            )
        )

"""LoRA adapters of several base models: vLLM's LoRA manager, once for each constituent.

vLLM tells its manager, before each step, the adapter of every row and token of the batch.  A constituent
computes its own rows only, so its manager is told of those.  Which they are is known a little later, when the
step's routing is: what vLLM said is kept until the forward pass begins.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase

from ... import patches
from ...constituents.adapters import number_of
from ...settings import Settings
from .models import Constituents
from .routing import Routing, Share

if TYPE_CHECKING:
    import torch
    from vllm.lora.lora_model import LoRAModel

_LOAD = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model"


def install() -> None:
    """Gives runners whose model is several a manager of several; idempotent, once per worker process."""
    patches.patch(_LOAD, _with_constituents)


def _with_constituents(load_lora_model: Any) -> Any:
    @functools.wraps(load_lora_model)
    def loading(self: Any, model: Any, vllm_config: Any, device: torch.device) -> Any:
        if not isinstance(model, Constituents):
            return load_lora_model(self, model, vllm_config, device)
        names = tuple(Settings.of(vllm_config).constituents)
        self.lora_manager = model.adapters = ConstituentAdapters(model, names, device)
        return model

    return loading


class ConstituentAdapters:
    """What a model runner asks of its LoRA manager, answered by one manager for each constituent.

    Each has ``max_loras`` slots of its own; vLLM's scheduler lets in as many adapters of all models together.
    """

    def __init__(self, model: Constituents, names: Sequence[str], device: torch.device) -> None:
        """names: of constituent 1, 2, ..."""
        self._names = names
        self.managers: list[_Manager] = []
        for j, (module, config) in enumerate(zip(model.models, model.configs, strict=True)):
            known: Any = module
            manager = _Manager(config, device, known.embedding_modules)
            manager.create_lora_manager(known, config)
            manager.whose = f"the constituent '{names[j - 1]}'" if j else "the base model"
            self.managers.append(manager)
        # What vLLM said last: the step's adapters, and the adapter of each row and token of the batch.
        self._step: tuple[set[LoRARequest], LoRAMapping] | None = None

    # ---------------------------------------------------------------- a step

    def set_active_adapters(self, requests: set[LoRARequest], mapping: LoRAMapping) -> None:
        self._step = requests, mapping

    def begin(self, routing: Routing | None) -> None:
        """Puts the step's adapters in force.  routing: None outside of steps, where all models run on all."""
        if self._step is None:
            return
        requests, mapping = self._step
        if routing is None:
            for manager in self.managers:
                manager.set_active_adapters(requests, mapping)
            return
        for j, share in routing.shares.items():
            self._activate(j, requests, cut(mapping, share))

    def begin_alone(self, constituent: int) -> None:
        """Puts in force what was said for rows of one constituent, outside of steps."""
        if self._step is not None:
            self._activate(constituent, *self._step)

    def _activate(self, constituent: int, requests: set[LoRARequest], mapping: LoRAMapping) -> None:
        wanted = {request for request in requests if request.lora_int_id in mapping.index_mapping}
        self.managers[constituent].set_active_adapters(wanted, mapping)

    # ------------------------------------------------------------ management

    def add_adapter(self, request: LoRARequest) -> bool:
        own = self.managers[number_of(request, self._names)]
        for manager in self.managers:
            if manager is not own:  # loaded in place, it may have been another model's
                manager.remove_adapter(request.lora_int_id)
        return own.add_adapter(request)

    def remove_adapter(self, adapter_id: int) -> bool:
        removed = [manager.remove_adapter(adapter_id) for manager in self.managers]
        return any(removed)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Raises ValueError, vLLM's own, for an adapter that is not loaded."""
        having = (m for m in self.managers if adapter_id in m.list_adapters())
        return next(having, self.managers[0]).pin_adapter(adapter_id)

    def list_adapters(self) -> set[int]:
        return set().union(*(manager.list_adapters() for manager in self.managers))

    def remove_all_adapters(self) -> None:
        for manager in self.managers:
            manager.remove_all_adapters()
        self._step = None

    def supports_tower_connector_lora(self) -> bool:
        return False  # multimodal models are refused at the start

    # --------------------------------------------------- profiling and warm-up

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        with ExitStack() as caches:
            for manager in self.managers:
                caches.enter_context(manager.dummy_lora_cache())
            yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return max(manager.get_dummy_lora_warmup_rank(default_rank) for manager in self.managers)

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        added = [manager.add_dummy_lora(request, rank) for manager in self.managers]
        return all(added)


class _Manager(LRUCacheWorkerLoRAManager):
    """vLLM's, which takes no adapter of another model's shape.

    vLLM copies an adapter into buffers of its model's size, and a smaller one leaves the rest of them zero.

    Attributes:
        whose: the constituent, in a sentence.
    """

    whose: str

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        lora = super()._load_adapter(lora_request)
        manager = self._adapter_manager
        for name, module in manager.modules.items():
            layer = getattr(module, "base_layer", None)
            if not isinstance(layer, LinearBase):
                continue
            size = layer.input_size  # of all ranks together, as in the adapter's file
            for part in manager.packed_modules.get(name, (name,)):
                weights = lora.loras.get(part)
                if weights is not None and weights.lora_a.shape[-1] != size:
                    raise ValueError(
                        f"marith: the adapter '{lora_request.lora_name}' is not for {self.whose}, whose "
                        f"{part} reads {size} numbers and not {weights.lora_a.shape[-1]}; which model it is "
                        "for says its base_model_name, or base_model_name_or_path in its adapter_config.json"
                    )
        return lora


def cut(mapping: LoRAMapping, share: Share) -> LoRAMapping:
    """One constituent's part of a step's mapping, which has an adapter for each token and row of logits."""
    tokens = np.asarray(mapping.index_mapping)[share.tokens_cpu.numpy()]
    outputs = np.asarray(mapping.prompt_mapping)[share.outputs_cpu.numpy()]
    return replace(mapping, prompt_mapping=tuple(outputs.tolist()), index_mapping=tuple(tokens.tolist()))

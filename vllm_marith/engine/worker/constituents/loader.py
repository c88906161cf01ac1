"""Loads the constituents one after the other, each as vLLM loads it alone.

A model loader is vLLM's public seam for how a model comes to be: the configuration names a load format
(`engine.constituents.config.prepare`), and this module registers the loader for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.utils.mem_utils import format_gib

from ...constituents.config import LOAD_FORMAT, vllm_configs
from ...settings import Settings
from .models import Constituents

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.marith")  # within vLLM's, whose level and handlers the operator sets


@register_model_loader(LOAD_FORMAT)
class ConstituentsLoader(BaseModelLoader):
    """Gives a `Constituents` module in place of the base model."""

    def download_model(self, model_config: ModelConfig) -> None:
        raise NotImplementedError("constituents are downloaded when they are loaded")

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        raise NotImplementedError("weights cannot be reloaded in an engine of several constituents")

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> Constituents:
        settings = Settings.of(vllm_config)
        configs = vllm_configs(vllm_config, settings)
        registry = vllm_config.compilation_config.static_forward_context
        models: list[nn.Module] = []
        layers: list[list[str]] = []
        for j, (name, config) in enumerate(zip(["base", *settings.constituents], configs, strict=True)):
            known = set(registry)
            # The base model's layers keep their names; vLLM reads numbers out of layers' names.
            where = f"constituent_{j}" if j else prefix
            with set_model_tag(where) if j else nullcontext():
                loader = get_model_loader(config.load_config)
                model = loader.load_model(config, config.model_config, prefix=where)
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            logger.info(
                "marith: constituent %s: weights of %s GiB in %s",
                name,
                format_gib(weights),
                config.model_config.dtype,
            )
            models.append(model)
            layers.append([n for n in registry if n not in known and isinstance(registry[n], Attention)])
        return Constituents(
            vllm_config=vllm_config,
            models=models,
            configs=configs,
            layers=layers,
            block_sizes=settings.block_sizes,
            device=torch.device(str(vllm_config.device_config.device)),
        )

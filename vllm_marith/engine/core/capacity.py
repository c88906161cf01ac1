"""What the KV cache of an engine with several constituents holds, said once at the start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import iter_layer_specs

from vllm_marith.plan import lower

from ..constituents.memory import MAX_WASTE, Blocks
from ..settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.marith")  # within vLLM's, whose level and handlers the operator sets


def report(config: VllmConfig, cache: KVCacheConfig) -> None:
    """Logs each constituent's share of a block, and how many groups of each preset fit at once."""
    settings = Settings.of(config)
    names = ["base", *settings.constituents]
    groups = cache.kv_cache_groups
    specs = [next(iter(iter_layer_specs(group.kv_cache_spec))) for group in groups]
    sizes = [spec.block_size for spec in specs]
    token_bytes = [
        spec.page_size_bytes * len(group.layer_names) // spec.block_size
        for spec, group in zip(specs, groups, strict=True)
    ]
    blocks = Blocks.of_sizes(sizes, token_bytes)
    for name, size, token, waste in zip(names, sizes, token_bytes, blocks.waste, strict=True):
        logger.log(
            logging.WARNING if waste > MAX_WASTE else logging.INFO,
            "marith: constituent %s: %d bytes of KV cache a token, %d tokens a block, %.1f%% of it unused",
            name,
            token,
            size,
            100 * waste,
        )
    numbers = {name: i for i, name in enumerate(settings.constituents, 1)}
    length, rows = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
    presets = settings.load_presets()
    for name, formula in presets.formulas.items():
        speculation = settings.speculation(formula, presets.presets[name].speculative, demanded=False)
        terms = lower(formula).terms + (speculation.drafters if speculation else ())
        models = [formula.terms[term].model for term in terms]
        members = [0 if model is None else numbers[model] for model in models]
        needed = sum(cdiv(length, sizes[j]) for j in members)
        logger.info(
            "marith: preset %s: %d members; the KV cache holds %d such groups of %d tokens, a step's rows %d",
            name,
            len(members),
            (cache.num_blocks - 1) // needed,
            length,
            rows // len(members),
        )

"""What `marith plan` needs of a model, from its configuration alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_marith.language import Formula
from vllm_marith.plan import lower

from .capacity import Model
from .errors import DeploymentError


def model_facts(name: str, dtype: Any = "auto") -> Model:
    """As vLLM would load it, by vLLM's own reading of the configuration.

    Parameters are counted on a model without memory (torch's meta device); quantised models count as if their
    numbers had the dtype's size.

    Raises:
        DeploymentError: it cannot be read, or is none that generates text.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from vllm.config import ModelConfig, ParallelConfig

    try:
        config = ModelConfig(model=name, dtype=dtype)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config.hf_config)
    except (OSError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DeploymentError(f"the model '{name}' cannot be read: {lines[0] if lines else error}") from None
    stored: Any = config.dtype  # a torch dtype by now
    number = torch.empty((), dtype=stored).element_size()
    heads, layers = config.get_total_num_kv_heads(), config.get_num_layers(ParallelConfig())
    parameters = sum(parameter.numel() for parameter in module.parameters())
    head = module.get_output_embeddings()
    tied = head is not None and head.weight is module.get_input_embeddings().weight
    looked_up = 0 if tied else module.get_input_embeddings().weight.numel()
    return Model(
        name=Path(name).name,
        token_bytes=2 * layers * heads * config.get_head_size() * number,
        weight_bytes=parameters * number,
        parameters=parameters - looked_up,
        kv_heads=heads,
    )


def members_of(formula: Formula, base: Model, constituents: Mapping[str, Model]) -> list[Model]:
    """The model of each member of the formula's groups.

    Raises:
        DeploymentError: a term needs a model that is not named.
    """
    found = []
    for term in lower(formula).terms:
        name = formula.terms[term].model
        if name is not None and name not in constituents:
            raise DeploymentError(f"the term '{term}' needs the model '{name}'; name it with --constituent")
        found.append(base if name is None else constituents[name])
    return found

"""A LoRA adapter in the format of PEFT, which vLLM loads; trained without needing PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
SCALE = 2.0
"""`lora_alpha / r`: the weight of the low-rank product."""


class LowRank(torch.nn.Module):
    """`linear(x) + SCALE * B A x`, with `linear` frozen, A [rank, in], B [out, rank] and B = 0 at first."""

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + SCALE * F.linear(F.linear(x, self.A), self.B)


def adapt(model: LlamaForCausalLM, rank: int) -> dict[str, LowRank]:
    """Freeze `model`, put a `LowRank` in place of each target, and return them by module name."""
    model.requires_grad_(False)
    adapted = {}
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS and isinstance(module, torch.nn.Linear):
            adapted[name] = LowRank(module, rank)
            setattr(model.get_submodule(parent), leaf, adapted[name])
    return adapted


def save_adapter(adapted: dict[str, LowRank], rank: int, base: str, folder: Path) -> None:
    """Write the adapter into `folder`; `base` is the base model's name as PEFT records it."""
    tensors = {
        f"base_model.model.{name}.lora_{half}.weight": getattr(module, half).detach().contiguous()
        for name, module in adapted.items()
        for half in "AB"
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "base_model_name_or_path": base,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

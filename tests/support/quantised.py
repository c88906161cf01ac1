"""A small model in int8, as compressed-tensors stores it, and the same arithmetic in float32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip
"""W8A8: a scale for each output channel of a weight, and for each token of a layer's input."""


def make(model: Path, path: Path) -> Path:
    """The model at `model` with its linear layers in int8; its embedding, norms and head stay as they are."""
    shutil.copytree(model, path)
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": SCHEME}))
    return path


def load(model: Path) -> torch.nn.Module:
    """What `make` makes of the model at `model`, computed in float32."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, layer in network.named_modules():
        if name.endswith("_proj"):
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            layer.weight = torch.nn.Parameter((layer.weight / scale).round() * scale, requires_grad=False)
            layer.register_forward_pre_hook(_rounding)
    return network


def _rounding(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (rows,) = inputs
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return ((rows / scale).round() * scale,)

"""vLLM's LoRA products on CPUs, without the adapter that rows of the base model get there by mistake.

A row without an adapter has the index -1.  vLLM's Triton kernels skip such rows; its torch versions index
the stacked weights with it, so that in a batch with other adapters a row of the base model is computed with
whatever lies in the last slot.  A formula over a base model and its adapter has such a batch at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import patches

_OPS = "vllm.lora.ops.torch_ops.lora_ops"  # where the products of prefills find those of decodes
_WRAPPER = "vllm.lora.punica_wrapper.punica_cpu"  # has imported them by name
PRODUCTS = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def install() -> None:
    """Wraps the three products, in both modules that name them; idempotent, once per worker process."""
    for module in (_OPS, _WRAPPER):
        for product in PRODUCTS:
            patches.patch(f"{module}:{product}", skipping_the_base)


def skipping_the_base(product: Callable[..., None]) -> Callable[..., None]:
    """`product`, which leaves the output's rows without an adapter as they are."""

    @functools.wraps(product)
    def skipping(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # inputs [rows, in], output_tensor [rows, out], changed in place, lora_indices_tensor [rows].
        (rows,) = torch.nonzero(lora_indices_tensor >= 0, as_tuple=True)
        if len(rows) == len(lora_indices_tensor) or len(inputs) != len(lora_indices_tensor):
            product(inputs, lora_b_weights, output_tensor, lora_indices_tensor, *args, **kwargs)
        elif len(rows):
            chosen = output_tensor[rows]
            product(inputs[rows], lora_b_weights, chosen, lora_indices_tensor[rows], *args, **kwargs)
            output_tensor[rows] = chosen

    return skipping

"""Rows of the base model in a batch with adapters, on a CPU."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from vllm_marith.engine.worker import cpu_lora

SLOTS, RANK, IN, OUT, VOCAB = 3, 2, 5, 8, 11
BATCHES = {
    "alternating": [0, -1, 2, -1, 1],
    "one_base_row": [2, 2, -1, 2],
    "base_only": [-1, -1, -1],
    "adapters_only": [1, 0, 2],
    "one_row": [-1],
}
prefill_and_decode = pytest.mark.parametrize("is_prefill", [True, False])
batches = pytest.mark.parametrize("name", BATCHES)


class Layers:
    """vLLM's wrapper around one batch, and random weights for it."""

    def __init__(self, slots: list[int], is_prefill: bool) -> None:
        from vllm.lora.layers import LoRAMapping
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        torch.manual_seed(0)
        self.slots = slots
        self.wrapper = PunicaWrapperCPU(16, 16, torch.device("cpu"))
        mapping = LoRAMapping(*[tuple(slot + 1 for slot in slots)] * 2, is_prefill=is_prefill)
        self.wrapper.update_metadata(mapping, [1, 2, 3], SLOTS, VOCAB)
        self.x = torch.randn(len(slots), IN)
        self.y = torch.randn(len(slots), OUT)
        self.down = torch.randn(SLOTS, 1, RANK, IN)
        self.up = torch.randn(SLOTS, 1, OUT, RANK)
        self.embedded = torch.randn(len(slots), RANK)

    def linear(self, broken: float | None = None) -> torch.Tensor:
        """Two slices of a packed layer.  broken: a value that the last slot's weights have everywhere."""
        down, y = self.down.clone(), self.y.clone()
        if broken is not None:
            down[-1] = broken
        half = self.up[..., : OUT // 2, :]
        self.wrapper.add_lora_linear(y, self.x, (down, down), (half, half), 0.5, (OUT // 2, OUT // 2))
        return y

    def logits(self) -> torch.Tensor:
        y = self.y.clone()
        self.wrapper.add_lora_logits(y, self.x, self.down, self.up, 0.5)
        return y

    def embedding(self) -> torch.Tensor:
        y = self.y.clone()
        self.wrapper.add_lora_embedding(y, self.embedded, self.up)
        return y

    def expected(self, kind: str) -> torch.Tensor:
        """Row by row, in float64."""
        y = self.y.double()
        for row, slot in enumerate(self.slots):
            if slot < 0:
                continue
            down, up = self.down[slot, 0].double(), self.up[slot, 0].double()
            low = self.embedded[row].double() if kind == "embedding" else 0.5 * down @ self.x[row].double()
            half = up[: OUT // 2] @ low
            y[row] += torch.cat([half, half]) if kind == "linear" else up @ low
        return y.float()


@prefill_and_decode
@batches
@pytest.mark.parametrize("kind", ["linear", "logits", "embedding"])
def test_the_base_model_stays_what_it_is(kind: str, name: str, is_prefill: bool) -> None:
    cpu_lora.install()
    layers = Layers(BATCHES[name], is_prefill)
    torch.testing.assert_close(getattr(layers, kind)(), layers.expected(kind), rtol=1e-5, atol=1e-5)
    base = [slot < 0 for slot in layers.slots]
    assert torch.equal(getattr(layers, kind)()[base], layers.y[base])


@prefill_and_decode
def test_a_broken_adapter_breaks_nobody_else(is_prefill: bool) -> None:
    cpu_lora.install()
    found = Layers(BATCHES["alternating"], is_prefill).linear(broken=float("nan"))
    assert [bool(row.isnan().any()) for row in found] == [False, False, True, False, False]


@prefill_and_decode
@pytest.mark.parametrize("kind", ["linear", "logits", "embedding"])
def test_vllm_alone_is_wrong(kind: str, is_prefill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The day this fails, `vllm_marith.engine.worker.cpu_lora` can go."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for module in (lora_ops, punica_cpu):
        for product in cpu_lora.PRODUCTS:
            original: Any = inspect.unwrap(getattr(module, product))
            monkeypatch.setattr(module, product, original)
    layers = Layers(BATCHES["alternating"], is_prefill)
    assert (getattr(layers, kind)() - layers.expected(kind))[1].abs().max() > 0.1

"""The class that ``--logits-processor marith`` names.

It is the switch, not the mechanism: vLLM's logits processors see the rows after the raw
log-probabilities were taken and cannot read another row consistently, so the formula is applied
by the worker's hooks, which the construction of this class installs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import LogitsProcessor

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate


class FormulaLogitsProcessor(LogitsProcessor):
    """Serves formulas (arXiv 2311.14479) given in ``extra_args["marith"]``."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        from .settings import Settings
        from .worker import runner_v1

        runner_v1.install()
        if Settings.of(vllm_config).warmup:
            runner_v1.warmup(device)

    def is_argmax_invariant(self) -> bool:
        """True: `apply` changes nothing, and vLLM then calls it for no greedy batch."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Nothing is kept per row here."""

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits unchanged: fusion happened before this point."""
        return logits

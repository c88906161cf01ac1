"""The class that ``--logits-processor marith`` names, for both model runners.

It is the switch, not the mechanism: vLLM's logits processors see the rows after the raw
log-probabilities were taken (V1) or after grammar mask and penalties (V2) and cannot read another row
consistently, so the formula is applied by the worker's hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcRequestState


class FormulaLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Serves formulas (arXiv 2311.14479) given in ``extra_args["marith"]``.

    One class with both interfaces, which differ in two signatures: which runner there is, each worker
    decides for itself, and it may be another than the frontend's.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        where: torch.device | LogitsProcRequestState,
        is_pin_memory: bool = False,
    ) -> None:
        """where: the device (V1), or V2's state of all requests."""
        from .settings import Settings
        from .worker import cpu_lora, cpu_rejection, rows, runner_v1, runner_v2
        from .worker.classifiers.loading import load_classifiers

        if isinstance(where, torch.device):
            device = where
            runner_v1.install(constituents=bool(Settings.of(vllm_config).constituents))
            self.classifiers = load_classifiers(vllm_config, device)
            if current_platform.is_cpu():
                cpu_rejection.install()
        else:
            device = where.device
            if not runner_v2.installed():
                # Requests would be served, silently, with their leader's distribution.
                raise RuntimeError(
                    "formulas cannot be served: the worker was started without the extension that "
                    "`--logits-processor marith` sets (parallel_config.worker_extension_cls)"
                )
        if vllm_config.lora_config is not None and current_platform.is_cpu():
            cpu_lora.install()
        if Settings.of(vllm_config).warmup:
            dtype = vllm_config.model_config.dtype
            assert isinstance(dtype, torch.dtype)
            rows.warmup(device, dtype, vllm_config.model_config.get_vocab_size())

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Nothing: formulas are checked where their prompts are rendered (`frontend`)."""

    def is_argmax_invariant(self) -> bool:
        """V1.  True: `apply` changes nothing, and vLLM then calls it for no greedy batch."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1.  Nothing is kept per row here."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2.  False: the row needs no processing on our account."""
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | Any = None) -> torch.Tensor:
        """The logits unchanged: fusion happened before this point."""
        return logits

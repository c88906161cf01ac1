"""Another plugin's logits processor and an operator's worker extension, to be served beside."""

from __future__ import annotations

from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

FAVOURITE = 300


class Favouring(V1LogitsProcessor, V2LogitsProcessor):
    """Makes every request say `FAVOURITE`."""

    def __init__(self, *args: Any) -> None: ...
    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None: ...
    def apply(self, logits: Any, ctx: Any = None) -> Any:
        logits[:, FAVOURITE] += 1000
        return logits


class Extension:
    def neighbour(self) -> str:
        return type(self).__name__

"""What a worker counts; see `vllm_marith.engine.core.figures` for how it is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class WorkerFigures:
    """Counts of this process since the last `drain`.

    Attributes:
        fusion_seconds: the host's time in the fusion.  On a CPU that is the fusion; on a GPU it is the
            launching of its kernels, which run while the host goes on.
    """

    def __init__(self) -> None:
        self.fusion_seconds = 0.0

    @contextmanager
    def fusing(self) -> Iterator[None]:
        """Times its body."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.fusion_seconds += time.perf_counter() - start

    def drain(self) -> dict[str, float]:
        """The counts as plain data, which start again at zero."""
        seconds, self.fusion_seconds = self.fusion_seconds, 0.0
        return {"fusion_seconds": seconds}


FIGURES = WorkerFigures()
"""This worker process's."""

"""What a worker counts; see `vllm_marith.engine.core.figures` for how it is asked."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class ClassifierFigures:
    """What one classifier has cost.

    Attributes:
        texts: read by the classifier.
        hits: texts that were known from before.
        batches: forward passes.
        seconds: of tokenizing and reading, waiting for the device included.
    """

    texts: int = 0
    hits: int = 0
    batches: int = 0
    seconds: float = 0.0

    def drain(self) -> dict[str, float]:
        """The counts as plain data, which start again at zero."""
        counts = asdict(self)
        self.texts = self.hits = self.batches = 0
        self.seconds = 0.0
        return counts


class WorkerFigures:
    """Counts of this process since the last `drain`.

    Attributes:
        fusion_seconds: the host's time in the fusion.  On a CPU that is the fusion; on a GPU it is the
            launching of its kernels, which run while the host goes on.  Classifiers are part of it.
        calls: of members while formulas drafted, by the formula's label and the member's name.
        classifiers: by name; whoever runs one counts in its figures.
    """

    def __init__(self) -> None:
        self.fusion_seconds = 0.0
        self.calls: Counter[tuple[str, str]] = Counter()
        self.classifiers: dict[str, ClassifierFigures] = {}

    @contextmanager
    def fusing(self) -> Iterator[None]:
        """Times its body."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.fusion_seconds += time.perf_counter() - start

    def drain(self) -> dict[str, Any]:
        """The counts as plain data, which start again at zero."""
        seconds, self.fusion_seconds = self.fusion_seconds, 0.0
        calls = sorted(self.calls.items())
        self.calls.clear()
        read = {name: figures.drain() for name, figures in self.classifiers.items()}
        return {"fusion_seconds": seconds, "calls": calls, "classifiers": read}


FIGURES = WorkerFigures()
"""This worker process's."""

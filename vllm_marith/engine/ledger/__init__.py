"""The ledger: what is touched in vLLM, why, how, and what would make it unnecessary.

Data only, a file for each process that a request passes through; `vllm_marith.engine.patches` probes and
applies it.
"""

from . import constituents, core, distributed, frontend, speculation, worker, worker_v2
from .entry import Entry

LEDGER: tuple[Entry, ...] = (
    *frontend.ENTRIES,
    *core.ENTRIES,
    *distributed.ENTRIES,
    *worker.ENTRIES,
    *worker_v2.ENTRIES,
    *constituents.ENTRIES,
    *speculation.ENTRIES,
)

__all__ = ["LEDGER", "Entry"]

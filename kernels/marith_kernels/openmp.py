"""Run compiled tasks on the OpenMP threads that torch already has.

A thread pool of our own (numba's `parallel=True` brings one) would compete with torch's: after every
operation the OpenMP threads spin for some milliseconds, and vLLM pins each of them to a core of its own. So
the tasks go to the same pool, through the one function that both GNU's and LLVM's runtimes export for it.
Where that function is not to be found, or in a child of `fork` (whose inherited pool has no threads and
would hang), the calling thread does the work alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _gomp_parallel():
    """torch's `void GOMP_parallel(void (*task)(void *), void *data, unsigned threads, unsigned flags)`."""
    libtorch = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    for library in (None, libtorch):  # None: what the process preloaded, which torch then uses too
        try:
            function = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


def available_threads() -> int:
    """Threads that `run` would use for a large task: `torch.get_num_threads()`, or 1 (see above)."""
    return 1 if _forked or _gomp_parallel() is None else torch.get_num_threads()


def run(task: Any, data: int, *, parallel: bool) -> None:
    """Call the ctypes function `task(data)` once on every thread of the team, until all have returned.

    The GIL is released meanwhile. Always the full team: libgomp would end the threads that a smaller one
    leaves out.
    """
    threads = available_threads() if parallel else 1
    if threads > 1:
        _gomp_parallel()(ctypes.cast(task, ctypes.c_void_p), data, threads, 0)
    else:
        task(data)

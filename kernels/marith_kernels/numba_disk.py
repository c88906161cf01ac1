"""What numba compiles for CPUs, kept on disk.

numba's disk cache looks only at the file of the function that it stores, and would go on using code
compiled from an older `numba_math`. So only the outermost functions are cached, as closures over a stamp of
all the source: what a function closes over is part of numba's key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numba import cfunc, njit, types

from .numba_math import FAST

# Of the numbers that a task reads; bfloat16 and float16 travel as integers of their size, see
# `numba_math.widen`.
LIKE = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.float16: np.int16(0)}


def stamp() -> int:
    """Identifies the source of all that is compiled, `program`'s operation numbers included. Never 0."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("numba_*.py")), here / "program.py"]
    return crc32(b"".join(file.read_bytes() for file in files)) or 1


def on_disk(compiler: Callable, function: Callable) -> Any:
    """`function` compiled, and kept on disk where a directory for it is writable and the disk not full."""
    try:
        return compiler(cache=True)(function)
    except OSError:
        pass
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    return compiler(cache=False)(function)


def compile_task(function: Callable) -> Any:
    """`void (*)(int64 address of the arguments)`, a C function for `openmp.run`."""
    signature = types.void(types.int64)
    compiler = functools.partial(cfunc, signature, fastmath=FAST, nopython=True, error_model="numpy")
    return on_disk(compiler, function).ctypes


def compile_function(signature: Any, function: Callable) -> Any:
    """A function of numpy arrays, for Python."""
    return on_disk(functools.partial(njit, signature, fastmath=FAST, nogil=True), function)

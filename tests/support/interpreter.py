"""vLLM's V2 model runner on a CPU, for tests: its Triton kernels run in Triton's interpreter.

vLLM takes V2 only where Triton has a driver.  Here a driver that compiles nothing stands in its place:
with ``TRITON_INTERPRET=1`` every kernel launch goes to the interpreter and no driver is asked.
"""

from __future__ import annotations

import os
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # No warm-up and no compilation: the interpreter takes minutes for what a GPU does at start.
    "VLLM_CPU_CI_ENV": "1",
    "OMP_NUM_THREADS": "1",
}


def prepare() -> None:
    """Before anything imports triton or vLLM in this process."""
    os.environ.update(ENVIRONMENT)
    _pretend_a_driver()
    _force_boolean_masks()


def _pretend_a_driver() -> None:
    from triton.backends import Backend, backends
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

    # The rest of the interface is for launching compiled kernels.
    Driver.__abstractmethods__ = frozenset()
    backends.clear()
    backends["cpu"] = Backend(compiler=None, driver=Driver)


def _force_boolean_masks() -> None:
    """A mask made of a scalar and a tensor is an integer array in the interpreter, which numpy refuses."""
    import numpy as np
    from triton.runtime import interpreter

    native = interpreter._interpreter

    class BooleanMasks:
        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

        def load(self, pointers: Any, mask: Any, *args: Any) -> Any:
            return native.load(pointers, np.ascontiguousarray(mask, dtype=np.bool_), *args)

        def store(self, pointers: Any, values: Any, mask: Any, *args: Any) -> Any:
            return native.store(pointers, values, np.ascontiguousarray(mask, dtype=np.bool_), *args)

    interpreter._interpreter = BooleanMasks()

"""Touching vLLM: the only place that does, and only what stands in the ledger.

Each entry of the ledger (`ledger`) says *what* is touched, *why*, *how*, and which
upstream change would *remove* the need.  `missing` probes the installed vLLM for all of them without
changing anything, and `patch` is the only place that assigns to a vLLM symbol, so that nothing can be
touched without standing there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from .ledger import LEDGER, Entry

__all__ = ["LEDGER", "SUPPORTED", "Entry", "is_patched", "missing", "patch", "shield_llvmlite"]

SUPPORTED = ">=0.32,<0.34"
"""Range of vLLM releases that the suite has passed on; docs/vllm-versions.md says what ran and how."""


def shield_llvmlite() -> None:
    """Lets vLLM start a second engine in a process that has numba loaded.

    On CPUs without Triton, ``vllm.triton_utils.dispatcher`` looks into the ``__dict__`` of every module
    attribute.  llvmlite's library handle answers any attribute with a wrapped C function, for
    ``__dict__`` too, and the look fails.  An empty dictionary there is what an object without
    attributes would answer.  Removal: llvmlite raising AttributeError for dunder names.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def _resolve(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, value) of a ledger target."""
    module, _, qualname = target.partition(":")
    owner: Any = import_module(module)
    *path, name = qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name, getattr(owner, name)


def missing(runner: str = "") -> Iterator[str]:
    """Sentences, one for each ledger entry that the installed vLLM does not satisfy.

    runner: ``v1`` or ``v2`` for what only this model runner needs, ``ray`` for what only engines on Ray do,
        empty for what all need.
    """
    for entry in LEDGER:
        if entry.runner != runner or not entry.parameters:
            continue
        try:
            _, _, value = _resolve(entry.target)
        except (ImportError, AttributeError):
            yield f"{entry.target} is not there"
            continue
        objection = entry.objection(inspect.signature(inspect.unwrap(value)).parameters)
        if objection:
            yield f"{entry.target} {objection}"


def is_patched(target: str) -> bool:
    """Whether `patch` has replaced the target in this process."""
    return getattr(_resolve(target)[2], "_marith", False)


def patch(target: str, wrap: Callable[[Any], Any]) -> None:
    """Replaces a ledger target by ``wrap(original)``, once per process.

    Raises:
        KeyError: the target does not stand in the ledger as one that is wrapped.
    """
    if not any(entry.target == target and entry.how == "wraps" for entry in LEDGER):
        raise KeyError(f"{target} is not in the ledger of wrapped symbols")
    owner, name, original = _resolve(target)
    if getattr(original, "_marith", False):
        return
    wrapped = wrap(original)
    wrapped._marith = True
    setattr(owner, name, wrapped)

"""How the hooks of the V2 model runner get into a worker before it loads its model.

The logits processors that ``--logits-processor`` names are made after the model state, which is too
late.  The class named by ``--worker-extension-cls`` is looked up earlier: when a worker process has
loaded its plugins and before it makes its worker.  `plugin.enable` therefore names an attribute of this
module there, and looking it up is what installs the hooks.  An operator's own extension is kept: its
name becomes a part of the attribute's, and its class a base of the one that vLLM gets.

The class also does what extensions are for: its methods answer ``collective_rpc``.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from ..group import EVIDENCE, FIGURES
from . import evidence, figures

# No attribute that the module has: looking it up must come to __getattr__.
_PREFIX = "WithFormulas"
_PREFIX_OF_SEVERAL = "WithConstituents"


class FormulaWorker:
    """What formulas add to vLLM's worker class."""

    def __marith_figures__(self) -> dict[str, Any]:
        """What this worker counted since the last call."""
        return figures.FIGURES.drain()

    def __marith_evidence__(
        self, key: str, since: int, last: bool
    ) -> list[tuple[list[int], list[list[float]]]]:
        """What the terms said about a request's tokens, see `Evidence.fetch`."""
        return evidence.EVIDENCE.fetch(key, since, last)


def name_over(theirs: str, *, constituents: bool = False) -> str:
    """The value of ``worker_extension_cls`` that installs the hooks and then gives `theirs`.

    Args:
        theirs: a qualified class name, or the empty string for none.
        constituents: whether the worker loads several base models.
    """
    if theirs.startswith(f"{__name__}."):
        return theirs
    return f"{__name__}.{_PREFIX_OF_SEVERAL if constituents else _PREFIX}" + (
        ":" + theirs.replace(".", ":") if theirs else ""
    )


def __getattr__(name: str) -> Any:
    ours, _, theirs = name.partition(":")
    if ours not in (_PREFIX, _PREFIX_OF_SEVERAL):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import runner_v1, runner_v2

    runner_v1.prepare()
    runner_v2.install()
    if ours == _PREFIX_OF_SEVERAL:
        import_module(".constituents.loader", __package__)  # which registers its load format
        import_module(".constituents.adapters", __package__).install()
    if not theirs:
        return FormulaWorker
    module, _, attribute = theirs.replace(":", ".").rpartition(".")
    return _over(getattr(import_module(module), attribute))


@functools.cache
def _over(theirs: type) -> type:
    """vLLM compares extension classes by identity, so there is one for each of theirs.

    Ours is no base of it: a worker class may have both, and Python wants an order of bases that fits all.
    """
    return type(_PREFIX, (theirs,), {"__module__": __name__, **_METHODS})


_METHODS = {name: vars(FormulaWorker)[name] for name in (FIGURES, EVIDENCE)}

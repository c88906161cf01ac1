"""What the ledger says of one vLLM symbol."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One vLLM symbol.

    Attributes:
        target: ``module:qualified.name``.
        why: what we cannot do without it.
        how: ``wraps`` (called through, result kept or amended), ``overrides`` (a subclass's method)
            or ``reads`` (an attribute or method that we use as it is).
        removal: the upstream change that would make the entry unnecessary.
        parameters: names that the signature must accept, the first of which is ``self`` for methods;
            for a class, names that its instances are made with.  What ``overrides`` is called by vLLM with
            whatever the original takes: there, these and `newer` must be all of its names.
        runner: ``v1`` or ``v2``, the model runner that needs the entry, or ``ray``, if only engines on Ray
            need it; empty for all.
        newer: names that only some supported releases have.
        attributes: names that a class's methods must set or read on ``self``, or that its body defines.
        calls: names that the body must call in this order.

    Attributes and calls take the source: an entry without parameters is left to scripts/check_vllm.py.
    """

    target: str
    why: str
    how: str
    removal: str
    parameters: tuple[str, ...] = ()
    runner: str = ""
    newer: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    def objection(self, accepted: Iterable[str]) -> str:
        """What is wrong with a signature that accepts these names; empty if nothing is."""
        accepted = list(accepted)
        lacking = [name for name in self.parameters if name not in accepted]
        if lacking:
            return f"takes no {', '.join(lacking)}"
        unknown = [name for name in accepted if name not in self.parameters + self.newer]
        if unknown and self.how == "overrides":
            return f"also takes {', '.join(unknown)}"
        return ""

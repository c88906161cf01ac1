"""The LoRA adapters that terms can name.

A name is looked up when a request is admitted, so that adapters may come and go while requests are served:

- in a server it stands in vLLM's own table of models, which holds what ``--lora-modules`` named and what
  ``/v1/load_lora_adapter`` or a resolver loaded since;
- in Python it is an adapter that the engine was given: ``llm.llm_engine.add_lora(LoRARequest(...))``.

A client sends names only, never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from vllm.config import LoRAConfig
from vllm.lora.request import LoRARequest

from vllm_marith.language import FormulaError, Term

from ..group import MemberAdapter


class Adapters:
    """What one frontend knows by name.

    Attributes:
        models: a server's table, vLLM's ``OpenAIServingModels``; None in Python.
    """

    def __init__(self, config: LoRAConfig | None) -> None:
        self.models: Any = None
        self._config = config
        self._given: dict[str, LoRARequest] = {}

    @property
    def known(self) -> Mapping[str, LoRARequest]:
        """Adapters by name, as of now."""
        return self._given if self.models is None else self.models.lora_requests

    def add(self, adapter: LoRARequest) -> None:
        """Python: the engine has loaded an adapter."""
        self._given[adapter.lora_name] = adapter

    def remove(self, lora_int_id: int) -> None:
        """Python: the engine was told to forget an adapter."""
        self._given = {n: a for n, a in self._given.items() if a.lora_int_id != lora_int_id}

    def of_terms(self, terms: Mapping[str, Term], own: LoRARequest | None) -> list[LoRARequest | None]:
        """The adapter that each term runs with.

        own: the request's, whose model is an adapter: what terms without one of their own mean.

        Raises:
            FormulaError: nobody knows a term's adapter, or this engine cannot run all of them together.
        """
        found = [
            own if term.adapter is None else self._named(n, term.adapter, own) for n, term in terms.items()
        ]
        needed = len({adapter.lora_int_id for adapter in found if adapter is not None})
        most = self._config.max_loras if self._config is not None else 0
        if needed > most:
            raise FormulaError(
                f"the formula has {needed} different adapters; this server runs {most} at a time "
                "(--max-loras)"
            )
        return found

    def _named(self, term: str, name: str, own: LoRARequest | None) -> LoRARequest:
        if self._config is None:
            raise FormulaError(f"term '{term}' has an adapter, and this server runs without --enable-lora")
        known = self.known
        found = own if own is not None and own.lora_name == name else known.get(name)
        if found is None:
            names = ", ".join(f"'{n}'" for n in sorted(known)) or "none"
            raise FormulaError(f"term '{term}': there is no adapter '{name}'; adapters here: {names}")
        return found


def to_wire(adapter: LoRARequest | None) -> MemberAdapter | None:
    """Plain data of an adapter for `GroupSpec`.

    It was loaded in place, if so asked, when it got its name: loading it again at every step would cost a
    step its file's time.
    """
    if adapter is None:
        return None
    wire: MemberAdapter = msgspec.to_builtins(msgspec.structs.replace(adapter, load_inplace=False))
    return wire

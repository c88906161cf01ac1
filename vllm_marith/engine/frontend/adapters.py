"""The LoRA adapters that terms can name.

A name is looked up when a request is admitted, so that adapters may come and go while requests are served:

- in a server it stands in vLLM's own table of models, which holds what ``--lora-modules`` named and what
  ``/v1/load_lora_adapter`` or a resolver loaded since;
- in Python it is an adapter that the engine was given: ``llm.llm_engine.add_lora(LoRARequest(...))``.

A client sends names only, never a path.

An adapter brings its base model along, where the engine has several (`engine.constituents.adapters`): a term
with an adapter runs on the model that the adapter is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.lora.request import LoRARequest

from vllm_marith.language import FormulaError, Term

from ..constituents.adapters import AdapterBases
from ..group import MemberAdapter
from ..settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BASE_MODEL_NAME: ContextVar[str | None] = ContextVar("base_model_name", default=None)
"""What ``--lora-modules`` says of the adapter that this task loads; vLLM forgets what it does not serve."""


class Adapters:
    """What one frontend knows by name.

    Attributes:
        models: a server's table, vLLM's ``OpenAIServingModels``; None in Python.
        bases: the constituents that adapters are for.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.models: Any = None
        constituents = Settings.of(config).constituents
        self.bases = AdapterBases(
            config.model_config.model, {name: c.path for name, c in constituents.items()}
        )
        self._config = config.lora_config
        self._given: dict[str, LoRARequest] = {}

    @property
    def known(self) -> Mapping[str, LoRARequest]:
        """Adapters by name, as of now."""
        return self._given if self.models is None else self.models.lora_requests

    def assign(self, adapter: LoRARequest) -> None:
        """Decides, before the engine loads an adapter, whose it is."""
        if adapter.base_model_name is None:
            adapter.base_model_name = self.bases.known(BASE_MODEL_NAME.get())
        self.bases.decide(adapter)

    def add(self, adapter: LoRARequest) -> None:
        """Python: the engine has loaded an adapter."""
        self._given[adapter.lora_name] = adapter

    def remove(self, lora_int_id: int) -> None:
        """Python: the engine was told to forget an adapter."""
        self._given = {n: a for n, a in self._given.items() if a.lora_int_id != lora_int_id}

    def of_terms(
        self, terms: Mapping[str, Term], own: LoRARequest | None
    ) -> list[tuple[int, LoRARequest | None]]:
        """The constituent and the adapter that each term runs with.

        terms: their models are known to be constituents.
        own: the request's, whose model is an adapter: what terms mean that have no adapter of their own, and
            no other model.

        Raises:
            FormulaError: nobody knows a term's adapter, it is for another model than the term's, or this
                engine cannot run all of them together.
        """
        found = [self._of_term(name, term, own) for name, term in terms.items()]
        needed = len({adapter.lora_int_id for _, adapter in found if adapter is not None})
        most = self._config.max_loras if self._config is not None else 0
        if needed > most:
            raise FormulaError(
                f"the formula has {needed} different adapters; this server runs {most} at a time "
                "(--max-loras)"
            )
        return found

    def _of_term(self, name: str, term: Term, own: LoRARequest | None) -> tuple[int, LoRARequest | None]:
        model = None if term.model is None else 1 + self.bases.names.index(term.model)
        adapter = own if term.adapter is None else self._named(name, term.adapter, own)
        if adapter is None:
            return model or 0, None
        base = self.bases.of(adapter)
        if model is None or model == base:
            return base, adapter
        if term.adapter is None:
            return model, None
        raise FormulaError(
            f"term '{name}' runs on the constituent '{term.model}', and the adapter '{term.adapter}' is for "
            f"{self.bases.shown(base)}"
        )

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

"""Which of several base models a LoRA adapter is for.

An adapter is a change of one model's weights and means nothing beside another.  The first of these decides:

1. its request's ``base_model_name``, if that is a constituent's name: what ``--lora-modules`` in its JSON
   form and Python's ``LoRARequest`` say;
2. ``base_model_name_or_path`` in the ``adapter_config.json`` beside its weights, which PEFT writes there: a
   constituent's name, its path as the settings have it, or the same directory;
3. else it is for the model that the server was started with, as every adapter is in vLLM.

A frontend decides, once, and writes the constituent's name into the request, which travels to the workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.lora.utils import get_adapter_absolute_path

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class AdapterBases:
    """The constituents that adapters of one engine are for.

    Attributes:
        names: of constituent 1, 2, ...; the base model, number 0, has none.
    """

    def __init__(self, base: str, constituents: Mapping[str, str]) -> None:
        """
        Args:
            base: path or hub name of the base model.
            constituents: name -> path or hub name.
        """
        self.names = tuple(constituents)
        self._paths = (base, *constituents.values())
        self._decided: dict[tuple[str, str], int] = {}

    def decide(self, adapter: LoRARequest) -> int:
        """The number of an adapter's constituent, which is written into the adapter.

        Reads the adapter's configuration, and fetches it first where its path is a name on the hub.
        """
        if not self.names or adapter.base_model_name is not None:
            found = number_of(adapter, self.names)
        else:
            found = self._configured(adapter.lora_path)
        return self._note(adapter, found)

    def of(self, adapter: LoRARequest) -> int:
        """The same, as it was decided before, or now."""
        if adapter.base_model_name is not None:
            return number_of(adapter, self.names)
        found = self._decided.get((adapter.lora_name, adapter.lora_path))
        return self.decide(adapter) if found is None else self._note(adapter, found)

    def _note(self, adapter: LoRARequest, number: int) -> int:
        self._decided[adapter.lora_name, adapter.lora_path] = number
        if number:
            adapter.base_model_name = self.names[number - 1]
        return number

    def known(self, name: str | None) -> str | None:
        """A name, if it is a constituent's."""
        return name if name in self.names else None

    def shown(self, number: int) -> str:
        """A constituent, in a sentence."""
        return f"the constituent '{self.names[number - 1]}'" if number else "the base model"

    def _configured(self, path: str) -> int:
        try:
            config: Any = json.loads(
                Path(get_adapter_absolute_path(path), "adapter_config.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return 0  # the worker, which loads it, says what is wrong with it
        named = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not isinstance(named, str):
            return 0
        if named in self.names and named != self._paths[0]:
            return 1 + self.names.index(named)
        return next((i for i, model in enumerate(self._paths) if _same(model, named)), 0)


def number_of(adapter: LoRARequest, names: Sequence[str]) -> int:
    """The constituent that was written into an adapter's request; names: of constituent 1, 2, ..."""
    return 1 + names.index(adapter.base_model_name) if adapter.base_model_name in names else 0


def _same(model: str, named: str) -> bool:
    if model == named:
        return True
    return os.path.isdir(model) and os.path.isdir(named) and os.path.samefile(model, named)

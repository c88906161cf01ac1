"""From what a client wrote to what can be run, before any prompt is known; each text is compiled once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from vllm_marith.language import FormulaError, FormulaRequest, Presets, read_request
from vllm_marith.language.names import FREE_DRAFTERS
from vllm_marith.plan import Plan, lower

from ..classifiers import Card
from ..group import OWN_FORMULA
from ..settings import Settings
from .classifiers import check_classifiers
from .drafts import Drafts

_REMEMBERED_CHARS = 1 << 14
"""Requests longer than this are read anew each time: what clients make us remember stays a few megabytes."""


class Compiled(NamedTuple):
    """What the text of a request comes to.

    Attributes:
        asked: what it asks for.
        plan: of its formula.
        label: of its figures.
        drafts: how it is drafted, None for not at all.
    """

    asked: FormulaRequest
    plan: Plan
    label: str
    drafts: Drafts | None


class Compiler:
    """Requests with one set of presets: their text -> `Compiled`."""

    def __init__(self, presets: Presets, settings: Settings, cards: Mapping[str, Card]) -> None:
        self.presets = presets
        self.settings = settings
        self.cards = cards
        self._remembered = lru_cache(maxsize=1024)(self._compile)

    def __call__(self, value: Any) -> Compiled:
        """Raises `FormulaError`."""
        short = isinstance(value, str) and len(value) <= _REMEMBERED_CHARS
        return self._remembered(value) if short else self._compile(value)

    def _compile(self, value: Any) -> Compiled:
        asked = read_request(value, presets=self.presets, limits=self.settings.limits)
        constituents = self.settings.constituents
        for name, term in asked.formula.terms.items():
            if term.model not in (None, *FREE_DRAFTERS, *constituents):
                known = ", ".join(constituents) or "none"
                raise FormulaError(
                    f"term '{name}': beside its base model this server has no model '{term.model}'; "
                    f"its constituents are: {known}"
                )
        plan = lower(asked.formula)
        most = self.settings.max_classifier_texts
        check_classifiers(plan.classifiers, asked.formula.terms, self.cards, most)
        return Compiled(asked, plan, self._label(value), self._drafts(asked))

    def _drafts(self, asked: FormulaRequest) -> Drafts | None:
        speculation = self.settings.speculation(
            asked.formula, asked.speculative, demanded=asked.demands_drafts
        )
        if speculation is None:
            return None
        wanted = self.settings.speculative if asked.speculative is None else asked.speculative
        return Drafts.of(
            asked.formula,
            speculation,
            adaptive=wanted == "auto",
            demanded=asked.demands_drafts,
        )

    def _label(self, value: str) -> str:
        """The preset's name where the formula is one preset: labels of metrics must be few."""
        text = json.loads(value)["formula"] if value.lstrip().startswith("{") else value
        name = text.strip(" \t\r\n()")
        return name if name in self.presets.presets else OWN_FORMULA

"""Presets as model names.

A request whose ``model`` is a preset's name becomes, where vLLM checks that name, a request to the base
model with the preset's formula in ``vllm_xargs``; from there on it is like any request with a formula.
That is one place for every route (completions, chat, responses, messages), before anything is rendered.
What the response says about its model is asked of vLLM's model table later in the same task.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from vllm_marith.engine import patches
from vllm_marith.engine.frontend.adapters import BASE_MODEL_NAME
from vllm_marith.engine.frontend.admission import Admission, admission_of, refuse
from vllm_marith.engine.group import KEY
from vllm_marith.engine.plugin import PROCESSOR
from vllm_marith.language import Presets
from vllm_marith.language.request import RequestSpec

_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"

_served_as: ContextVar[str | None] = ContextVar("marith_served_as", default=None)
"""The preset that this task's request named as its model."""


def install() -> None:
    """Wraps the check of a request's model, the name in its answer, and how adapters load; idempotent."""
    patches.patch("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", _with_presets)
    patches.patch(f"{_MODELS}.model_name", _as_asked)
    patches.patch(f"{_MODELS}.load_lora_adapter", _telling_the_base)


def check_names(presets: Presets, served: Iterable[str], adapters: Iterable[str] = ()) -> None:
    """Raises ValueError when a preset has the name of a served model or of a LoRA adapter."""
    for names, what in ((served, "the served model"), (adapters, "a LoRA adapter")):
        for name in names:
            if name in presets.presets:
                raise ValueError(
                    f"the preset '{name}' has the name of {what}; rename the preset, or serve the other "
                    "under another name"
                )


def formula_value(preset: str, value: Any, base: str) -> str:
    """What ``vllm_xargs["marith"]`` says about a request whose model is `preset`.

    value: the client's own entry: nothing, the formula's parameters as JSON, ``{"strength": 0.8}``, or a
        request's JSON without a formula.
    base: name of a served model, for the refusal.

    Raises:
        VLLMValidationError: HTTP 400, with a sentence.
    """
    if value is None:
        return preset
    asked = _json_object(value)
    if asked is None or "formula" in asked:
        refuse(
            f"the model '{preset}' is a formula already: '{KEY}' takes its parameters here, as in "
            f"{{\"strength\": 0.8}}; for a formula of your own ask the model '{base}'",
            "formula",
        )
    if not asked.keys() <= RequestSpec.model_fields.keys():
        asked = {"parameters": asked}
    return json.dumps({"formula": preset, **asked})


def _json_object(value: Any) -> dict[str, Any] | None:
    try:
        found = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def admission_for(models: Any) -> Admission | None:
    """The admission of a server's model table; None where it serves no formulas."""
    renderer = getattr(models, "renderer", None)
    if renderer is None or PROCESSOR not in (models.model_config.logits_processors or ()):
        return None
    return admission_of(renderer)


def _with_presets(check_model: Any) -> Any:
    @functools.wraps(check_model)
    async def checking(self: Any, request: Any) -> Any:
        _served_as.set(_resolve(self.models, request))
        return await check_model(self, request)

    return checking


def _resolve(models: Any, request: Any) -> str | None:
    """Turns a request to a preset into one to the base model; returns the preset's name.

    An adapter that was loaded under a preset's name since the start is vLLM's to serve.
    """
    name = getattr(request, "model", None)
    if not name or (admission := admission_for(models)) is None:
        return None
    if name not in admission.presets.presets or name in models.lora_requests:
        return None
    base = models.base_model_paths[0].name
    if hasattr(request, "vllm_xargs"):  # requests that generate; others are about the base model's text
        xargs = request.vllm_xargs or {}
        request.vllm_xargs = {**xargs, KEY: formula_value(name, xargs.get(KEY), base)}
    request.model = base
    return name


def _telling_the_base(load_lora_adapter: Any) -> Any:
    @functools.wraps(load_lora_adapter)
    async def loading(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        told = BASE_MODEL_NAME.set(base_model_name)
        try:
            return await load_lora_adapter(self, request, base_model_name)
        finally:
            BASE_MODEL_NAME.reset(told)

    return loading


def _as_asked(model_name: Any) -> Any:
    @functools.wraps(model_name)
    def naming(self: Any, lora_request: Any = None) -> str:
        preset = _served_as.get()
        return preset if preset is not None and lora_request is None else model_name(self, lora_request)

    return naming

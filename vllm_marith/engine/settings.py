"""The server's settings: ``--additional-config '{"marith": {...}}'``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from vllm_marith.language.names import PLAIN_NAME
from vllm_marith.language.presets import PresetError, Presets
from vllm_marith.language.request import Limits

from .classifiers import ClassifierSettings
from .group import KEY


def _as_list(value: Any) -> Any:
    """`"presets": "configs/presets"` for `"presets": ["configs/presets"]`."""
    if value is None:
        return []
    return value if isinstance(value, list | tuple) else [value]


def _requestable(name: str) -> str:
    if not PLAIN_NAME.fullmatch(name):
        raise ValueError("a name has at most 64 letters, digits, '_', '-' and '.' (not first)")
    return name


Name = Annotated[str, AfterValidator(_requestable)]


class ConstituentSettings(BaseModel):
    """Another base model of the engine, beside the one that the server was started with.

    Attributes:
        path: directory or Hugging Face name.
        revision: of a Hugging Face repository.
        dtype: as vLLM's ``--dtype``; by default the base model's.
        quantization: as vLLM's ``--quantization``; by default what the model's own files say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    revision: str | None = None
    dtype: str | None = None
    quantization: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        """A string is a path and nothing else."""
        return {"path": value} if isinstance(value, str) else value


_NESTED: dict[str, type[BaseModel]] = {"classifiers": ClassifierSettings, "constituents": ConstituentSettings}


class Settings(BaseModel):
    """What an operator may set.  Unknown keys are refused.

    Attributes:
        presets: directories of preset files, or single files; see `vllm_marith.language.presets`.
        limits: bounds on what one request may ask for.
        classifiers: name -> sequence classifier that terms may use.
        max_classifier_texts: texts that all classifiers together may read for one token of one request.
        constituents: further base models by the names that terms call them by, see
            `vllm_marith.engine.constituents`.
        block_sizes: tokens in a KV-cache block of the base model and of each constituent; by default
            chosen at the start such that little memory is left over.
        combine_hidden_states: whether linear formulas are applied before the LM head where its law
            allows it, see `vllm_marith.engine.worker.head`; V2 model runner only.
        warmup: whether each worker compiles the fusion kernels before it serves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    presets: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = ()
    limits: Limits = Field(default_factory=Limits)
    classifiers: dict[Name, ClassifierSettings] = Field(default_factory=dict)
    max_classifier_texts: Annotated[int, Field(ge=1, strict=True)] = 256
    constituents: dict[Name, ConstituentSettings] = Field(default_factory=dict)
    block_sizes: tuple[int, ...] = ()
    combine_hidden_states: bool = False
    warmup: bool = True

    @classmethod
    def of(cls, vllm_config: Any) -> Settings:
        """Settings of a `vllm.config.VllmConfig`.

        Raises:
            ValueError: a key or value is wrong; the sentence names it.
        """
        additional = vllm_config.additional_config
        raw = additional.get(KEY, {}) if isinstance(additional, dict) else {}
        if not isinstance(raw, dict):
            raise ValueError(f"additional_config[{KEY!r}] must be an object, not {type(raw).__name__}")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join([KEY, *map(str, first["loc"])])
            nested = _NESTED.get(str(first["loc"][0]), cls) if len(first["loc"]) > 1 else cls
            known = ", ".join(sorted(nested.model_fields))
            raise ValueError(
                f"additional_config: {place}: {first['msg'].lower()} (known settings: {known})"
            ) from None

    def load_presets(self) -> Presets:
        """The operator's presets, or none.

        Raises:
            PresetError: a file is wrong, and the sentence names file, line and reason; or a preset needs a
                model or classifier that these settings do not name.
        """
        presets = Presets.load(*self.presets)
        for name, formula in presets.formulas.items():
            for label, term in formula.terms.items():
                for kind, asked, known in (
                    ("constituent", term.model, self.constituents),
                    ("classifier", term.classifier, self.classifiers),
                ):
                    if asked is not None and asked not in known:
                        listed = ", ".join(known) or "none"
                        raise PresetError(
                            f"the preset '{name}' needs the {kind} '{asked}' for its term '{label}', which "
                            f"the settings do not name; the {kind}s are: {listed}"
                        )
        return presets

"""The server's settings: ``--additional-config '{"marith": {...}}'``."""

from __future__ import annotations

from importlib.util import find_spec
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

from vllm_marith.language import Formula, FormulaError
from vllm_marith.language.names import FREE_DRAFTERS, PLAIN_NAME, SUFFIX
from vllm_marith.language.presets import PresetError, Presets
from vllm_marith.language.request import Limits
from vllm_marith.language.speculative import Speculative, check_speculative
from vllm_marith.plan import Speculation, speculate

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


def _no_drafter(name: str) -> str:
    if name in FREE_DRAFTERS:
        raise ValueError(
            f"the name '{name}' is taken: terms with that model draft what earlier text proposes"
        )
    return name


def _has_suffixes() -> bool:
    return find_spec("arctic_inference") is not None


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
        default_preset: what requests are served with that name neither a formula nor an adapter.
        limits: bounds on what one request may ask for.
        classifiers: name -> sequence classifier that terms may use.
        max_classifier_texts: texts that all classifiers together may read for one token of one request.
        constituents: further base models by the names that terms call them by, see
            `vllm_marith.engine.constituents`.
        block_sizes: tokens in a KV-cache block of the base model and of each constituent; by default
            chosen at the start such that little memory is left over.
        combine_hidden_states: whether linear formulas are applied before the LM head where its law
            allows it, see `vllm_marith.engine.worker.head`; V2 model runner only.
        speculative: whether requests that do not say so are drafted, and how far, see
            `vllm_marith.language.speculative`.
        max_speculative_tokens: the most tokens that are drafted at a time.
        remembered_answers: earlier answers that "suffix" drafts from, see
            `vllm_marith.engine.worker.speculation.suffixes`.
        warmup: whether each worker compiles the fusion kernels before it serves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    presets: Annotated[tuple[Path, ...], BeforeValidator(_as_list)] = ()
    default_preset: Name | None = None
    limits: Limits = Field(default_factory=Limits)
    classifiers: dict[Name, ClassifierSettings] = Field(default_factory=dict)
    max_classifier_texts: Annotated[int, Field(ge=1, strict=True)] = 256
    constituents: dict[Annotated[Name, AfterValidator(_no_drafter)], ConstituentSettings] = Field(
        default_factory=dict
    )
    block_sizes: tuple[int, ...] = ()
    combine_hidden_states: bool = False
    speculative: Annotated[Speculative, BeforeValidator(check_speculative)] = "off"
    max_speculative_tokens: Annotated[int, Field(ge=1, le=32, strict=True)] = 8
    remembered_answers: Annotated[int, Field(ge=0, strict=True)] = 1000
    warmup: bool = True

    @model_validator(mode="after")
    def _within(self) -> Settings:
        if isinstance(self.speculative, int) and self.speculative > self.max_speculative_tokens:
            raise ValueError(
                f"speculative is {self.speculative}, and max_speculative_tokens allows "
                f"{self.max_speculative_tokens}"
            )
        return self

    @property
    def speculates(self) -> bool:
        """Whether the engine is started such that it can draft: one of the two settings for it is there."""
        return not self.model_fields_set.isdisjoint({"speculative", "max_speculative_tokens"})

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

    def speculation(
        self, formula: Formula, asked: Speculative | None, *, demanded: bool
    ) -> Speculation | None:
        """How a request for a formula is drafted here, None for not at all.

        Args:
            asked: what the request or its preset says, None for nothing.
            demanded: to be refused where it cannot be.

        Raises:
            FormulaError: why it cannot be.
        """
        value = self.speculative if asked is None else asked
        length = value if isinstance(value, int) else None
        if value == "off" or length == 0:
            return None
        most = self.max_speculative_tokens
        if not self.speculates:
            found: Speculation | str = (
                "this server was started without speculation; its operator can set 'speculative' or "
                "'max_speculative_tokens'"
            )
        elif length is not None and length > most:
            found = f"this server drafts at most {most} tokens at a time"
        else:
            found = speculate(formula, length, limit=most)
            if isinstance(found, Speculation) and found.free == SUFFIX and not _has_suffixes():
                found = (
                    f"'{SUFFIX}' drafts with the package arctic-inference, which this server does not have; "
                    "its operator can install it, and 'ngram' needs none"
                )
        if isinstance(found, str):
            if demanded:
                raise FormulaError(f"'speculative' is {asked}, but {found}")
            return None
        return found

    def load_presets(self) -> Presets:
        """The operator's presets, or none.

        Raises:
            PresetError: a file is wrong, and the sentence names file, line and reason; or a preset needs a
                model or classifier that these settings do not name, or speculation that is not to be had; or
                there is no `default_preset`.
        """
        presets = Presets.load(*self.presets)
        if self.default_preset is not None and self.default_preset not in presets.presets:
            listed = ", ".join(sorted(presets.presets)) or "none"
            raise PresetError(
                f"default_preset: there is no preset '{self.default_preset}'; there are: {listed}"
            )
        for name, formula in presets.formulas.items():
            for label, term in formula.terms.items():
                for kind, named, known in (
                    ("constituent", None if term.model in FREE_DRAFTERS else term.model, self.constituents),
                    ("classifier", term.classifier, self.classifiers),
                ):
                    if named is not None and named not in known:
                        listed = ", ".join(known) or "none"
                        raise PresetError(
                            f"the preset '{name}' needs the {kind} '{named}' for its term '{label}', which "
                            f"the settings do not name; the {kind}s are: {listed}"
                        )
            try:
                asked = presets.presets[name].speculative
                self.speculation(formula, asked, demanded=isinstance(asked, int))
            except FormulaError as error:
                raise PresetError(f"the preset '{name}': {error.message}") from None
        return presets

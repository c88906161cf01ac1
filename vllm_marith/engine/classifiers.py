"""The sequence classifiers of a server: what its settings say, and what is known without their weights.

`additional_config["marith"]["classifiers"]` maps names to `ClassifierSettings`; a request knows the
names only.  Nothing here loads weights: the frontend checks requests against `Card`s, the workers load
(`vllm_marith.engine.worker.classifiers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


class ClassifierError(ValueError):
    """A classifier that cannot be used, or a request for a class that it does not know; one sentence."""


class ClassifierSettings(BaseModel):
    """One entry of the settings' `classifiers`.

    Attributes:
        path: a directory, or a name on the Hugging Face hub, of a sequence classifier with its tokenizer.
            Weights are read from safetensors files only, and code that comes with a model is never run.
        revision: of a model on the hub.
        max_length: tokens of the classifier's own that it reads; longer texts lose their beginning.  By
            default what its tokenizer or its configuration gives.
        dtype: of its weights.
        device: `worker` is the device of the worker that serves the base model.
        batch_size: texts in one forward pass.
        cache_size: texts whose result each worker remembers.
        max_top_k: the most candidates that a term may ask for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(min_length=1)
    revision: str | None = None
    max_length: int | None = Field(default=None, ge=2)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["worker", "cpu"] = "worker"
    batch_size: int = Field(default=64, ge=1)
    cache_size: int = Field(default=16384, ge=1)
    max_top_k: int = Field(default=100, ge=1)

    def source(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` is given for every part of this classifier."""
        return {
            "pretrained_model_name_or_path": self.path,
            "revision": self.revision or "main",
            "trust_remote_code": False,
        }


@dataclass(frozen=True)
class Card:
    """What a classifier's configuration says about it.

    Attributes:
        name: what requests call it.
        labels: of its classes, in the order of their indices.
        multi_label: whether the classes are independent of each other (each has a probability of its own)
            or exclude each other (the probabilities sum to 1).
        max_length: tokens that it reads.
        max_top_k: as in `ClassifierSettings`.
    """

    name: str
    labels: tuple[str, ...]
    multi_label: bool
    max_length: int
    max_top_k: int

    @classmethod
    def read(cls, name: str, settings: ClassifierSettings) -> Card:
        """Reads configuration and tokenizer, and looks for weights without reading them.

        Raises:
            ClassifierError: the sentence names the classifier and what is wrong with it.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification

        source = settings.source()
        config = _attempt(name, "has no readable configuration", AutoConfig.from_pretrained, **source)
        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise ClassifierError(
                f"classifier '{name}': a model of type '{config.model_type}' is no sequence classifier"
            )
        labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
        multi_label = config.problem_type == "multi_label_classification"
        if config.problem_type == "regression" or (len(labels) < 2 and not multi_label):
            raise ClassifierError(
                f"classifier '{name}' gives {len(labels)} number(s) without a meaning as a probability; a "
                "classifier needs two classes or more, or problem_type multi_label_classification"
            )
        _check_safetensors(name, settings)
        tokenizer = load_tokenizer(name, settings)
        longest = settings.max_length or _longest_input(tokenizer, config)
        return cls(name, labels, multi_label, longest, settings.max_top_k)

    def index(self, label: str | int) -> int:
        """The index of a class that is given by its label or its index.

        Raises:
            ClassifierError: the sentence lists the labels.
        """
        if isinstance(label, int):
            if 0 <= label < len(self.labels):
                return label
        elif label in self.labels:
            return self.labels.index(label)
        known = ", ".join(f"{index}: {known}" for index, known in enumerate(self.labels[:20]))
        more = ", …" if len(self.labels) > 20 else ""
        raise ClassifierError(
            f"the classifier '{self.name}' has no class {label!r}; its classes are {known}{more}"
        )

    def check_top_k(self, top_k: int) -> None:
        """Raises `ClassifierError` for more candidates than the operator allows."""
        if top_k > self.max_top_k:
            raise ClassifierError(
                f"the classifier '{self.name}' reads {self.max_top_k} candidates a token at most, not {top_k}"
            )


def read_cards(settings: Mapping[str, ClassifierSettings]) -> dict[str, Card]:
    """The cards of a server's classifiers, by name; raises `ClassifierError` for the first that is bad."""
    return {name: Card.read(name, entry) for name, entry in settings.items()}


def find_card(cards: Mapping[str, Card], name: str) -> Card:
    """The card of the classifier that a request names.

    Raises:
        ClassifierError: there is none; the sentence lists those that are known.
    """
    if name in cards:
        return cards[name]
    known = ", ".join(sorted(cards)) or "none"
    raise ClassifierError(f"this server has no classifier '{name}'; it knows: {known}")


def load_tokenizer(name: str, settings: ClassifierSettings) -> Any:
    """The classifier's own tokenizer, which drops the beginning of what is too long."""
    from transformers import AutoTokenizer

    what = "has no readable tokenizer"
    return _attempt(name, what, AutoTokenizer.from_pretrained, **settings.source(), truncation_side="left")


def _attempt(name: str, what: str, function: Callable[..., Any], **arguments: Any) -> Any:
    try:
        return function(**arguments)
    except Exception as error:  # whatever a file of another's making provokes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClassifierError(
            f"classifier '{name}' ({arguments['pretrained_model_name_or_path']}) {what}: {reason}"
        ) from None


def _check_safetensors(name: str, settings: ClassifierSettings) -> None:
    folder = Path(settings.path)
    if folder.is_dir():
        found = any((folder / file).is_file() for file in SAFETENSORS)
    else:
        from huggingface_hub import constants, file_exists, try_to_load_from_cache

        revision = settings.revision or "main"
        found = any(
            isinstance(try_to_load_from_cache(settings.path, file, revision=revision), str)
            or (not constants.HF_HUB_OFFLINE and file_exists(settings.path, file, revision=revision))
            for file in SAFETENSORS
        )
    if not found:
        raise ClassifierError(
            f"classifier '{name}' ({settings.path}) has no weights in safetensors format, the only one read"
        )


def _longest_input(tokenizer: Any, config: Any) -> int:
    """Tokens that a classifier can read; 512 where neither tokenizer nor configuration tells."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    # transformers writes "no bound" as a very large number.
    told = [n for n in (tokenizer.model_max_length, positions) if n is not None and 0 < n < 1 << 24]
    return min(told, default=512)


_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}
"""Model types that count positions from behind the padding token's index."""

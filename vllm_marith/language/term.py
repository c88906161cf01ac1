"""What a term is made of; `expression.Term` adds Python's operators to it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.names import FREE_DRAFTERS, PLAIN_NAME, check_term_name
from vllm_marith.language.nodes import Leaf
from vllm_marith.language.validation import describe, is_text

MAX_INPUTS: Final = 16
"""How often a template may repeat the input: so many times what the client sent is the longest prompt."""


@dataclass(frozen=True)
class TermFields:
    """A language model under its own prompt: log Q(x) = log_softmax(logits)(x), with weight N = 1.

    Args:
        system: chat: this term's system message; completion: `system + "\\n" + input`.
        prompt: a template in which `{input}` stands for the user's input.  Without `system` and `prompt`
            the term sees the request as it is.
        model: a constituent model of the server, by name; None is the base model; "ngram" and "suffix" are
            none and only draft, as the small operand of `superseded`: what once followed the last tokens, in
            prompt and answer, and in earlier answers, too.
        adapter: a LoRA adapter that the server knows, by name.
        classifier: a classifier that the server's configuration lists, by name.  The term is then no language
            model: its energy says how much more a token makes the text belong to a class, see `nodes`.
        label: classifier: the class, by name or index; 1 by default.
        minimize: classifier: the complement of the class.
        form: classifier: "bayes", log p(y | text + x) - log p(y | text) with N = 0, or "plain", the
            distribution log_softmax(log p(y | text + x)) with N = 1.
        top_k: classifier: only the so many most likely tokens of the formula without its classifiers are
            tried.
        every: classifier: it runs at every so many generated tokens only.
        speculative_factor: run this term once for so many drafted tokens; 1 is every token.
        name: what formulas call it.  Only a label: two terms are equal when all else is.

    Raises:
        FormulaError: a field that is not of its type, `system` together with `prompt`, or a path as a name.
    """

    system: str | None = None
    prompt: str | None = field(default=None, kw_only=True)
    model: str | None = field(default=None, kw_only=True)
    adapter: str | None = field(default=None, kw_only=True)
    classifier: str | None = field(default=None, kw_only=True)
    label: str | int = field(default=1, kw_only=True)
    minimize: bool = field(default=False, kw_only=True)
    form: Literal["bayes", "plain"] = field(default="bayes", kw_only=True)
    top_k: int = field(default=50, kw_only=True)
    every: int = field(default=1, kw_only=True)
    speculative_factor: int = field(default=1, kw_only=True)
    name: str | None = field(default=None, kw_only=True, compare=False)

    def __post_init__(self) -> None:
        for text in ("system", "prompt"):
            value = getattr(self, text)
            if value is not None and not isinstance(value, str):
                raise FormulaError(f"'{text}' of a term must be a string, not a {type(value).__name__}")
            if value is not None and not is_text(value):
                raise FormulaError(f"'{text}' of a term has half of a surrogate pair, which is no character")
        uses = 0 if self.prompt is None else self.prompt.count("{input}")
        if uses > MAX_INPUTS:
            raise FormulaError(f"'prompt' of a term has {{input}} {uses} times; {MAX_INPUTS} is the most")
        if self.system is not None and self.prompt is not None:
            raise FormulaError("a term has either 'system' or 'prompt', not both")
        for reference in ("model", "adapter", "classifier"):
            value = getattr(self, reference)
            if value is not None and not (isinstance(value, str) and PLAIN_NAME.fullmatch(value)):
                raise FormulaError(
                    f"'{reference}' of a term must be a name that the server knows, of at most 64 letters, "
                    f"digits, '_', '-' and '.' (not first), not {describe(value)}"
                )
        self._check_options()
        if self.name is not None:
            check_term_name(self.name)

    def _check_options(self) -> None:
        for option in ("top_k", "every", "speculative_factor"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FormulaError(
                    f"'{option}' of a term must be a whole number of at least 1, not {describe(value)}"
                )
        if self.form not in ("bayes", "plain"):
            raise FormulaError(f"'form' of a term must be 'bayes' or 'plain', not {describe(self.form)}")
        if not isinstance(self.minimize, bool):
            raise FormulaError(f"'minimize' of a term must be true or false, not {describe(self.minimize)}")
        is_index = isinstance(self.label, int) and not isinstance(self.label, bool) and self.label >= 0
        if not is_index and not (isinstance(self.label, str) and is_text(self.label)):
            raise FormulaError(
                f"'label' of a term must be a class's name or index, not {describe(self.label)}"
            )
        if self.model in FREE_DRAFTERS:
            given = [key for key in _LANGUAGE_MODEL_OPTIONS if getattr(self, key) != _default(key)]
            if given:
                raise FormulaError(
                    f"'{given[0]}' belongs to a language model, and the model '{self.model}' is none: it "
                    "reads the leader's tokens"
                )
        if self.classifier is None:
            given = [key for key in _CLASSIFIER_OPTIONS if getattr(self, key) != _default(key)]
            if given:
                raise FormulaError(
                    f"'{given[0]}' belongs to a term with a 'classifier', which this one has not"
                )
        elif self.model is not None or self.adapter is not None:
            raise FormulaError("a term with a 'classifier' is no language model: no 'model' and no 'adapter'")
        elif self.speculative_factor != 1:
            raise FormulaError("a classifier cannot be drafted ahead: its 'speculative_factor' is 1")

    def leaf(self, name: str) -> Leaf:
        """The tree that is this term alone, under a name."""
        return Leaf(name, "" if self.classifier is None else self.form)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the term asks for beyond the base model under a prompt; empty for most terms.

        Some of "model", "adapter", "classifier", "speculative_factor", in this order.
        """
        asked = [
            name
            for name in ("model", "adapter", "classifier")
            if getattr(self, name) is not None and not (name == "model" and self.model in FREE_DRAFTERS)
        ]
        return (*asked, "speculative_factor") if self.speculative_factor != 1 else tuple(asked)

    def render(self, text: str) -> str:
        """The term's prompt for a completion request whose prompt is `text`."""
        if self.prompt is not None:
            # Not str.format: a template may hold any other braces, JSON for instance.
            return self.prompt.replace("{input}", text)
        return text if self.system is None else f"{self.system}\n{text}"

    def to_dict(self) -> dict[str, Any]:
        """The request form of the term: only what differs from a plain term, and not its name."""
        return {key: value for key in _REQUEST_FIELDS if (value := getattr(self, key)) != _default(key)}


_LANGUAGE_MODEL_OPTIONS: Final = ("system", "prompt", "adapter", "speculative_factor")
_CLASSIFIER_OPTIONS: Final = ("label", "minimize", "form", "top_k", "every")
_REQUEST_FIELDS: Final = tuple(item.name for item in fields(TermFields) if item.name != "name")


def _default(key: str) -> Any:
    return TermFields.__dataclass_fields__[key].default

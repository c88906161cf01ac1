"""How large a formula may be before the server refuses to read on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_marith.language.validation import sentence

# Nested parentheses and calls in any formula, whoever wrote it.  Every walk over a tree recurses a few
# frames a level, so this also keeps hostile input far from Python's own recursion limit.
MAX_NESTING: Final = 64


class SettingsError(ValueError):
    """A server setting that cannot be used; the text names it."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Limits:
    """Bounds on one request's formula.  All of them are inclusive.

    Attributes:
        max_terms: distinct terms; each is a row of every forward pass.
        max_nodes: terms, numbers and operators as written, presets counted as what they stand for.
        max_depth: nested parentheses and calls.
        max_formula_chars: length of the formula's text.
        max_template_chars: length of one term's `system` or `prompt`.
        max_classifier_chars: text that one classifier term reads in front of the answer; for each of its
            candidates, at every token.  Held by admission, which has the request's text.
        max_prompt_tokens: prompt tokens of all terms together, None for no bound of our own (a prompt is
            always bounded by the model's context); held by admission, which is who counts tokens.
    """

    max_terms: Annotated[int, Field(ge=1, strict=True)] = 16
    max_nodes: Annotated[int, Field(ge=1, strict=True)] = 256
    max_depth: Annotated[int, Field(ge=1, le=MAX_NESTING, strict=True)] = 16
    max_formula_chars: Annotated[int, Field(ge=1, strict=True)] = 4096
    max_template_chars: Annotated[int, Field(ge=1, strict=True)] = 32768
    max_classifier_chars: Annotated[int, Field(ge=1, strict=True)] = 32768
    max_prompt_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Limits:
        """The `limits` part of the server's settings.

        Raises:
            SettingsError: an unknown key, or a value that is not a positive whole number.
        """
        try:
            return TypeAdapter(cls).validate_python(dict(settings))
        except ValidationError as error:
            known = tuple(cls.__dataclass_fields__)
            raise SettingsError(sentence(error, what="limits", known=known)) from None

    @property
    def max_request_chars(self) -> int:
        """Longest request text worth decoding: no request within the other bounds is longer.

        JSON may spell one character as twelve (an escaped surrogate pair).
        """
        return 12 * (self.max_formula_chars + self.max_terms * (self.max_template_chars + 1024))


# For text written by the person who runs the program: only bounded enough to be safe to read.
TRUSTED: Final = Limits(
    max_terms=1024,
    max_nodes=4096,
    max_depth=MAX_NESTING,
    max_formula_chars=1 << 16,
    max_template_chars=1 << 24,
)

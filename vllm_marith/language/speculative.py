"""What a request, a preset or a server says about speculative sampling: whether to draft, and how far."""

from __future__ import annotations

from typing import Any, Literal

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.validation import describe

Speculative = Literal["auto", "off"] | int
"""Whether to draft: "off"; so many tokens at a time, where 0 is "off"; or "auto", as far as it pays."""


def check_speculative(value: Any) -> Speculative:
    """`value`, if it is one.

    Raises:
        FormulaError: saying what it could be.
    """
    if value == "auto":
        return "auto"
    if value == "off":
        return "off"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise FormulaError(
        f'\'speculative\' must be "auto", "off" or the number of tokens to draft, not {describe(value)}'
    )

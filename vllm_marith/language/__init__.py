"""The language of formulas: text or Python operators -> `Formula`.  Pure Python; knows nothing of vLLM."""

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import REQUEST_KEY, Formula, Term, intersection, union
from vllm_marith.language.limits import Limits, SettingsError
from vllm_marith.language.presets import PresetError, Presets
from vllm_marith.language.request import parse_request

__all__ = [
    "REQUEST_KEY",
    "Formula",
    "FormulaError",
    "Limits",
    "PresetError",
    "Presets",
    "SettingsError",
    "Term",
    "intersection",
    "parse_request",
    "union",
]

"""The language of formulas: text or Python operators -> `Formula`.  Pure Python; knows nothing of vLLM."""

from vllm_marith.language.constraints import Constraints
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import REQUEST_KEY, Formula, Term
from vllm_marith.language.limits import Limits, SettingsError
from vllm_marith.language.operators import (
    indicator,
    intersection,
    kl_indicator,
    mixture,
    normalize,
    plausible,
    schedule,
    self_debias,
    strength,
    superseded,
    topk,
    topp,
    uniform,
    union,
)
from vllm_marith.language.presets import Preset, PresetError, Presets
from vllm_marith.language.request import FormulaRequest, parse_request, read_request

__all__ = [
    "REQUEST_KEY",
    "Constraints",
    "Formula",
    "FormulaError",
    "FormulaRequest",
    "Limits",
    "Preset",
    "PresetError",
    "Presets",
    "SettingsError",
    "Term",
    "indicator",
    "intersection",
    "kl_indicator",
    "mixture",
    "normalize",
    "parse_request",
    "plausible",
    "read_request",
    "schedule",
    "self_debias",
    "strength",
    "superseded",
    "topk",
    "topp",
    "uniform",
    "union",
]

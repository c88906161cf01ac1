"""Language-model arithmetic for vLLM: a formula over models, prompts and adapters, served like any model.

from vllm_marith import Term

formula = Term("You are a child.") - 0.6 * Term("You are an adult.")
llm.generate(prompts, formula.sampling_params(max_tokens=64))
"""

from vllm_marith.language import (
    Formula,
    FormulaError,
    Limits,
    PresetError,
    Presets,
    Term,
    indicator,
    intersection,
    kl_indicator,
    mixture,
    normalize,
    parse_request,
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

__all__ = [
    "Formula",
    "FormulaError",
    "Limits",
    "PresetError",
    "Presets",
    "Term",
    "indicator",
    "intersection",
    "kl_indicator",
    "mixture",
    "normalize",
    "parse_request",
    "plausible",
    "schedule",
    "self_debias",
    "strength",
    "superseded",
    "topk",
    "topp",
    "uniform",
    "union",
]

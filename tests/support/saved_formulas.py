"""Formulas as the paper's reference implementation saves them.

`model(...)` and the functions here make the JSON objects of its classes, with every key that it writes;
Python's operators nest them as its operators do: a - 0.6*b is Sum([a, Product([Product([b, 0.6]), -1])]).
"""

import json
from typing import Any

INPUT, SYSTEM = "{{input_string}}", "{{system_prompt}}"


class Saved(dict):
    """One saved object."""

    def __add__(self, other: Any) -> "Saved":
        return Saved({"class": "Sum", "terms": [self, _constant(other)]})

    __radd__ = __add__

    def __mul__(self, other: Any) -> "Saved":
        return Saved({"class": "Product", "factors": [self, _constant(other)]})

    __rmul__ = __mul__

    def __neg__(self) -> "Saved":
        return self * -1

    def __sub__(self, other: Any) -> "Saved":
        return self + -other

    def __rsub__(self, other: Any) -> "Saved":
        return -self + other

    def __or__(self, settings: Any) -> "Saved":
        return Saved({**self, **settings})

    def text(self) -> str:
        """The file."""
        return json.dumps(self, indent=2)


def _constant(value: Any) -> Saved:
    return value if isinstance(value, Saved) else Saved({"class": "Constant", "constant": value})


def saved(kind: str, **settings: Any) -> Saved:
    """An object of any class."""
    return Saved({"class": kind, **settings})


def model(
    system: str, model: str | None = "hub/big", factor: int = 1, template: str = f"{SYSTEM}\n{INPUT}"
) -> Saved:
    """PromptedLLM; `template` is what its function makes of the placeholders."""
    return saved(
        "PromptedLLM",
        speculative_factor=factor,
        model=model,
        system_prompt=system,
        prompt_template=template,
        run_priority=0,
        group=None,
        outputs_logprobs=True,
        enable_cache=True,
        dim_keys_past=2,
        dim_values_past=2,
        run_eager=False,
        model_name=None,
    )


def plain(name: str | None = "hub/big", factor: int = 1) -> Saved:
    """PromptedLLM under the input alone."""
    return model("", name, factor, INPUT)


def classifier(formula: Saved, name: str = "hub/judge", **settings: Any) -> Saved:
    """Classifier."""
    return saved(
        "Classifier",
        **_model_of_text(name, -1),
        formula=formula,
        **{"batch_size": 26, "n_runs_per_sample": 50, "minimize": False, "use_bayes": True, "index": 1}
        | settings,
    )


def classifier_strength(name: str = "hub/judge", **settings: Any) -> Saved:
    """ClassifierStrength."""
    own = {"batch_size": None, "only_input": False, "default_output": 0.5} | settings
    return saved("ClassifierStrength", **_model_of_text(name, 1) | {"outputs_logprobs": False} | own)


def autocomplete() -> Saved:
    """Autocomplete, which predicts one token from a corpus."""
    return saved("Autocomplete", **_model_of_text(None, 0), corpus=["a b"], from_save_file=None)


def _model_of_text(name: str | None, priority: int) -> dict[str, Any]:
    return {
        "speculative_factor": 1,
        "model": name,
        "system_prompt": "",
        "prompt_template": SYSTEM + INPUT,
        "run_priority": priority,
        "group": None,
        "outputs_logprobs": True,
    }


def _two(kind: str, first: Any, second: Any, include_norm: bool) -> Saved:
    own = {"wait_until_finished": True, "include_norm": include_norm}
    return saved(kind, formula1=_constant(first), formula2=_constant(second), **own)


def max_(first: Any, second: Any, include_norm: bool = True) -> Saved:
    return _two("Max", first, second, include_norm)


def min_(first: Any, second: Any, include_norm: bool = True) -> Saved:
    return _two("Min", first, second, include_norm)


def union(first: Any, second: Any) -> Saved:
    return _two("Union", first, second, True)


def intersection(first: Any, second: Any) -> Saved:
    return _two("Intersection", first, second, True)


def top_p_top_k(formula: Saved, top_p: float = 1.0, top_k: int = 0, temperature: float = 1.0) -> Saved:
    return saved("TopPTopK", formula=formula, top_p=top_p, top_k=top_k, temperature=temperature)


def kl_indicator(first: Saved, second: Saved, **settings: Any) -> Saved:
    own = {"divergence": 0, "include_max": True, "minimize": True, "top_k": None} | settings
    return saved("KL_indicator", from_formula=first, constraint_formula=second, **own)


def self_debias(formula: Saved, bias: Saved, strength: float) -> Saved:
    return saved("SelfDebias", from_formula=formula, bias_formula=bias, lambda_=strength)


def superseded(small: Saved, by: Saved) -> Saved:
    return saved("Superseded", from_formula=small, by_formula=by)

"""What a formula means, in float64: the definition that every backend is tested against.

    log P(x) = log_softmax(E / N)(x)        normalize "sum"  (paper, Theorem 1)
    log P(x) = log_softmax(E)(x)            normalize "none"

with E(x) and N(x) of each node as `nodes` gives them, on the simplified tree (`algebra.simplify`).  Two
rules make it total: -inf stays -inf under any factor but 0, negative ones included, so that a token which a
term forbids stays forbidden; and a row in which nothing is allowed is all -inf.  The result is never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_marith.language import filters
from vllm_marith.language.algebra import parts, simplify
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula
from vllm_marith.language.names import FREE_DRAFTERS
from vllm_marith.language.nodes import (
    Dialled,
    Filtered,
    Gate,
    Intersection,
    KLIndicator,
    Leaf,
    Mixture,
    Node,
    Normalized,
    Number,
    Plausible,
    Scale,
    Schedule,
    SelfDebias,
    Sum,
    Uniform,
    Union,
    walk,
)

if TYPE_CHECKING:
    import torch


def evaluate(
    formula: Formula,
    logits: Mapping[str, Any],
    dtype: Any = None,
    position: int = 0,
    probabilities: Mapping[str, float] | None = None,
) -> Any:
    """`Formula.evaluate`: term name -> logits [..., vocab]  ->  log-probabilities [..., vocab]."""
    formula.check()
    inputs, arrays = _inputs(formula, logits)
    evaluation = _Evaluation(inputs, formula.normalize, position, probabilities or {})
    result = evaluation.distribution(simplify(formula.root)).to(_torch_dtype(dtype))
    if not arrays:
        return result
    import torch

    if result.dtype == torch.bfloat16:
        raise FormulaError("numpy has no bfloat16; ask for another dtype")
    return result.numpy()


def log_softmax(values: torch.Tensor) -> torch.Tensor:
    """log_softmax over the last dimension, where a row that is all -inf stays so instead of turning NaN."""
    import torch

    total = torch.logsumexp(values, dim=-1, keepdim=True)
    return values - torch.where(torch.isneginf(total), torch.zeros_like(total), total)


@dataclass(frozen=True)
class _Evaluation:
    """The nodes' values for one set of inputs, all of them float64 [..., vocab]."""

    inputs: Mapping[str, torch.Tensor]
    normalize: str
    position: int
    probabilities: Mapping[str, float]

    def distribution(self, node: Node) -> torch.Tensor:
        """log P of a simplified node."""
        energy, weight = self.value(node)
        # weight > 0 for every token: Formula.check
        return log_softmax(energy / weight if self.normalize == "sum" else energy)

    def value(self, node: Node) -> tuple[torch.Tensor, torch.Tensor]:
        """(E, N) of a simplified node."""
        import torch

        like = next(iter(self.inputs.values()))
        one = torch.ones_like(like)
        match node:
            case Sum() | Scale():
                energy, weight = torch.zeros_like(like), torch.zeros_like(like)
                for factor, base in parts(node):
                    inner, inner_weight = self.value(base)
                    energy, weight = energy + _times(factor, inner), weight + factor * inner_weight
                return energy, weight
            case Number(constant):
                return constant * one, constant * one
            case Uniform():
                return -math.log(like.shape[-1]) * one, one
            case Leaf(name, "bayes"):
                return self.inputs[name], 0 * one
            case Leaf(name):
                return log_softmax(self.inputs[name]), one
            case Union(operands) | Intersection(operands):
                energy, weight = self.value(operands[0])
                for operand in operands[1:]:
                    other, other_weight = self.value(operand)
                    # strict: the first wins a tie
                    wins = other > energy if isinstance(node, Union) else other < energy
                    energy = torch.where(wins, other, energy)
                    weight = torch.where(wins, other_weight, weight)
                return energy, weight
            case Dialled(dial, operand):
                factor = (
                    dial.at(self.position)
                    if isinstance(dial, Schedule)
                    else dial.at(self._probability(dial.classifier.name))
                )
                energy, weight = self.value(operand)
                return _times(factor, energy), factor * weight
            case Gate(condition, operand):
                is_open = self.value(condition)[0] >= 0
                energy, weight = self.value(operand)
                return torch.where(is_open, energy, 0.0), torch.where(is_open, weight, 0.0)
            case Plausible(operand, judge, alpha):
                energy, weight = self.value(operand)
                kept = filters.plausible(self.distribution(judge), alpha)
                return torch.where(kept, energy, -math.inf), weight
            case Normalized(operand):
                return self.distribution(operand), one
            case Filtered(kind, operand, parameter):
                log_p = self.distribution(operand)
                kept = (
                    filters.topk(log_p, int(parameter)) if kind == "topk" else filters.topp(log_p, parameter)
                )
                _, weight = self.value(operand) if self.normalize == "sum" else (None, one)
                return _times(weight, log_softmax(torch.where(kept, log_p, -math.inf))), weight
            case SelfDebias(operand, biased, strength):
                log_p, log_q = self.distribution(operand), self.distribution(biased)
                excess = torch.clamp(log_p.exp() - log_q.exp(), max=0.0)
                return log_softmax(log_p + strength * excess), one
            case Mixture(weights, operands):
                weighted = [
                    self.distribution(operand) + math.log(weight)
                    for weight, operand in zip(weights, operands, strict=True)
                ]
                return log_softmax(torch.logsumexp(torch.stack(weighted), dim=0)), one
            case KLIndicator(p, q):
                is_one = filters.kl_indicator(self.distribution(p), self.distribution(q), node)
                return is_one.to(like.dtype) - 1.0, 0 * one
            case _:
                raise AssertionError(f"{node} is not simple")

    def _probability(self, classifier: str) -> float:
        if classifier not in self.probabilities:
            raise FormulaError(
                f"the formula's weights depend on the classifier '{classifier}'; give its probability of the "
                f"text so far, as in evaluate(logits, probabilities={{'{classifier}': 0.5}})"
            )
        return self.probabilities[classifier]


def _times(factor: float | torch.Tensor, energy: torch.Tensor) -> torch.Tensor:
    """factor * energy, where -inf stays -inf under every factor but 0, which drops the operand."""
    import torch

    factors = torch.as_tensor(factor, dtype=energy.dtype)
    finite = torch.where(torch.isneginf(energy), 0.0, energy)
    banned = torch.isneginf(energy) & (factors != 0)
    return torch.where(banned, -math.inf, factors * finite)


def _inputs(formula: Formula, logits: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], bool]:
    """The formula's logits as float64 tensors, and whether they came as numpy arrays."""
    import numpy
    import torch

    wanted = [node.name for node in walk(formula.root) if isinstance(node, Leaf)]
    # The others are only read by `strength`, or propose without logits.
    names = [
        name for name, term in formula.terms.items() if name in wanted and term.model not in FREE_DRAFTERS
    ]
    missing = [name for name in names if name not in logits]
    if missing:
        raise FormulaError(f"no logits for the term '{missing[0]}'; the formula has {', '.join(names)}")
    tensors: dict[str, torch.Tensor] = {}
    arrays = [name for name in names if isinstance(logits[name], numpy.ndarray)]
    for name in names:
        value = logits[name]
        if not isinstance(value, numpy.ndarray | torch.Tensor):
            kind = type(value).__name__
            raise FormulaError(f"the logits of '{name}' must be a torch tensor or numpy array, not a {kind}")
        tensor = torch.as_tensor(value)
        if tensor.is_complex():
            raise FormulaError(f"the logits of '{name}' are complex numbers")
        tensors[name] = tensor.to(torch.float64)
    if arrays and len(arrays) < len(tensors):
        raise FormulaError("the logits must be all torch tensors or all numpy arrays, not some of each")
    first = formula.leader
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape[-1] == 0:
            raise FormulaError(f"the logits of '{name}' have no vocabulary dimension: shape {_shape(tensor)}")
        if tensor.shape != tensors[first].shape:
            raise FormulaError(
                f"the logits of '{name}' have shape {_shape(tensor)} and those of '{first}' "
                f"{_shape(tensors[first])}; all terms need one shape [..., vocab]"
            )
        if bool((torch.isnan(tensor) | torch.isposinf(tensor)).any()):
            raise FormulaError(f"the logits of '{name}' contain NaN or +inf")
    return tensors, bool(arrays)


def _shape(tensor: torch.Tensor) -> list[int]:
    return list(tensor.shape)


def _torch_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype, a numpy dtype or the name of either, as a torch dtype; float64 for None."""
    import numpy
    import torch

    if dtype is None:
        return torch.float64
    if not isinstance(dtype, torch.dtype):
        name = dtype if isinstance(dtype, str) else numpy.dtype(dtype).name
        dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise FormulaError("dtype must be a floating point type, such as torch.float64 or 'float32'")
    return dtype

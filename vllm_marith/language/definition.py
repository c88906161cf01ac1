"""What a formula means, in float64: the definition that every backend is tested against.

    log P(x) = log_softmax(E / N)(x)        normalize "sum"  (paper, Theorem 1)
    log P(x) = log_softmax(E)(x)            normalize "none"

with E(x) and N(x) of each node as `nodes` gives them, on the simplified tree (`algebra.simplify`).  Two
rules make it total: -inf stays -inf under any factor, negative ones included, so that a token which a term
forbids stays forbidden; and a row in which nothing is allowed is all -inf.  The result is never NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_marith.language.algebra import parts, simplify
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula
from vllm_marith.language.nodes import Intersection, Leaf, Node, Number, Union

if TYPE_CHECKING:
    import torch


def evaluate(formula: Formula, logits: Mapping[str, Any], dtype: Any = None) -> Any:
    """`Formula.evaluate`: term name -> logits [..., vocab]  ->  log-probabilities [..., vocab]."""
    import torch

    formula.check()
    inputs, arrays = _inputs(formula, logits)
    log_q = {name: log_softmax(values) for name, values in inputs.items()}
    energy, weight = _evaluate(simplify(formula.root), log_q, next(iter(log_q.values())))
    if formula.normalize == "sum":
        energy = energy / weight  # weight > 0 for every token: Formula.check
    result = log_softmax(energy).to(_torch_dtype(dtype))
    if not arrays:
        return result
    if result.dtype == torch.bfloat16:
        raise FormulaError("numpy has no bfloat16; ask for another dtype")
    return result.numpy()


def log_softmax(values: torch.Tensor) -> torch.Tensor:
    """log_softmax over the last dimension, where a row that is all -inf stays so instead of turning NaN."""
    import torch

    total = torch.logsumexp(values, dim=-1, keepdim=True)
    return values - torch.where(torch.isneginf(total), torch.zeros_like(total), total)


def _evaluate(
    node: Node, log_q: Mapping[str, torch.Tensor], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, N) of a simplified node, both [..., vocab]."""
    import torch

    if isinstance(node, Union | Intersection):
        energy, weight = _evaluate(node.operands[0], log_q, like)
        for operand in node.operands[1:]:
            other, other_weight = _evaluate(operand, log_q, like)
            wins = (
                other > energy if isinstance(node, Union) else other < energy
            )  # strict: the first wins a tie
            energy = torch.where(wins, other, energy)
            weight = torch.where(wins, other_weight, weight)
        return energy, weight
    energy, weight = torch.zeros_like(like), torch.zeros_like(like)
    for factor, base in parts(node):
        if isinstance(base, Number):
            inner = inner_weight = torch.full_like(like, base.value)
        elif isinstance(base, Leaf):
            inner, inner_weight = log_q[base.name], torch.ones_like(like)
        else:
            inner, inner_weight = _evaluate(base, log_q, like)
        energy = energy + torch.where(torch.isneginf(inner), inner, factor * inner)
        weight = weight + factor * inner_weight
    return energy, weight


def _inputs(formula: Formula, logits: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], bool]:
    """The formula's logits as float64 tensors, and whether they came as numpy arrays."""
    import numpy
    import torch

    missing = [name for name in formula.terms if name not in logits]
    if missing:
        raise FormulaError(
            f"no logits for the term '{missing[0]}'; the formula has {', '.join(formula.terms)}"
        )
    tensors: dict[str, torch.Tensor] = {}
    arrays = [name for name in formula.terms if isinstance(logits[name], numpy.ndarray)]
    for name in formula.terms:
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

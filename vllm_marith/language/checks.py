"""What no distribution can be made of, refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from vllm_marith.language.algebra import (
    dial_range,
    distributions,
    gain,
    parts,
    positions,
    simplify,
    weight_bounds,
    weight_range,
    without_classifiers,
)
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.nodes import (
    ONE,
    Dialled,
    Filtered,
    Gate,
    KLIndicator,
    Leaf,
    Node,
    Plausible,
    Scale,
    SelfDebias,
    Superseded,
    Uniform,
    children,
    walk,
)
from vllm_marith.language.text import format_number, to_text

# A total weight N below this is a sum of weights that was meant to be 0: dividing by it gives noise.
SMALLEST_N: Final = 1e-9
# Largest factor by which a formula may amplify a log-probability.  Far beyond any method in use, and
# far enough from the largest float32 (3e38) that no backend can overflow to an infinity of the wrong sign.
LARGEST_GAIN: Final = 1e6


def check_weights(root: Node, normalize: str) -> None:
    """Refuse N(x) <= 0 under `normalize: sum`, absurd weights, and filters under a negative weight.

    Raises:
        FormulaError: naming the weights.
    """
    _check_filters(root, 1.0)
    simple = simplify(root)
    inner = list(dict.fromkeys(map(simplify, distributions(simple))))
    for operand in inner:
        if not any(isinstance(node, Uniform) or _is_distribution(node) for node in walk(operand)):
            raise FormulaError(
                f"'{to_text(operand)}' is read as a distribution and has no language model in it"
            )
        _check_positive(operand, normalize, f"of '{to_text(operand)}', which is read as a distribution,")
    for node in walk(simple):
        if isinstance(node, Filtered) and normalize == "sum":
            _check_constant(node)
    _check_positive(simple, normalize, "of the formula")
    _check_positive(without_classifiers(simple), normalize, "of the formula without its classifiers")
    largest = gain(simple, normalize)
    if largest > LARGEST_GAIN:
        raise FormulaError(
            f"the weights amplify log-probabilities up to {largest:.3g} times; "
            f"{format_number(LARGEST_GAIN)} times is the most"
        )


def check_free_drafters(node: Node, drafters: Mapping[str, str]) -> None:
    """Refuse a term that proposes tokens without a model anywhere but as what drafts for another.

    Args:
        drafters: the names of these terms, with what formulas call their models.

    Raises:
        FormulaError: naming it.
    """
    match node:
        case Superseded(Leaf(name), large) if name in drafters:
            check_free_drafters(large, drafters)
        case Leaf(name) if name in drafters:
            raise FormulaError(
                f"the term '{name}' has the model '{drafters[name]}', which has no probabilities and only "
                f"drafts: it stands in superseded({name}, ...) and nowhere else"
            )
        case _:
            for child in children(node):
                check_free_drafters(child, drafters)


def _is_distribution(node: Node) -> bool:
    return isinstance(node, Leaf) and node.classifier != "bayes"


def _check_positive(simple: Node, normalize: str, which: str) -> None:
    if normalize != "sum":
        return
    for position in positions(simple):
        lo, hi = weight_range(simple, normalize, position)
        if lo >= SMALLEST_N:
            continue
        weights = (
            ", ".join(f"{_weight_text(part)}" for part in parts(simple) if part[0] != 0.0) or "none is left"
        )
        one_value = math.isclose(lo, hi, abs_tol=1e-12)
        found = (
            f"sum to {_rounded(lo)}" if one_value else f"sum to as little as {_rounded(lo)} for some tokens"
        )
        when = f" from position {position} on" if position else ""
        raise FormulaError(
            f"the weights {which} {found}{when} ({weights}), and normalize: sum divides by that sum; "
            "give weights with a positive sum, or ask for normalize: none"
        )


def _check_constant(node: Filtered) -> None:
    """A filtered distribution has one weight for all tokens: that of the formula it filters."""
    lo, hi = weight_bounds(node.operand, "sum")
    if not math.isclose(lo, hi, rel_tol=1e-9):
        inner = to_text(node.operand)
        raise FormulaError(
            f"the weight of '{inner}' goes from {_rounded(lo)} to {_rounded(hi)}, and {node.kind} needs one "
            f"for all tokens; write {node.kind}(normalize({inner}), {format_number(node.parameter)})"
        )


def _check_filters(node: Node, sign: float) -> None:
    """Refuse topk and topp where a negative weight would turn "unlikely" into "wanted"."""
    if isinstance(node, Filtered) and sign < 0:
        raise FormulaError(
            f"{node.kind}(...) stands under a negative weight: what it cuts off has probability 0 there, "
            "which forbids those tokens instead of favouring them; subtract the formula unfiltered, or keep "
            "only plausible tokens with plausible(...) around the whole formula"
        )
    match node:
        case Scale(factor, operand):
            _check_filters(operand, math.copysign(sign, sign * factor))
        case Dialled(_, operand):
            for position in positions(node):
                for end in dial_range(node, position):
                    _check_filters(operand, math.copysign(sign, sign * end) if end else sign)
        case Gate(condition, operand) | Plausible(operand, condition, _):
            _check_filters(operand, sign)
            for child in children(condition) if isinstance(condition, KLIndicator) else (condition,):
                _check_filters(child, 1.0)
        case SelfDebias(operand, biased, _):
            _check_filters(operand, sign)
            _check_filters(biased, 1.0)
        case _:
            for child in children(node):
                _check_filters(child, sign)


def _weight_text(part: tuple[float, Node]) -> str:
    weight, base = part
    return f"{_rounded(weight)} for {'the number' if base == ONE else to_text(base)}"


def _rounded(value: float) -> str:
    """A weight for a sentence: without the digits that only rounding put there."""
    return f"{0.0 if abs(value) < SMALLEST_N else value:.6g}"

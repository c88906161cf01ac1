"""A formula's tree as text; parsing it gives the same tree back."""

from __future__ import annotations

from vllm_marith.language.nodes import (
    Dial,
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
    Superseded,
    Uniform,
    Union,
)

# Options of KLIndicator that need not be written where nothing follows them.
_KL_DEFAULTS = (0.0, 0, True, True)


def format_number(value: float) -> str:
    """The shortest text that reads back as the same float; whole numbers without a point."""
    text = repr(float(value))
    return text[:-2] if text.endswith(".0") else text


def to_text(node: Node) -> str:
    """The formula as text; parsing it gives the same tree back."""
    match node:
        case Number(value):
            return format_number(value)
        case Leaf(name):
            return name
        case Uniform():
            return "uniform"
        case Scale(-1.0, operand):
            return f"-{_operand(operand)}"
        case Scale(factor, operand):
            return f"{format_number(factor)}*{_operand(operand)}"
        case Dialled(dial, operand):
            return _product(dial_text(dial), operand)
        case Gate(KLIndicator() as condition, operand):
            return _product(to_text(condition), operand)
        case Gate(condition, operand):
            return _product(_call("indicator", condition), operand)
        case Sum(operands):
            return _sum(operands)
        case Union(operands):
            return _call("union", *operands)
        case Intersection(operands):
            return _call("intersection", *operands)
        case Normalized(operand):
            return _call("normalize", operand)
        case Filtered(kind, operand, parameter):
            return _call(kind, operand, parameter)
        case SelfDebias(operand, biased, strength):
            return _call("self_debias", operand, biased, strength)
        case Plausible(operand, judge, alpha):
            return _call("plausible", operand, judge, alpha)
        case Superseded(small, large):
            return _call("superseded", small, large)
        case Mixture(weights, operands):
            pairs = zip(weights, operands, strict=True)
            return f"mixture({', '.join(f'{format_number(w)}: {to_text(a)}' for w, a in pairs)})"
        case KLIndicator(p, q):
            options = [node.divergence, node.top_k, node.include_max, node.minimize]
            while options and options[-1] == _KL_DEFAULTS[len(options) - 1]:
                options.pop()
            return _call("kl_indicator", p, q, *options)


def dial_text(dial: Dial) -> str:
    """A factor that is only known at each step, as text."""
    if isinstance(dial, Schedule):
        points = ", ".join(f"{start}: {format_number(value)}" for start, value in dial.points)
        return f"schedule({points})"
    bounds = () if (dial.low, dial.high) == (0.0, 1.0) else (dial.low, dial.high)
    return _call("strength", dial.classifier, *bounds)


def _sum(operands: tuple[Node, ...]) -> str:
    text = to_text(operands[0])
    for operand in operands[1:]:
        following = to_text(operand)
        # A text that starts with a minus is a negative factor or number: a - 0.6*b.
        text += f" - {following[1:]}" if following.startswith("-") else f" + {following}"
    return text


def _operand(node: Node) -> str:
    return f"({to_text(node)})" if isinstance(node, Sum) else to_text(node)


def _product(factor: str, operand: Node) -> str:
    return factor if isinstance(operand, Number) else f"{factor}*{_operand(operand)}"


def _call(name: str, *arguments: Node | float) -> str:
    texts = [format_number(a) if isinstance(a, int | float) else to_text(a) for a in arguments]
    return f"{name}({', '.join(texts)})"

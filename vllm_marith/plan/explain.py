"""A plan as text that a person can check against the formula they meant."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_marith.language.algebra import parts, simplify
from vllm_marith.language.expression import Formula, Term
from vllm_marith.language.nodes import Number, to_text
from vllm_marith.plan.program import NO_TERM, Instruction, Plan, lower

_LABEL = 11  # width of the left column
_PROMPT = 60  # characters of a prompt that are shown


def explain(formula: Formula) -> str:
    """The formula's normalised weights, its terms and the program that runs them.

    Raises:
        FormulaError: the formula defines no distribution.
    """
    plan = lower(formula)
    lines = [
        _line("formula", str(formula)),
        _line("normalize", _normalization(formula, plan)),
        *_table("weights", _weights(formula, plan)),
        *_table("terms", _terms(formula, plan)),
        _line("forward", f"{len(plan.terms)} rows a token, one for each term"),
        _line("fusion", _fusion(plan)),
        *_table("program", (_instruction(plan, instruction) for instruction in plan.instructions)),
    ]
    return "\n".join(lines)


def _normalization(formula: Formula, plan: Plan) -> str:
    if formula.normalize == "none":
        return "none: softmax(E)"
    if plan.divide:
        return f"sum: softmax(E / N), N from {plan.weight[0]:.6g} to {plan.weight[1]:.6g} from token to token"
    return f"sum: softmax(E / N), N = {plan.weight[0]:.6g}"


def _weights(formula: Formula, plan: Plan) -> Iterator[str]:
    """Weights of the formula's summands, divided by N where N is one number."""
    total = plan.weight[0] if formula.normalize == "sum" and not plan.divide else 1.0
    for weight, base in parts(simplify(formula.root)):
        if not isinstance(base, Number):
            yield f"{weight / total:>10.6g}  {to_text(base)}"
        elif plan.divide:  # everywhere else a number in a sum changes nothing but N
            yield f"{weight / total:>10.6g}"


def _terms(formula: Formula, plan: Plan) -> Iterator[str]:
    width = max(len(name) for name in formula.terms)
    for name, term in formula.terms.items():
        notes = ["leader"] if name == formula.leader else []
        if name not in plan.terms:
            notes.append("not run: its weights cancel")
        elif not any(term_index == plan.terms.index(name) for _, term_index, _ in plan.instructions):
            notes.append("weight 0")
        told = f"  ({', '.join(notes)})" if notes else ""
        yield f"{name:<{width}}  {_term(term)}{told}"


def _term(term: Term) -> str:
    told = []
    for key, value in term.to_dict().items():
        shown = value if not isinstance(value, str) or len(value) <= _PROMPT else value[: _PROMPT - 1] + "…"
        told.append(f"{key} {shown!r}" if key in ("system", "prompt") else f"{key} {shown}")
    return ", ".join(told) or "the request as it is"


def _fusion(plan: Plan) -> str:
    kind = "linear, one pass over the logits" if plan.linear else "nonlinear, log-sum-exp of every term first"
    slots = f"{plan.depth} slot{'s' if plan.depth > 1 else ''}"
    return f"{kind}; {slots}{'; divides by N per token' if plan.divide else ''}"


def _instruction(plan: Plan, instruction: Instruction) -> str:
    op, term, weight = instruction
    if op == "scale" or op.startswith("pop_"):
        return f"{op:<8} {weight:.6g}"
    operand = "1" if term == NO_TERM else plan.terms[term]
    return f"{op:<8} {weight:.6g} * {operand}" if weight != 1.0 else f"{op:<8} {operand}"


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _table(label: str, rows: Iterator[str]) -> Iterator[str]:
    for row in rows:
        yield _line(label, row)
        label = ""

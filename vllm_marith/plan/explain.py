"""A plan as text that a person can check against the formula they meant."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_marith.language.algebra import parts, simplify
from vllm_marith.language.expression import Formula, Term
from vllm_marith.language.names import FREE_DRAFTERS, NGRAM, SUFFIX
from vllm_marith.language.nodes import Number, Superseded, walk
from vllm_marith.language.text import dial_text, format_number, to_text
from vllm_marith.plan.lowering import lower
from vllm_marith.plan.program import NO_ROW, UNIFORM_ROW, Plan, Stage
from vllm_marith.plan.speculation import Speculation, speculate

_LABEL = 11  # width of the left column
_PROMPT = 60  # characters of a prompt that are shown
_FREE = {NGRAM: "n-grams", SUFFIX: "suffixes, of earlier answers, too"}
_KL_OPTIONS = ("divergence", "include_max", "minimize", "top_k")


def explain(formula: Formula) -> str:
    """The formula's normalised weights, its terms, what drafts, and the program that runs them.

    Raises:
        FormulaError: the formula defines no distribution.
    """
    plan = lower(formula)
    speculation = speculate(formula)
    lines = [
        _line("formula", str(formula)),
        _line("normalize", _normalization(formula, plan)),
        *_table("weights", _weights(formula, plan)),
        *_table("terms", _terms(formula, plan, speculation)),
        *_table("drafts", _drafts(formula, speculation)),
        _line("forward", _count(plan)),
        _line("fusion", _fusion(plan.stages)),
    ]
    for number, stage in enumerate(plan.stages, 1):
        label = "program" if len(plan.stages) == 1 else f"stage {number}"
        lines += _table(label, _stage(plan, stage))
    return "\n".join(lines)


def _normalization(formula: Formula, plan: Plan) -> str:
    if formula.normalize == "none":
        return "none: softmax(E)"
    lo, hi = plan.weight
    if plan.stages[-1].divide:
        return f"sum: softmax(E / N), N from {lo:.6g} to {hi:.6g} from token to token"
    return f"sum: softmax(E / N), N = {lo:.6g}"


def _weights(formula: Formula, plan: Plan) -> Iterator[str]:
    """Weights of the formula's summands, divided by N where N is one number."""
    divide = plan.stages[-1].divide
    total = plan.weight[0] if formula.normalize == "sum" and not divide else 1.0
    for weight, base in parts(simplify(formula.root)):
        if not isinstance(base, Number):
            yield f"{weight / total:>10.6g}  {to_text(base)}"
        elif divide:  # everywhere else a number in a sum changes nothing but N
            yield f"{weight / total:>10.6g}"


def _terms(formula: Formula, plan: Plan, speculation: Speculation | str) -> Iterator[str]:
    width = max(len(name) for name in formula.terms)
    read = {row for stage in plan.stages for _, row, _ in stage.instructions}
    read |= {row for stage in plan.stages for row in stage.sources}
    for name, term in formula.terms.items():
        notes = ["leader"] if name == formula.leader else []
        drafts = isinstance(speculation, Speculation) and name in speculation.drafters
        if drafts or term.model in FREE_DRAFTERS:
            notes.append("only drafts")
        elif name not in plan.terms + plan.classifiers:
            notes.append("not run: it only drafts, or its weights cancel")
        elif name in plan.terms and plan.terms.index(name) not in read:
            notes.append("weight 0")
        told = f"  ({', '.join(notes)})" if notes else ""
        yield f"{name:<{width}}  {_term(term)}{told}"


def _drafts(formula: Formula, speculation: Speculation | str) -> Iterator[str]:
    """Nothing for formulas that say nothing of drafts."""
    if isinstance(speculation, str):
        if any(isinstance(node, Superseded) for node in walk(formula.root)) or any(
            term.speculative_factor > 1 for term in formula.terms.values()
        ):
            yield f"none: {speculation}"
        return
    proposals = [_FREE[speculation.free]] if speculation.free else []
    proposals += [str(level.formula) for level in speculation.levels]
    testers = [*proposals[1:], "the formula"]
    for proposal, length, tester in zip(proposals, speculation.lengths, testers, strict=True):
        yield f"{length} token{'s' if length > 1 else ''} of {proposal}, tested by {tester}"


def _term(term: Term) -> str:
    told = []
    for key, value in term.to_dict().items():
        shown = value if not isinstance(value, str) or len(value) <= _PROMPT else value[: _PROMPT - 1] + "…"
        told.append(f"{key} {shown!r}" if key in ("system", "prompt") else f"{key} {shown}")
    return ", ".join(told) or "the request as it is"


def _count(plan: Plan) -> str:
    told = f"{len(plan.terms)} rows a token, one for each term"
    if plan.classifiers:
        told += f"; classifiers on the likeliest tokens: {', '.join(plan.classifiers)}"
    return told


def _fusion(stages: tuple[Stage, ...]) -> str:
    linear = all(stage.linear for stage in stages)
    kind = "linear, one pass over the logits" if linear else "nonlinear, log-sum-exp of every term first"
    if len(stages) > 1:
        kind = f"{len(stages)} stages, each a row of its own"
    depth = max(stage.depth for stage in stages)
    slots = f"{depth} slot{'s' if depth > 1 else ''}"
    return f"{kind}; {slots}{'; divides by N per token' if stages[-1].divide else ''}"


def _stage(plan: Plan, stage: Stage) -> Iterator[str]:
    dials = dict[int, str]()
    for place, dial in stage.dialled:
        dials[place] = dials.get(place, "") + f" * {dial_text(plan.dials[dial])}"
    for place, (op, row, weight) in enumerate(stage.instructions):
        operand = "" if op == "scale" or op.startswith("pop_") else _row(plan, row)
        shown = f"{weight:.6g}" if not operand else operand if weight == 1.0 else f"{weight:.6g} * {operand}"
        yield f"{op:<8} {shown}{dials.get(place, '')}"
    sources = ", ".join(_row(plan, row) for row in stage.sources)
    match stage.kind:
        case "top_k" | "top_p":
            yield f"{stage.kind:<8} {format_number(stage.parameters[0])}"
        case "plausible":
            yield f"plausible tokens of {sources}, alpha {stage.parameters[0]:.6g}"
        case "kl_indicator":
            options = zip(_KL_OPTIONS, stage.parameters, strict=True)
            yield f"kl_indicator of {sources}; " + ", ".join(f"{name} {value:g}" for name, value in options)
        case "classifier":
            yield f"{plan.classifiers[int(stage.parameters[0])]} on the likeliest tokens of {sources}"


def _row(plan: Plan, row: int) -> str:
    if row == NO_ROW:
        return "1"
    if row == UNIFORM_ROW:
        return "uniform"
    terms = len(plan.terms)
    return plan.terms[row] if row < terms else f"(stage {row - terms + 1})"


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _table(label: str, rows: Iterator[str]) -> Iterator[str]:
    for row in rows:
        yield _line(label, row)
        label = ""

"""Formula -> plan.

A sub-formula that is read as a distribution becomes a stage of its own, once however often it is read; the
rest of the formula is one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vllm_marith.language.algebra import parts, simplify, weight_bounds, without_classifiers
from vllm_marith.language.building import add, dialled, divide, gate, join, scale
from vllm_marith.language.expression import Formula
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
    SelfDebias,
    Strength,
    Sum,
    Uniform,
    Union,
    leaf_names,
    mapped,
)
from vllm_marith.plan.program import NO_ROW, UNIFORM_ROW, Instruction, Kind, Plan, Stage

# Bounds on N this close differ by rounding only: N is the same for every token and step.
_CONSTANT: Final = 1e-12


def lower(formula: Formula, terms: Sequence[str] | None = None) -> Plan:
    """The plan of a formula.

    Args:
        terms: names of the language models by which rows are numbered, for plans that share the rows of a
            group: of a formula and its partial formulas.  By default the formula's own, leader first.

    Raises:
        FormulaError: the formula defines no distribution (`Formula.check`).
        ValueError: a language model that the formula needs is not among `terms`.
    """
    formula.check()
    root = simplify(formula.root)
    weight = weight_bounds(root, formula.normalize)
    root = _classifiers_last(_filters_apart(root, formula.normalize), formula.normalize)
    needed = {name for name in leaf_names(root) if formula.terms[name].classifier is None}
    if terms is None:
        # The leader comes first: what only drafts may stand before it.
        terms = (formula.leader, *(n for n in formula.terms if n in needed and n != formula.leader))
    elif lacking := needed - set(terms):
        raise ValueError(f"no rows for the terms {', '.join(sorted(lacking))} of {formula}")
    rows = tuple(terms)
    stages = _Stages(rows, formula.normalize, without_classifiers(root))
    stages.finish(root)
    return Plan(
        terms=rows,
        stages=tuple(stages.done),
        dials=tuple(stages.dials),
        classifiers=tuple(stages.classifiers),
        weight=weight,
    )


def _filters_apart(node: Node, normalize: str) -> Node:
    """The tree in which every topk and topp has the weight 1: topk(a) = N_a topk(normalize(a))."""

    def visit(inner: Node) -> Node:
        return _filters_apart(inner, normalize)

    match node:
        case Filtered(kind, operand, parameter):
            lo, _ = weight_bounds(operand, normalize) if normalize == "sum" else (1.0, 1.0)
            return scale(lo, Filtered(kind, Normalized(visit(operand)), parameter))
        case Scale(factor, operand):
            return scale(factor, visit(operand))
        case Gate(condition, operand):
            return gate(
                mapped(condition, visit) if isinstance(condition, KLIndicator) else visit(condition),
                visit(operand),
            )
        case Dialled(dial, operand):
            return dialled(dial, visit(operand))
        case _:
            return mapped(node, visit)


def _classifiers_last(root: Node, normalize: str) -> Node:
    """c + rest = c + N normalize(rest) for classifiers c: what they look at is most of the result."""
    rest = without_classifiers(root)
    lo, hi = weight_bounds(rest, normalize) if normalize == "sum" else (1.0, 1.0)
    if rest is root or not isinstance(root, Sum) or hi - lo > _CONSTANT * hi:
        return root
    kept = set(rest.operands if isinstance(rest, Sum) else (rest,))
    others = [operand for operand in root.operands if operand not in kept]
    if len(others) + len(kept) > len(root.operands) or any(
        not isinstance(_undialled(*_weighted(operand))[1], Leaf) for operand in others
    ):
        return root
    return add(scale(lo, Normalized(rest)), *others)


class _Stages:
    """The stages of one formula, as they are found to be needed."""

    def __init__(self, terms: tuple[str, ...], normalize: str, inner: Node) -> None:
        self.done: list[Stage] = []
        self.dials: list[Dial] = []
        self.classifiers: list[str] = []
        self.normalize = normalize
        self._terms = {name: index for index, name in enumerate(terms)}
        self._inner = inner
        self._rows: dict[Node, int] = {}

    def finish(self, root: Node) -> None:
        """Append the stages of the whole formula; its own comes last."""
        row = self.distribution(root)
        if self.done and row == len(self._terms) + len(self.done) - 1:
            return
        self.done.append(Stage("fuse", (("push", row, 1.0),), depth=1))

    def distribution(self, node: Node) -> int:
        """The row of a simplified node's log P."""
        node = self._bare(node)
        if isinstance(node, Leaf) and node.classifier != "bayes":
            return self.leaf(node)
        if node not in self._rows:
            stage = self._stage_of(node)
            self._rows[node] = self._append(stage)
        return self._rows[node]

    def leaf(self, node: Node) -> int:
        """The row of what one instruction can read."""
        match node:
            case Number():
                return NO_ROW
            case Uniform():
                return UNIFORM_ROW
            case Leaf(name, ""):
                return self._terms[name]
            case Leaf():
                return self._classifier(node)
            case _:
                return self.distribution(node)

    def dial(self, dial: Dial) -> int:
        if isinstance(dial, Strength):
            self._classifier_index(dial.classifier.name)
        if dial not in self.dials:
            self.dials.append(dial)
        return self.dials.index(dial)

    def mask(self, node: Plausible) -> int:
        """The row that adds -inf to what the judge finds implausible."""
        key = replace(node, operand=Number(0.0))
        if key not in self._rows:
            source = self.distribution(node.judge)
            stage = Stage("plausible", parameters=(node.alpha,), sources=(source,), weightless=True)
            self._rows[key] = self._append(stage)
        return self._rows[key]

    def indicator(self, node: KLIndicator) -> int:
        """The row that is 0 where the indicator is one and -1 elsewhere."""
        if node not in self._rows:
            sources = self.distribution(node.p), self.distribution(node.q)
            options = (node.divergence, float(node.include_max), float(node.minimize), float(node.top_k))
            stage = Stage("kl_indicator", parameters=options, sources=sources, weightless=True)
            self._rows[node] = self._append(stage)
        return self._rows[node]

    def _bare(self, node: Node) -> Node:
        """The node without what changes nothing about its distribution."""
        while True:
            scaled = isinstance(node, Scale) and node.factor > 0 and self.normalize == "sum"
            if not isinstance(node, Normalized) and not scaled:
                return node
            assert isinstance(node, Normalized | Scale)
            node = node.operand

    def _stage_of(self, node: Node) -> Stage:
        match node:
            case SelfDebias(operand, biased, strength):
                row, other = self._operand(operand), self._operand(biased)
                return Stage("fuse", (("push", row, 1.0), ("debias", other, strength)), depth=1)
            case Mixture(weights, operands):
                rows = [self._operand(operand) for operand in operands]
                # The first weight is a constant in E, which softmax does not see.
                more = [("logadd", row, w / weights[0]) for row, w in zip(rows[1:], weights[1:], strict=True)]
                return Stage("fuse", (("push", rows[0], 1.0), *more), depth=1)
            case Filtered(kind, operand, parameter):
                # The operand's row is written and filtered in place, so it is not shared with others.
                operand = self._bare(operand)
                if isinstance(operand, Leaf | Filtered) or operand in self._rows:
                    inner = Stage("fuse", (("push", self.distribution(operand), 1.0),), depth=1)
                else:
                    inner = self._stage_of(operand)
                kept: Kind = "top_k" if kind == "topk" else "top_p"
                return replace(inner, kind=kept, parameters=(parameter,))
            case _:
                return self._program(node)

    def _operand(self, node: Node) -> int:
        return UNIFORM_ROW if isinstance(node, Uniform) else self.distribution(node)

    def _program(self, root: Node) -> Stage:
        lo, hi = weight_bounds(root, self.normalize)
        divides = self.normalize == "sum" and hi - lo > _CONSTANT * max(abs(lo), abs(hi))
        if not divides:
            root = _without_constants(root)
            root = _distribute(divide(root, lo) if self.normalize == "sum" else root)
        compiler = _Compiler(self, keep_order=divides)
        compiler.push(root)
        return Stage(
            "fuse",
            tuple(compiler.instructions),
            divide=divides,
            dialled=tuple(compiler.dialled),
            depth=compiler.deepest,
        )

    def _classifier(self, node: Leaf) -> int:
        if node not in self._rows:
            index = self._classifier_index(node.name)
            source = self.distribution(self._inner)
            weightless = node.classifier == "bayes"
            stage = Stage("classifier", parameters=(float(index),), sources=(source,), weightless=weightless)
            self._rows[node] = self._append(stage)
        return self._rows[node]

    def _classifier_index(self, name: str) -> int:
        if name not in self.classifiers:
            self.classifiers.append(name)
        return self.classifiers.index(name)

    def _append(self, stage: Stage) -> int:
        self.done.append(stage)
        return len(self._terms) + len(self.done) - 1


def _without_constants(root: Node) -> Node:
    """The top-level sum without what is the same for every token, which softmax does not see."""
    kept = [scale(weight, base) for weight, base in parts(root) if not isinstance(base, Number | Uniform)]
    return add(*kept)


def _distribute(node: Node, factor: float = 1.0) -> Node:
    """`factor * node` with positive factors moved into unions and intersections, where they cost nothing.

    c*max(a, b) = max(c*a, c*b) for c > 0.  For c < 0 it would be a min, which treats -inf differently.
    Only for programs that do not divide: a product rounded differently may decide a tie, and N, differently.
    """
    match node:
        case Sum(operands):
            return add(*(_distribute(operand, factor) for operand in operands))
        case Scale(inner, operand):
            return _distribute(operand, factor * inner)
        case Union(operands) | Intersection(operands) if factor > 0:
            return join(type(node), [_distribute(operand, factor) for operand in operands])
        case Union(operands) | Intersection(operands):
            return scale(factor, join(type(node), [_distribute(operand) for operand in operands]))
        case _:
            return scale(factor, node)


class _Compiler:
    """Emits the instructions of a simplified tree and counts the slots they use."""

    def __init__(self, stages: _Stages, keep_order: bool) -> None:
        self.instructions: list[Instruction] = []
        self.dialled: list[tuple[int, int]] = []
        self.deepest = 0
        self._slots = 0
        self._stages = stages
        # Where N depends on who wins, the first of equal operands must stay the first.
        self._keep_order = keep_order

    def push(self, node: Node) -> None:
        """Leave the node's value in a new slot."""
        match node:
            case Union(operands):
                self._combine("max", [_weighted(operand) for operand in operands], self._keep_order)
            case Intersection(operands):
                self._combine("min", [_weighted(operand) for operand in operands], self._keep_order)
            case Sum():
                self._combine("add", parts(node), keep_order=False)
            case Plausible(operand, _, _):
                self.push(operand)
                self._emit("add", self._stages.mask(node), 1.0)
            case Gate(condition, operand):
                if isinstance(condition, KLIndicator):
                    self._emit("push", self._stages.indicator(condition), 1.0, slots=1)
                else:
                    self.push(condition)
                weight, base, dials = _undialled(*_weighted(operand))
                self.push(base)
                self._emit("pop_gate", NO_ROW, weight, slots=-1, dials=dials)
            case _:
                self._combine("add", parts(node), keep_order=True)

    def _combine(self, op: str, operands: list[tuple[float, Node]], keep_order: bool) -> None:
        # The operand that needs most slots goes first, while no other result has to be kept.
        ordered = operands if keep_order else sorted(operands, key=lambda operand: -_slots(operand[1]))
        for place, operand in enumerate(ordered):
            weight, base, dials = _undialled(*operand)
            if _is_row(base):
                row = self._stages.leaf(base)
                self._emit("push" if place == 0 else op, row, weight, slots=place == 0, dials=dials)
                continue
            self.push(base)
            if place > 0:
                self._emit(f"pop_{op}", NO_ROW, weight, slots=-1, dials=dials)
            elif weight != 1.0 or dials:
                self._emit("scale", NO_ROW, weight, dials=dials)

    def _emit(self, op: str, row: int, weight: float, slots: int = 0, dials: tuple[Dial, ...] = ()) -> None:
        self.dialled += [(len(self.instructions), self._stages.dial(dial)) for dial in dials]
        self.instructions.append((op, row, weight))
        self._slots += slots
        self.deepest = max(self.deepest, self._slots)


def _is_row(base: Node) -> bool:
    """Whether one instruction can read it: a term, a constant, or what is a stage of its own."""
    return isinstance(base, Leaf | Number | Uniform | Normalized | Filtered | SelfDebias | Mixture)


def _weighted(operand: Node) -> tuple[float, Node]:
    """An operand as (weight, base); a sum is a base of its own here."""
    return (1.0, operand) if isinstance(operand, Sum) else parts(operand)[0]


def _undialled(weight: float, base: Node) -> tuple[float, Node, tuple[Dial, ...]]:
    """The base without the dials in front of it, and those dials."""
    dials: list[Dial] = []
    while isinstance(base, Dialled):
        dials.append(base.dial)
        inner, base = _weighted(base.operand)
        weight *= inner
    return weight, base, tuple(dials)


def _slots(node: Node) -> int:
    """Slots that `push` needs for a node; 0 for what one instruction combines without a slot of its own."""
    if _is_row(node):
        return 0
    match node:
        case Dialled():
            return _slots(_undialled(1.0, node)[1])
        case Scale(_, operand) | Plausible(operand, _, _):
            return max(1, _slots(operand))
        case Gate(condition, operand):
            return max(1, _slots(condition), 1 + max(1, _slots(_undialled(*_weighted(operand))[1])))
        case Sum(operands) | Union(operands) | Intersection(operands):
            bases = [_undialled(*_weighted(operand))[1] for operand in operands]
            needed = sorted(map(_slots, bases), reverse=True)
            return max(needed[0], 1, *(1 + other for other in needed[1:]))
        case _:
            return 1

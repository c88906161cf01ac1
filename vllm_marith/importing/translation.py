"""Saved objects -> a formula's tree, class by class.

What a class of the reference computes stands in its `evaluate` (E, or log P with normalize=True) and `norm`
(N).  A class is translated only where our tree has the same E and N for every token, up to a constant that no
formula around it can see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Final

from vllm_marith.importing.saved import MAX_DEPTH, Saved
from vllm_marith.importing.terms import NGRAMS, PROMPT, RUNNING, Source, classifier, language_model
from vllm_marith.language import building
from vllm_marith.language.algebra import simplify, weight_bounds, without_classifiers
from vllm_marith.language.nodes import (
    Filtered,
    Intersection,
    Leaf,
    Mixture,
    Node,
    Normalized,
    SelfDebias,
    Superseded,
    Uniform,
    Union,
    leaf_names,
)
from vllm_marith.language.validation import did_you_mean, shown

_REFUSED: Final = {
    "Abs": "Abs has no counterpart; max(f, -f) has the same energy and another weight",
    "Autocomplete": (
        "an Autocomplete predicts one token with certainty; n-grams take its place where it drafts, as the "
        "first operand of a Superseded, and it has no counterpart elsewhere"
    ),
    "Functional": "a Functional holds pickled code, which is never loaded",
    "HardConstraint": "a HardConstraint takes back text that is written already and is no part of a formula",
}


class Translation:
    """The tree of one file, and what was found on the way.

    Raises:
        SavedFormulaError: naming the place of what cannot be translated with the same meaning.

    Attributes:
        root: the tree.
        sources: name in the tree -> model as the file has it.
        notes: what a reader should know.
    """

    def __init__(self, whole: Saved) -> None:
        self.sources: dict[str, Source] = {}
        self.notes: list[str] = []
        self._named: dict[Source, str] = {}
        self._candidates: list[Node] = []
        self._whole = whole
        self.root = self._node(whole, 0)
        used = set(leaf_names(self.root))  # what a classifier's candidates are of need not be in the formula
        self.sources = {name: source for name, source in self.sources.items() if name in used}
        for candidates in self._candidates:
            if simplify(candidates) != without_classifiers(simplify(self.root)):
                self._note(
                    "A classifier here reads the likeliest tokens of the formula without its classifiers; in "
                    "the file it reads those of another formula."
                )

    def _node(self, operand: Saved | float, depth: int) -> Node:
        if not isinstance(operand, Saved):
            return building.number(operand)
        if operand.kind in _REFUSED:
            raise operand.refusal(_REFUSED[operand.kind])
        if depth > MAX_DEPTH:
            raise operand.refusal(f"formulas nested more than {MAX_DEPTH} deep")
        translate = _CLASSES.get(operand.kind)
        if translate is None:
            meant = did_you_mean(operand.kind, [*_CLASSES, *_REFUSED])
            hint = f"; did you mean '{meant}'?" if meant else ""
            raise operand.refusal(f"unknown class '{shown(operand.kind)}'{hint}")
        return operand.build(lambda: translate(self, operand, depth + 1))

    def _inner(self, saved: Saved, key: str, depth: int) -> Node:
        return self._node(saved.operand(key), depth)

    # -- arithmetic ---------------------------------------------------------------------------------------

    def _constant(self, saved: Saved, depth: int) -> Node:
        saved.only("constant")
        return building.number(saved.number("constant", 1.0))

    def _optimizable(self, saved: Saved, depth: int) -> Node:
        saved.only("constant", "init_val", "use_norm")
        key = "constant" if saved.settings.get("constant") is not None else "init_val"
        self._note("An OptimizableConstant is a number here, and no longer optimised.")
        return building.number(saved.number(key))

    def _sum(self, saved: Saved, depth: int) -> Node:
        saved.only("terms")
        return building.add(*(self._node(term, depth) for term in saved.operands("terms")))

    def _product(self, saved: Saved, depth: int) -> Node:
        saved.only("factors")
        return reduce(building.multiply, [self._node(f, depth) for f in saved.operands("factors")])

    def _itself(self, saved: Saved, depth: int) -> Node:
        # AddNorm keeps whatever else it was given and does nothing with it.
        return self._inner(saved, "formula", depth)

    # -- token by token -----------------------------------------------------------------------------------

    def _join(self, saved: Saved, depth: int) -> Node:
        saved.only("formula1", "formula2", "wait_until_finished", "include_norm")
        kind = Union if saved.kind in ("Max", "Union") else Intersection
        first, second = (self._inner(saved, key, depth) for key in ("formula1", "formula2"))
        if not saved.flag("include_norm", True) and (_weight(first), _weight(second)) != (1.0, 1.0):
            raise saved.refusal(
                f"{saved.kind} without include_norm weighs 1 whatever its operands weigh; it is only "
                "translated where both of them weigh 1"
            )
        if kind is Intersection and _weight(first) != _weight(second):
            first, second = second, first  # on a tie the reference's Min has the weight of the second operand
        return building.join(kind, [first, second])

    def _indicator(self, saved: Saved, depth: int) -> Node:
        saved.only("formula")
        return building.gate(self._inner(saved, "formula", depth))

    def _kl_indicator(self, saved: Saved, depth: int) -> Node:
        saved.only("from_formula", "constraint_formula", "divergence", "include_max", "minimize", "top_k")
        return building.kl_indicator(
            self._inner(saved, "from_formula", depth),
            self._inner(saved, "constraint_formula", depth),
            saved.number("divergence", 0.0),
            0 if saved.settings.get("top_k") is None else saved.whole("top_k", 0, 1),
            saved.flag("include_max", True),
            saved.flag("minimize", True),
        )

    # -- distributions ------------------------------------------------------------------------------------

    def _normalize(self, saved: Saved, depth: int) -> Node:
        saved.only("formula")
        return building.normalized(self._inner(saved, "formula", depth))

    def _uniform(self, saved: Saved, depth: int) -> Node:
        saved.only("model_name")
        return Uniform()

    def _top_p_top_k(self, saved: Saved, depth: int) -> Node:
        saved.only("formula", "top_p", "top_k", "temperature")
        node = self._inner(saved, "formula", depth)
        top_k, top_p = saved.whole("top_k", 0, 0), min(1.0, saved.number("top_p", 1.0))
        temperature = saved.number("temperature", 1.0)
        weight = 1.0
        if temperature != 1.0:
            found = _weight(node)
            if temperature <= 0 or found is None:
                raise saved.refusal(
                    "a temperature must be positive, and its formula must have one weight for all tokens",
                    "temperature",
                )
            # softmax(log P / T), with the weights of uniform completing 1/T to 1.
            tempered = building.scale(1 / temperature, building.normalized(node))
            node = building.normalized(building.add(tempered, building.scale(1 - 1 / temperature, Uniform())))
            weight = found
        if top_k:
            node = building.filtered("topk", node, top_k)
        if top_p != 1.0 or not (top_k or temperature != 1.0):
            node = building.filtered("topp", node, top_p)
        return building.scale(weight, node)

    def _self_debias(self, saved: Saved, depth: int) -> Node:
        saved.only("from_formula", "bias_formula", "lambda_")
        operand, biased = (self._inner(saved, key, depth) for key in ("from_formula", "bias_formula"))
        if not (_is_distribution(operand) and _is_distribution(biased)):
            raise saved.refusal(
                "SelfDebias reads its operands without normalising them; it is only translated where both "
                "are models, or are normalised by a class of their own"
            )
        return building.self_debias(operand, biased, saved.number("lambda_", 50.0))

    def _superseded(self, saved: Saved, depth: int) -> Node:
        saved.only("from_formula", "by_formula")
        by, small = self._inner(saved, "by_formula", depth), saved.operand("from_formula")
        drafts_alone = isinstance(small, Saved) and small.kind == "Autocomplete"
        from_ = self._leaf(NGRAMS) if drafts_alone else self._node(small, depth)
        weight = 1.0 if drafts_alone else _weight(from_)
        if saved is not self._whole and (weight is None or weight != _weight(by)):
            raise saved.refusal(
                "the operands of Superseded differ in weight; the reference gives the value of one the "
                "weight of the other, which is only translated for a whole formula, where no weight is left"
            )
        if drafts_alone:
            self._note(
                "An Autocomplete drafts from a corpus; here what followed the same tokens in prompt and "
                "answer does, on a server that speculates."
            )
        return building.superseded(from_, by)

    # -- models -------------------------------------------------------------------------------------------

    def _prompted(self, saved: Saved, depth: int) -> Node:
        source = language_model(saved)
        twins = [other for other in self.sources.values() if _one_to_the_reference(source, other)]
        if twins:
            self._note(
                "The reference tells models by system prompt and model name alone, and so runs terms with "
                "different templates as one; here they are different terms."
            )
        return self._leaf(source)

    def _classifier(self, saved: Saved, depth: int) -> Node:
        own = ("formula", "n_runs_per_sample", "minimize", "use_bayes", "index")
        saved.only(*PROMPT, *RUNNING, *own)
        self._candidates.append(self._inner(saved, "formula", depth))
        return self._leaf(classifier(saved))

    def _strength(self, saved: Saved, depth: int) -> Node:
        saved.only(*PROMPT, *RUNNING, "only_input", "default_output")
        if saved.flag("only_input", False):
            raise saved.refusal("a strength by the input alone has no counterpart", "only_input")
        leaf = self._leaf(classifier(saved))
        return building.dialled(building.strength(leaf))

    def _leaf(self, source: Source) -> Leaf:
        name = self._named.setdefault(source, f"t{len(self._named)}")
        self.sources[name] = source
        return source.term.leaf(name)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


_CLASSES: Final[dict[str, Callable[[Translation, Saved, int], Node]]] = {
    "AddNorm": Translation._itself,
    "Classifier": Translation._classifier,
    "ClassifierStrength": Translation._strength,
    "Constant": Translation._constant,
    "Indicator": Translation._indicator,
    "Intersection": Translation._join,
    "KL_indicator": Translation._kl_indicator,
    "Max": Translation._join,
    "Min": Translation._join,
    "Normalize": Translation._normalize,
    "OptimizableConstant": Translation._optimizable,
    "Product": Translation._product,
    "PromptedLLM": Translation._prompted,
    "SelfDebias": Translation._self_debias,
    "Sum": Translation._sum,
    "Superseded": Translation._superseded,
    "TopPTopK": Translation._top_p_top_k,
    "Uniform": Translation._uniform,
    "Union": Translation._join,
}


def _weight(node: Node) -> float | None:
    """N, None where it is not one for all tokens."""
    lo, hi = weight_bounds(simplify(node), "sum")
    return lo if lo == hi else None


def _is_distribution(node: Node) -> bool:
    """Whether E is a log-distribution as it stands."""
    match node:
        case Leaf(_, "" | "plain") | Normalized() | SelfDebias() | Mixture() | Uniform():
            return True
        case Filtered(_, operand, _):
            return _weight(operand) == 1.0
        case Superseded(_, large):
            return _is_distribution(large)
        case _:
            return False


def _one_to_the_reference(a: Source, b: Source) -> bool:
    same = (a.system, a.model) == (b.system, b.model) and not b.is_classifier
    return same and a.term.prompt != b.term.prompt

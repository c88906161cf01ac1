"""`Term` and `Formula`: what a Python user writes, and what every other part of the project receives.

child, adult = Term("You are a child."), Term("You are an adult.")
formula = child - 0.6 * adult
formula.sampling_params(max_tokens=64)      # for vllm.LLM.generate
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from vllm_marith.language.building import add, divide, multiply, number, scale
from vllm_marith.language.checks import check_free_drafters, check_weights
from vllm_marith.language.constraints import Constraints
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.limits import MAX_NESTING, Limits
from vllm_marith.language.names import FREE_DRAFTERS, Normalize, check_normalize
from vllm_marith.language.naming import as_number, unify
from vllm_marith.language.nodes import Node, leaf_names, nesting, rename
from vllm_marith.language.speculative import Speculative, check_speculative
from vllm_marith.language.term import TermFields
from vllm_marith.language.text import to_text

if TYPE_CHECKING:
    from vllm import SamplingParams

# The key of a request's formula in vLLM's `vllm_xargs` and `SamplingParams.extra_args`.
REQUEST_KEY: Final = "marith"


class _Arithmetic:
    """Operators shared by terms and formulas; every one returns a Formula."""

    __slots__ = ()
    # Makes numpy scalars leave `numpy.float64(0.5) * term` to us instead of looking for a sequence.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> Formula:
        return combine(lambda a, b: add(a, b), self, other)

    def __radd__(self, other: Any) -> Formula:
        return combine(lambda a, b: add(a, b), other, self)

    def __sub__(self, other: Any) -> Formula:
        return combine(lambda a, b: add(a, scale(-1.0, b)), self, other)

    def __rsub__(self, other: Any) -> Formula:
        return combine(lambda a, b: add(a, scale(-1.0, b)), other, self)

    def __mul__(self, other: Any) -> Formula:
        return combine(multiply, self, other)

    def __rmul__(self, other: Any) -> Formula:
        return combine(multiply, other, self)

    def __truediv__(self, other: Any) -> Formula:
        if isinstance(other, Term | Formula):
            raise FormulaError("a formula can only be divided by a number")
        divisor = as_number(other)
        return NotImplemented if divisor is None else combine(lambda a: divide(a, divisor), self)

    def __rtruediv__(self, other: Any) -> Formula:
        raise FormulaError("a formula can only be divided by a number, not be a divisor")

    def __neg__(self) -> Formula:
        return combine(lambda a: scale(-1.0, a), self)

    def __pos__(self) -> Formula:
        return combine(lambda a: a, self)


@dataclass(frozen=True)
class Term(_Arithmetic, TermFields):
    __doc__ = TermFields.__doc__

    def __str__(self) -> str:
        return str(Formula.of(self))


class Formula(_Arithmetic):
    """An immutable formula over terms; P(x) = softmax(E(x) / N(x)), or softmax(E(x)) with normalize "none".

    Made by operators on terms, by `Formula.parse`, or by `vllm_marith.language.request.parse_request`.
    Equality is that of trees, terms and normalisation, not of the distributions they give.

    Attributes:
        root: the tree.
        terms: name -> Term of every term in the tree, in order of first appearance.
        normalize: "sum" or "none".
    """

    __slots__ = ("normalize", "root", "terms")

    root: Node
    terms: Mapping[str, Term]
    normalize: Normalize

    def __init__(self, root: Node, terms: Mapping[str, Term], normalize: str = "sum") -> None:
        if nesting(root) > MAX_NESTING:
            raise FormulaError(f"the formula is nested more than {MAX_NESTING} deep")
        names = list(dict.fromkeys(leaf_names(root)))
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "terms", MappingProxyType({name: _labelled(name, terms) for name in names}))
        object.__setattr__(self, "normalize", check_normalize(normalize))

    @classmethod
    def of(cls, term: Term) -> Formula:
        """The formula that is this one term."""
        return combine(lambda a: a, term)

    @classmethod
    def parse(
        cls,
        text: str,
        terms: Mapping[str, Term | Mapping[str, Any]] | None = None,
        normalize: str = "sum",
        *,
        limits: Limits | None = None,
    ) -> Formula:
        """Read a formula, e.g. `child - 0.6*adult + 2*union(child, magic)`.

        Args:
            text: numbers, names, + - * / ( ) and the functions of docs/semantics.md.
            terms: name -> Term, or the JSON form of one ({"system": ...}); a name without an entry is a plain
                term, i.e. the request as it is.
            limits: bounds on the text; by default only what keeps reading it safe.

        Raises:
            FormulaError: with the place in the text.
        """
        from vllm_marith.language.parser import parse_formula

        return parse_formula(text, terms or {}, normalize, limits)

    @property
    def leader(self) -> str:
        """Name of the first language model in the formula: its prompt is what the client sees.

        Not a classifier, and not what only drafts (`superseded(small, large)`: large comes first).
        """
        for name, term in self.terms.items():
            if term.classifier is None:
                return name
        raise FormulaError("a formula needs at least one term that is a language model")

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """`Term.needs` of the terms that have any: what a server must check that it can provide."""
        return {name: term.needs for name, term in self.terms.items() if term.needs}

    def with_normalize(self, normalize: str) -> Formula:
        """The same formula under another normalisation; contrastive formulas need "none"."""
        return Formula(self.root, self.terms, normalize)

    def check(self) -> Formula:
        """Itself, if it defines a distribution for every input.

        Operators do not check, because `a - b` may be on its way into a larger formula; everything that
        reads or uses a formula does.

        Raises:
            FormulaError: no language model, a total weight N that is not positive under normalize "sum",
                weights beyond any use, a filter under a negative weight, or an n-gram and the
                like where it cannot draft.
        """
        if not self.terms:
            raise FormulaError("a formula needs at least one term")
        _ = self.leader
        free = {name: term.model for name, term in self.terms.items() if term.model in FREE_DRAFTERS}
        check_free_drafters(self.root, free)
        check_weights(self.root, self.normalize)
        return self

    def evaluate(
        self,
        logits: Mapping[str, Any],
        dtype: Any = None,
        *,
        position: int = 0,
        probabilities: Mapping[str, float] | None = None,
    ) -> Any:
        """Log-probabilities of the formula, the definition that every backend is tested against.

        Args:
            logits: term name -> torch tensor or numpy array [..., vocab], all of one shape.  Of a classifier
                in Bayes form: its energies.
            dtype: of the result; float64 by default.  The computation is in float64 whatever it is.
            position: number of tokens generated so far, for `schedule`.
            probabilities: classifier's name -> p(y | text so far), for `strength`.

        Returns:
            [..., vocab], a tensor or array as the inputs are.  A row without any allowed token is all -inf.

        Raises:
            FormulaError: a term without logits, shapes that differ, NaN or +inf.
        """
        from vllm_marith.language.definition import evaluate

        return evaluate(self, logits, dtype, position, probabilities)

    def explain(self) -> str:
        """The plan of the formula as text: weights, terms, program."""
        from vllm_marith.plan.explain import explain

        return explain(self)

    def to_json(
        self,
        constraints: Constraints | Mapping[str, Any] | None = None,
        speculative: Speculative | None = None,
    ) -> str:
        """The formula as a server reads it: the value of `vllm_xargs["marith"]`.

        Every term is written out, plain ones as {}, so that no preset of the server can take its place.

        Args:
            constraints: what the answer must not contain.
            speculative: "auto", "off" or the number of tokens to draft; by default what the server does.
        """
        terms = {name: term.to_dict() for name, term in self.terms.items()}
        told: dict[str, Any] = {"formula": str(self), "terms": terms, "normalize": self.normalize}
        if constraints is not None:
            told["constraints"] = Constraints.from_json(constraints).to_dict()
        if speculative is not None:
            told["speculative"] = check_speculative(speculative)
        return json.dumps(told, ensure_ascii=False)

    def sampling_params(
        self,
        *,
        constraints: Constraints | Mapping[str, Any] | None = None,
        speculative: Speculative | None = None,
        **vllm_kwargs: Any,
    ) -> SamplingParams:
        """`vllm.SamplingParams(**vllm_kwargs)` that carry this formula, for `vllm.LLM.generate`.

        Args:
            constraints: what the answer must not contain.
            speculative: "auto", "off" or the number of tokens to draft; by default what the engine does.

        Raises:
            FormulaError: the formula defines no distribution, an option is wrong, or `extra_args` carry a
                formula already.
            ImportError: vLLM is not installed.
        """
        self.check()
        extra_args = dict(vllm_kwargs.pop("extra_args", None) or {})
        if REQUEST_KEY in extra_args:
            raise FormulaError(f"extra_args already carry a formula under '{REQUEST_KEY}'")
        try:
            vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ImportError(
                "sampling_params() makes vllm.SamplingParams, and vLLM cannot be imported here; install it "
                "with `pip install 'vllm-marith[cpu]'` or `pip install 'vllm-marith[cuda]'`"
            ) from error
        extra_args[REQUEST_KEY] = self.to_json(constraints, speculative)
        params: SamplingParams = vllm.SamplingParams(extra_args=extra_args, **vllm_kwargs)
        return params

    def __str__(self) -> str:
        return to_text(self.root)

    def __repr__(self) -> str:
        told = ", ".join(f"{name!r}: {term.to_dict()!r}" for name, term in self.terms.items())
        normalize = "" if self.normalize == "sum" else f", normalize={self.normalize!r}"
        return f"Formula.parse({str(self)!r}, {{{told}}}{normalize})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Formula):
            return NotImplemented
        return (self.root, self.terms, self.normalize) == (other.root, other.terms, other.normalize)

    def __hash__(self) -> int:
        return hash((self.root, tuple(self.terms.items()), self.normalize))

    def __reduce__(self) -> tuple[Any, ...]:
        return Formula, (self.root, dict(self.terms), self.normalize)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Formula is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Formula is immutable; cannot delete {name!r}")


Operand = Term | Formula | float


def _labelled(name: str, terms: Mapping[str, Term]) -> Term:
    """The term called `name`; anonymous ones stay so: a larger formula may have to number them anew."""
    if name not in terms:
        raise FormulaError(f"the term '{name}' is not defined")
    term = terms[name]
    return term if term.name in (None, name) else replace(term, name=name)


def combine(build: Callable[..., Node], *operands: Any) -> Formula:
    """`build` applied to the operands' trees, after their terms have been given one set of names."""
    formulas: list[tuple[Node, Mapping[str, Term]]] = []
    normalizations = set()
    for operand in operands:
        if isinstance(operand, Term):
            name = operand.name or "anonymous"
            formulas.append((operand.leaf(name), {name: operand}))
        elif isinstance(operand, Formula):
            formulas.append((operand.root, operand.terms))
            if operand.terms:  # a schedule, say, fits into any formula
                normalizations.add(operand.normalize)
        elif (value := as_number(operand)) is not None:
            formulas.append((number(value), {}))
        else:
            return NotImplemented
    if len(normalizations) > 1:
        raise FormulaError(
            "formulas with normalize 'sum' and 'none' cannot be combined; build the whole formula first, "
            "then set it with .with_normalize(...)"
        )
    terms, names = unify([terms for _, terms in formulas])
    root = build(*(rename(node, own) for (node, _), own in zip(formulas, names, strict=True)))
    return Formula(root, terms, normalizations.pop() if normalizations else "sum")

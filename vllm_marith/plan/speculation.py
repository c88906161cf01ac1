"""Which terms of a formula may draft, and what they make of it: partial formulas and their levels.

Speculative sampling with partial formulas (arXiv 2311.14479, section 4) by *draft, then verify*.  Let A_0 be
the terms that run for every token, P_0 the formula over them alone (`partial`), and P the formula.  A round:

    for n = 1 .. K:  x_n ~ P_0(. | x_1 .. x_{n-1})                               only the terms of A_0 run
    all terms run once, at K + 1 positions
    for n = 1 .. K:  keep x_n with probability min(1, P(x_n) / P_0(x_n)), both given x_1 .. x_{n-1};
                     at the first that is not kept: x_n ~ max(0, P - P_0) / sum max(0, P - P_0), and stop
    if all were kept:  x_{K+1} ~ P(. | x_1 .. x_K)

What remains is a sample of P (Lemma 1), whatever P_0 is: the rules of `partial` decide about speed and about
nothing else.  Temperature, top-k and top-p act on P and P_0 alike, before the test.

Factors nest.  With the factors 1 < k < m, the terms with factors up to k have a formula P_1 of their own.
The same round, with K = k - 1, makes samples of P_1 from drafts of P_0; m - 1 such tokens are then the drafts
that the whole formula tests.  Where at most k - 1 of these are lacking, they are left to P_0: all terms run
next as it is.  So each draft is a sample of P_1 or P_0, and tested against the one it is.  Each P_i is a
*level*.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass
from typing import Final

from vllm_marith.language.algebra import simplify
from vllm_marith.language.building import add, dialled, gate, is_factor, join, mixture, scale
from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula
from vllm_marith.language.names import NGRAM, SUFFIX, FreeDrafter
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
    SelfDebias,
    Strength,
    Sum,
    Superseded,
    Union,
    children,
    leaf_names,
    walk,
)
from vllm_marith.language.text import to_text

DEFAULT_LENGTH: Final = 4
"""Tokens drafted at a time where neither factors nor anybody else say how many."""

_MISSING: Final = Number(0.0)


def partial(node: Node, available: Set[str]) -> Node:
    """The formula over the terms that have run: what is missing counts as E = N = 0, i.e. as the number 0.

    Sums, factors and dials take what is left of their operands, `normalize`, `topk` and `topp` likewise.
    A union, an intersection or an indicator compares terms, and is missing when one of the compared is.
    `superseded(small, large)` is large once all of it is there, and small before.  Classifiers read what a
    formula proposes and are always missing.  Three operators have something better to propose than nothing:

    - `mixture`: the average of those operands that are there.  With the share s of the weights there, it
      accepts s of the tokens at least;
    - `self_debias(a, b, s)` without b: the distribution of a;
    - `plausible(a, q, alpha)` without q: a, unmasked.

    Args:
        node: canonical (`building`); need not be simple.
        available: names of the terms that have run.
    """

    def left(inner: Node) -> Node:
        return partial(inner, available)

    match node:
        case Leaf(name, classifier):
            return node if name in available and not classifier else _MISSING
        case Scale(factor, operand):
            return scale(factor, left(operand))
        case Dialled(dial, operand):
            return _MISSING if isinstance(dial, Strength) else dialled(dial, left(operand))
        case Sum(operands):
            return add(*map(left, operands))
        case Union(operands) | Intersection(operands):
            return join(type(node), [*map(left, operands)]) if _whole(node, available) else _MISSING
        case Gate(condition, operand):
            return gate(left(condition), left(operand)) if _whole(condition, available) else _MISSING
        case KLIndicator(p, q, divergence, top_k, include_max, minimize):
            return KLIndicator(left(p), left(q), divergence, top_k, include_max, minimize)
        case Superseded(small, large):
            return left(small if _whole(small, available) and not _whole(large, available) else large)
        case Normalized(operand):
            return _distribution(left(operand), Normalized)
        case Filtered(kind, operand, parameter):
            return _distribution(left(operand), lambda found: Filtered(kind, found, parameter))
        case Mixture(weights, operands):
            pairs = [(weight, left(operand)) for weight, operand in zip(weights, operands, strict=True)]
            there = [(weight, operand) for weight, operand in pairs if not is_factor(operand)]
            return mixture(there) if there else _MISSING
        case SelfDebias(operand, biased, strength):
            if _whole(biased, available):
                return _distribution(left(operand), lambda found: SelfDebias(found, left(biased), strength))
            return _distribution(left(operand), Normalized)
        case Plausible(operand, judge, alpha):
            found = left(operand)
            masked = _whole(judge, available) and not is_factor(found)
            return Plausible(found, left(judge), alpha) if masked else found
        case _:
            return node


def _whole(node: Node, available: Set[str]) -> bool:
    """Whether nothing in the node is missing."""
    match node:
        case Leaf(name, classifier):
            return name in available and not classifier
        case Superseded(small, large):
            return _whole(large, available) or _whole(small, available)
        case Dialled(Strength(), _):
            return False
        case _:
            return all(_whole(child, available) for child in children(node))


def _distribution(operand: Node, build: Callable[[Node], Node]) -> Node:
    """`build` of an operand that is read as a distribution; numbers and their like are none."""
    return _MISSING if is_factor(operand) else build(operand)


@dataclass(frozen=True)
class Level:
    """A partial formula that drafts.

    Attributes:
        terms: names of the language models that it needs, leader of the partial formula first.
        formula: over these terms, checked.
        factor: the largest speculative factor among the terms that may be in it.
    """

    terms: tuple[str, ...]
    formula: Formula
    factor: int


@dataclass(frozen=True)
class Speculation:
    """How a formula is drafted.

    Attributes:
        levels: from the cheapest on; the whole formula is none.
        lengths: how many tokens each level drafts before the next one, or the whole formula, tests them;
            ascending.
        drafters: names of terms that only draft, i.e. that the formula without speculation does not run.
        free: what copies tokens from earlier text, for which no term has to run.  It comes before all levels,
            of which there may be none, and has the first of the lengths, one more than there are levels.
            Where both are asked for it is "suffix", which reads all that "ngram" reads.
    """

    levels: tuple[Level, ...]
    lengths: tuple[int, ...]
    drafters: tuple[str, ...] = ()
    free: FreeDrafter | None = None

    @property
    def longest(self) -> int:
        """K: the most tokens that one run of the whole formula tests."""
        return self.lengths[-1]


def speculate(formula: Formula, length: int | None = None, limit: int | None = None) -> Speculation | str:
    """How a formula is drafted, or a sentence that says why it cannot be.

    The terms with the speculative factor 1 draft, and those that a `superseded` has as its `small`.  What
    supersedes them lags, by its own factor or, where that is 1, by the largest of the formula.

    Args:
        formula: one that defines a distribution.
        length: K, at least 1; by default the largest factor - 1, or `DEFAULT_LENGTH` where there is none.
        limit: the largest K; also the default where there is no factor.
    """
    root = formula.root
    live = set(leaf_names(simplify(root)))
    classifiers = [name for name, term in formula.terms.items() if term.classifier and name in live]
    if classifiers:
        return (
            f"the classifier '{classifiers[0]}' reads every token before the next one is drawn, so that "
            "nothing can be drafted"
        )
    small, superseding = _superseded(root)
    asked = {name: formula.terms[name].speculative_factor for name in live | small}
    lagging = {name for name in live if name in superseding or (asked[name] > 1 and name not in small)}
    if not lagging:
        return (
            "no term has a 'speculative_factor' above 1 and the formula has no superseded(small, large), so "
            "that no term drafts for another"
        )
    largest = max(asked[name] for name in lagging)
    if length is None:
        length = largest - 1 if largest > 1 else limit or DEFAULT_LENGTH
        length = min(length, limit) if limit else length
    # What lags without a factor of its own runs with the whole formula, not in a level before it.
    whole = max(largest, 2)
    later = lagging | small & superseding
    factors = {name: 1 if name not in later else own if own > 1 else whole for name, own in asked.items()}
    models = {formula.terms[name].model for name in small}
    free: FreeDrafter | None = SUFFIX if SUFFIX in models else NGRAM if NGRAM in models else None

    levels, lengths = list[Level](), list[int]()
    for factor in sorted({1, *factors.values()} - {whole}):
        if factor == 1 and free:
            continue
        found = _level(formula, {name for name, own in factors.items() if own <= factor}, factor)
        if factor == 1 and isinstance(found, str):
            return found
        if isinstance(found, str) or (levels and found.formula == levels[-1].formula):
            continue
        if factor > 1 and factor - 1 >= length:
            break  # the whole formula tests as often
        if factor > 1:
            lengths.append(factor - 1)
        levels.append(found)
    lengths.append(length)
    needed = {name for level in levels for name in level.terms}
    drafters = tuple(name for name in formula.terms if name in needed and name not in live)
    return Speculation(tuple(levels), tuple(lengths), drafters, free)


def _superseded(root: Node) -> tuple[set[str], set[str]]:
    """Names of the terms that some `superseded` has as small, and as large."""
    pairs = [node for node in walk(root) if isinstance(node, Superseded)]
    return (
        {name for pair in pairs for name in leaf_names(pair.small)},
        {name for pair in pairs for name in leaf_names(pair.large)},
    )


def _level(formula: Formula, available: Set[str], factor: int) -> Level | str:
    """The partial formula over `available`, or why it is none."""
    root = partial(formula.root, available)
    terms = tuple(dict.fromkeys(leaf_names(simplify(root))))
    lacking = list(_lacking(formula.root, available))
    why = f"; {'; '.join(lacking)}" if lacking else ""
    if not terms:
        return (
            f"what runs for every token makes no distribution: without the lagging terms nothing is left{why}"
        )
    found = Formula(root, formula.terms, formula.normalize)
    try:
        return Level(terms, found.check(), factor)
    except FormulaError as error:
        return f"what runs for every token, {to_text(root)}, makes no distribution: {error.message}{why}"


def _lacking(node: Node, available: Set[str]) -> Iterator[str]:
    """A sentence for each comparison that is missing as a whole."""
    compared = node.condition if isinstance(node, Gate) else node
    if isinstance(compared, Union | Intersection | KLIndicator) or compared is not node:
        missing = [name for name in dict.fromkeys(leaf_names(compared)) if name not in available]
        if missing and not _whole(compared, available):
            yield f"{to_text(node)} needs {_listed(missing)} as well"
            return
    for child in children(node):
        yield from _lacking(child, available)


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def cost_of_a_token(
    acceptance: float, draft_cost: float, check_cost: Callable[[int], float], length: int
) -> float:
    """What a token costs on average in rounds of `length` drafted tokens.

    A round of K drafted tokens, each of which is kept with probability a if all before it were, costs
    K F + C(K) and gives 1 + a + ... + a^K = (1 - a^(K+1)) / (1 - a) tokens on average.  So a token costs

        (K F + C(K)) (1 - a) / (1 - a^(K+1))

    With the factor k = K + 1 and a check that costs C whatever its length, this is the paper's
    (1 - a) ((k - 1) F + C) / (1 - a^k).

    Args:
        acceptance: a, in [0, 1].
        draft_cost: F, of drafting one token.
        check_cost: C, of one step of all terms that tests so many drafted tokens; C(0) is a plain step.
        length: K.
    """
    tokens = sum(acceptance**n for n in range(length + 1))
    return (length * draft_cost + check_cost(length)) / tokens


def best_length(
    acceptance: float, draft_cost: float, check_cost: Callable[[int], float], longest: int
) -> int:
    """The K in 0 .. longest at which a token costs least (`cost_of_a_token`); the smallest of several."""
    return min(
        range(longest + 1),
        key=lambda length: cost_of_a_token(acceptance, draft_cost, check_cost, length),
    )

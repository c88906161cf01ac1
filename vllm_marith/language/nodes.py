"""The tree of a formula: immutable nodes.

A node has two values per token x (paper, Theorem 1): an energy E(x) and a weight N(x).

    Leaf(name)              E = log Q_name(x)                        N = 1
      a classifier, Bayes   E = log p(y | text + x) - log p(y | text)  N = 0
    Uniform()               E = -log V                               N = 1
    Number(c)               E = c                                    N = c
    Sum(a, b, ...)          E = E_a + E_b + ...                      N = N_a + N_b + ...
    Scale(c, a)             E = c E_a                                N = c N_a
    Dialled(d, a)           the same with a factor d that is only known at each step
    Union(a, b, ...)        E = max(E_a, E_b, ...)                   N of the winner, the first one on a tie
    Intersection(...)       E = min(E_a, E_b, ...)                   N of the winner, the first one on a tie
    Gate(c, a)              E = E_a where E_c >= 0, else 0           N = N_a where E_c >= 0, else 0
    Plausible(a, q, alpha)  E = E_a, -inf where Q_q < alpha max Q_q  N = N_a
    Superseded(s, a)        E = E_a                                  N = N_a;  s only drafts

The others read their operands as distributions, log P_a = log_softmax(E_a / N_a), or log_softmax(E_a) in a
formula with normalize "none":

    Normalized(a)           E = log P_a                              N = 1
    Filtered(a)             E = N_a log(P_a kept and renormalised)   N = N_a  (1 under normalize "none")
    SelfDebias(a, b, s)     E = log softmax(log P_a + s min(P_a - P_b, 0))    N = 1
    Mixture(w a, v b, ...)  E = log((w P_a + v P_b + ...) / (w + v + ...))    N = 1
    KLIndicator(p, q)       E = 0 where the indicator is one, else -1         N = 0; only a Gate's condition

Build trees with `building` and not with the classes: its functions fold numbers and flatten sums, so that
Python's operators and the parser arrive at one tree for one formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Number:
    """A number standing as an operand.  Finite; never -0.0."""

    value: float


@dataclass(frozen=True, slots=True)
class Leaf:
    """A term, by its name in the formula; `classifier` is its form, "" for a language model."""

    name: str
    classifier: Literal["", "bayes", "plain"] = ""


@dataclass(frozen=True, slots=True)
class Uniform:
    """The uniform distribution over the vocabulary."""


@dataclass(frozen=True, slots=True)
class Scale:
    """`factor` times `operand`, which is neither a Number nor a Scale.

    The factor is never 1.  It may be 0: `0*base + child` has no energy from `base`, yet `base` is its leader.
    """

    factor: float
    operand: Node


@dataclass(frozen=True, slots=True)
class Sum:
    """Two or more operands, none of them a Sum, at most one of them a Number, and that one not 0."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Union:
    """Token-wise maximum of two or more operands, not all of them Numbers."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Intersection:
    """Token-wise minimum of two or more operands, not all of them Numbers."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Gate:
    """`indicator(condition) * operand`; the operand is never a Scale, and a Number only if it is 1."""

    condition: Node
    operand: Node


@dataclass(frozen=True, slots=True)
class KLIndicator:
    """Tokens whose removal from p would bring p nearer to q in KL divergence (reference: `KL_indicator`).

    Attributes:
        divergence: by how much at least.
        top_k: among the so many best tokens; 0 for all.
        include_max: only tokens that q finds more likely than p.
        minimize: nearer; otherwise farther.
    """

    p: Node
    q: Node
    divergence: float = 0.0
    top_k: int = 0
    include_max: bool = True
    minimize: bool = True


@dataclass(frozen=True, slots=True)
class Normalized:
    """The operand as a distribution of its own."""

    operand: Node


@dataclass(frozen=True, slots=True)
class Filtered:
    """The operand's distribution without its tail, `topk(a, k)` or `topp(a, p)`.

    topk keeps every token as likely as the k-th; topp keeps the most likely tokens up to and including the
    one with which their mass reaches p.
    """

    kind: Literal["topk", "topp"]
    operand: Node
    parameter: float


@dataclass(frozen=True, slots=True)
class SelfDebias:
    """Self-debiasing: tokens that `biased` likes more than `operand` lose `strength` times the difference."""

    operand: Node
    biased: Node
    strength: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """Weighted average of probabilities; two or more operands, positive weights."""

    weights: tuple[float, ...]
    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Plausible:
    """`operand` on the tokens that `judge` gives at least `alpha` times the probability of its best one."""

    operand: Node
    judge: Node
    alpha: float


@dataclass(frozen=True, slots=True)
class Superseded:
    """The value of `large`, which `small` may draft in speculative sampling."""

    small: Node
    large: Node


@dataclass(frozen=True, slots=True)
class Schedule:
    """A factor by position: points (start, value) in ascending order, the first of them at 0.

    The value of the last point whose start is not beyond the number of tokens generated so far.
    """

    points: tuple[tuple[int, float], ...]

    def at(self, position: int) -> float:
        """The factor of the token after `position` generated ones."""
        return next(value for start, value in reversed(self.points) if start <= position)


@dataclass(frozen=True, slots=True)
class Strength:
    """A factor by a classifier: low + (high - low) p(y | text so far)."""

    classifier: Leaf
    low: float = 0.0
    high: float = 1.0

    def at(self, probability: float) -> float:
        """The factor for p(y | text so far)."""
        return self.low + (self.high - self.low) * probability


Dial = Schedule | Strength


@dataclass(frozen=True, slots=True)
class Dialled:
    """`dial * operand`; the operand is never a Scale, and a Number only if it is 1."""

    dial: Dial
    operand: Node


Node = (
    Number
    | Leaf
    | Uniform
    | Scale
    | Sum
    | Union
    | Intersection
    | Gate
    | KLIndicator
    | Normalized
    | Filtered
    | SelfDebias
    | Mixture
    | Plausible
    | Superseded
    | Dialled
)

ONE: Final = Number(1.0)


def children(node: Node) -> tuple[Node, ...]:
    """A node's operands, in the order in which their terms count: what drafts comes after what it drafts."""
    match node:
        case Scale(_, operand) | Normalized(operand) | Filtered(_, operand, _) | Dialled(_, operand):
            return (operand,)
        case Sum(operands) | Union(operands) | Intersection(operands) | Mixture(_, operands):
            return operands
        case Gate(first, second) | SelfDebias(first, second, _) | Plausible(first, second, _):
            return first, second
        case KLIndicator(p, q):
            return p, q
        case Superseded(small, large):
            return large, small
        case _:
            return ()


def mapped(node: Node, function: Callable[[Node], Node]) -> Node:
    """The node with `function` applied to its operands; not canonical where that changes their kind."""
    match node:
        case Scale(factor, operand):
            return Scale(factor, function(operand))
        case Dialled(dial, operand):
            return Dialled(dial, function(operand))
        case Normalized(operand):
            return Normalized(function(operand))
        case Filtered(kind, operand, parameter):
            return Filtered(kind, function(operand), parameter)
        case Sum(operands) | Union(operands) | Intersection(operands):
            return type(node)(tuple(map(function, operands)))
        case Mixture(weights, operands):
            return Mixture(weights, tuple(map(function, operands)))
        case Gate(condition, operand):
            return Gate(function(condition), function(operand))
        case SelfDebias(operand, biased, strength):
            return SelfDebias(function(operand), function(biased), strength)
        case Plausible(operand, judge, alpha):
            return Plausible(function(operand), function(judge), alpha)
        case KLIndicator(p, q, divergence, top_k, include_max, minimize):
            return KLIndicator(function(p), function(q), divergence, top_k, include_max, minimize)
        case Superseded(small, large):
            return Superseded(function(small), function(large))
        case _:
            return node


def leaf_names(node: Node) -> Iterator[str]:
    """Names of the terms, repeats included, in the order in which they count."""
    if isinstance(node, Leaf):
        yield node.name
    for child in children(node):
        yield from leaf_names(child)
    if isinstance(node, Dialled) and isinstance(node.dial, Strength):
        yield node.dial.classifier.name


def rename(node: Node, names: dict[str, str]) -> Node:
    """The same tree with every term's name looked up in `names`."""
    if isinstance(node, Leaf):
        return Leaf(names[node.name], node.classifier)
    if isinstance(node, Dialled) and isinstance(node.dial, Strength):
        dial = node.dial
        classifier = Leaf(names[dial.classifier.name], dial.classifier.classifier)
        return Dialled(Strength(classifier, dial.low, dial.high), rename(node.operand, names))
    return mapped(node, lambda child: rename(child, names))


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it."""
    yield node
    for child in children(node):
        yield from walk(child)


def size(node: Node) -> int:
    """Terms, numbers and operators; a factor belongs to what it scales and does not count."""
    own = 0 if isinstance(node, Scale) else 1
    if isinstance(node, Dialled):
        own = len(node.dial.points) if isinstance(node.dial, Schedule) else 1
    return own + sum(size(child) for child in children(node))


def nesting(node: Node) -> int:
    """Nested parentheses and calls in the node's text."""
    match node:
        case Scale(_, operand):
            return nesting(operand) + isinstance(operand, Sum)
        case Dialled(_, operand):
            return max(1, nesting(operand) + isinstance(operand, Sum))
        case Gate(KLIndicator() as condition, operand):
            return max(nesting(condition), nesting(operand) + isinstance(operand, Sum))
        case Gate(condition, operand):
            return max(nesting(condition) + 1, nesting(operand) + isinstance(operand, Sum))
        case Sum(operands):
            return max(map(nesting, operands))
        case Number() | Leaf() | Uniform():
            return 0
        case _:
            return 1 + max(map(nesting, children(node)))

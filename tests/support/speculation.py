"""Draft, then verify, in float64, over any number of levels: what `vllm_marith.plan.speculation` describes.

A *model* here is a distribution over the next token for every prefix of tokens, `model(prefix) -> [vocab]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vllm_marith import Formula
from vllm_marith.plan import Speculation

from .enumeration import Chooser

Prefix = tuple[int, ...]
Model = Callable[[Prefix], np.ndarray]


def verified(
    chooser: Chooser,
    prefix: Prefix,
    drafts: Sequence[tuple[int, np.ndarray]],
    model: Model,
    residual: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda p, q: np.maximum(p - q, 0),
) -> list[int]:
    """The tokens of one round: drafts as far as they were kept, and one more.

    Args:
        drafts: (token, the distribution q that it was drawn from).
        residual: what a rejected token is replaced from, up to its sum; other than by default it is wrong.
    """
    tokens: list[int] = []
    for token, q in drafts:
        p = model((*prefix, *tokens))
        keep = min(1.0, p[token] / q[token])
        if keep < 1 and chooser.choice([keep, 1 - keep]) == 1:
            left = residual(p, q)
            return [*tokens, chooser.choice(left / left.sum())]
        tokens.append(token)
    return [*tokens, chooser.choice(model((*prefix, *tokens)))]


def drafted(
    chooser: Chooser, prefix: Prefix, models: Sequence[Model], lengths: Sequence[int], count: int
) -> list[tuple[int, np.ndarray]]:
    """`count` tokens, each with the distribution that it was drawn from: the last of the models', for which
    those before it draft, or, of the last tokens, that of the model before it.

    lengths: of the drafts of all models but the last.
    """
    *smaller, model = models
    found: list[tuple[int, np.ndarray]] = []
    while (left := count - len(found)) > 0:
        here = (*prefix, *(token for token, _ in found))
        if not smaller:
            p = model(here)
            found.append((chooser.choice(p), p))
        elif left <= lengths[-1]:
            # Too few for a test of their own.
            found += drafted(chooser, here, smaller, lengths[:-1], left)
        else:
            # One token of its own comes on top of what it tests.
            drafts = drafted(chooser, here, smaller, lengths[:-1], lengths[-1])
            tokens = verified(chooser, here, drafts, model)
            found += [(token, model((*here, *tokens[:n]))) for n, token in enumerate(tokens)]
    return found


def generated(
    chooser: Chooser, models: Sequence[Model], lengths: Sequence[int], count: int, rule=verified
) -> Prefix:
    """`count` tokens of the last model, in rounds of `lengths[-1]` drafts of the others."""
    *smaller, model = models
    tokens: Prefix = ()
    while len(tokens) < count:
        drafts = drafted(chooser, tokens, smaller, lengths[:-1], lengths[-1])
        tokens = (*tokens, *rule(chooser, tokens, drafts, model))
    return tokens[:count]


def law(model: Model, vocab: int, count: int) -> dict[Prefix, float]:
    """Sequence of `count` tokens -> its probability, token by token."""
    found = {}
    for tokens in itertools.product(range(vocab), repeat=count):
        found[tokens] = float(np.prod([model(tokens[:n])[tokens[n]] for n in range(count)]))
    return found


def random_terms(names: Sequence[str], vocab: int, seed: int, spread: float = 1.5) -> Callable:
    """prefix -> {term: logits [vocab]}, different for every prefix; terms are like one another."""
    known: dict[Prefix, dict[str, np.ndarray]] = {}

    def logits(prefix: Prefix) -> dict[str, np.ndarray]:
        if prefix not in known:
            random = np.random.default_rng([seed, len(prefix), *prefix])
            shared = random.normal(size=vocab) * spread
            known[prefix] = {name: shared + random.normal(size=vocab) for name in names}
        return known[prefix]

    return logits


def sampled(log_p: np.ndarray, temperature: float = 1.0, top_k: int = 0) -> np.ndarray:
    """softmax(top_k(log_p / temperature)); temperature 0 is the likeliest token, the first of several."""
    if temperature == 0:
        return np.eye(len(log_p))[int(log_p.argmax())]
    energy = log_p / temperature
    if top_k:
        energy = np.where(energy >= np.sort(energy)[-top_k], energy, -np.inf)
    p = np.exp(energy - energy.max())
    return p / p.sum()


def model_of(
    formula: Formula,
    logits: Callable[[Prefix], Mapping[str, np.ndarray]],
    temperature: float = 1.0,
    top_k: int = 0,
) -> Model:
    """What a formula samples the next token from."""
    known: dict[Prefix, np.ndarray] = {}

    def model(prefix: Prefix) -> np.ndarray:
        if prefix not in known:
            values = {name: values for name, values in logits(prefix).items() if name in formula.terms}
            log_p = formula.evaluate(values, position=len(prefix))
            known[prefix] = sampled(log_p, temperature, top_k)
        return known[prefix]

    return model


def models_of(
    formula: Formula, speculation: Speculation, logits: Callable, temperature: float = 1.0, top_k: int = 0
) -> list[Model]:
    """Of the levels and, last, of the formula."""
    formulas = [*(level.formula for level in speculation.levels), formula]
    return [model_of(one, logits, temperature, top_k) for one in formulas]

"""Random formula requests and plain ones, and the prompts that each of their terms should have."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics

from vllm_marith import Formula

WORDS = sorted({w for text in topics.values() for w in text.split() if w.isalpha()})


@dataclass
class Job:
    """One request.

    formula: None for a plain request.
    text: what the client sends.
    prompts: name -> the text that the term's model should see.
    models: name -> the constituent that the term names; terms that name none are not in it.
    """

    text: str
    formula: Formula | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    models: dict[str, str] = field(default_factory=dict)

    def reference_formula(self) -> Formula:
        return self.formula or Formula.parse("base")

    def reference_prompts(self) -> dict[str, str]:
        return self.prompts or {"base": self.text}


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


# One of every operator; what a gate lets through is 0 at its edge, or small: rounding decides nothing.
OPERATORS = (
    "topk(2*a - b, 20) + 0.5*c",
    "a - 0.9*indicator(b - a)*(b - a)",
    "self_debias(a, b, 10) + 0.3*c",
    "normalize(a - 0.6*b) + c",
    "mixture(0.5: a, 0.3: b, 0.2: uniform)",
    "plausible(a - 0.5*b, a, 0.1)",
    "topp(a, 0.9) + schedule(0: 0.5, 5: 2, 9: 0)*union(b, c)",
    "superseded(b, a) + 0.2*kl_indicator(c, a, 0.0001)*(c - a)",
    "union(normalize(2*a - b), 0.5*c + 0.5*uniform)",
)
UNNORMALIZED = ("plausible(a - b, a, 0.1)", "a + b + schedule(0: 0, 3: 1)*c")


def operator_jobs(rng: random.Random) -> list[Job]:
    """A request for each of the formulas above, and plain ones between them."""
    jobs = []
    for formula, normalize in [*((f, "sum") for f in OPERATORS), *((f, "none") for f in UNNORMALIZED)]:
        text = words(rng, 2, 10)
        heads = {name: words(rng, 1, 12) for name in "bc"}
        terms = {name: {"system": head} for name, head in heads.items()}
        parsed = Formula.parse(formula, terms, normalize)
        prompts = {"a": text} | {name: f"{head}\n{text}" for name, head in heads.items()}
        used = {name: prompts[name] for name in parsed.terms}
        jobs.append(Job(text, parsed, used, rng.randint(0, 2)))
        if rng.random() < 0.3:
            jobs.append(Job(words(rng, 2, 10), priority=rng.randint(0, 2)))
    return jobs


def job(
    rng: random.Random, num_terms: int, shared: str = "", longest: int = 30, models: Sequence[str] = ()
) -> Job:
    """A request over `num_terms` terms of unequal prompts; 0 makes a plain request.

    Args:
        shared: a prefix that some of the prompts begin with, so that the prefix cache has work.
        models: constituents that terms may name, beside the base model.
    """
    text = words(rng, 2, longest // 2)
    if num_terms == 0:
        return Job(text, priority=rng.randint(0, 2))
    terms, prompts = {}, {}
    for i in range(num_terms):
        kind = rng.choice(["system", "prompt", "plain"]) if i else rng.choice(["system", "plain"])
        head = (shared + " " if shared and rng.random() < 0.5 else "") + words(rng, 1, longest)
        if kind == "system":
            terms[f"t{i}"] = {"system": head}
            prompts[f"t{i}"] = f"{head}\n{text}"
        elif kind == "prompt":
            terms[f"t{i}"] = {"prompt": head + " {input} so"}
            prompts[f"t{i}"] = f"{head} {text} so"
        else:
            terms[f"t{i}"] = {}
            prompts[f"t{i}"] = text
    named = {name: model for name in terms if models and (model := rng.choice(["", *models]))}
    for name, model in named.items():
        terms[name]["model"] = model
    formula = Formula.parse(_formula(rng, list(terms)), terms)
    return Job(text, formula, prompts, rng.randint(0, 2), named)


def _formula(rng: random.Random, names: list[str]) -> str:
    """A leader of weight 1 to 2 and small weights on the rest, so that N stays positive."""
    leader, *rest = names
    text = f"{rng.uniform(1.5, 2):.2f}*{leader}"
    while rest:
        weight = rng.uniform(-0.3, 0.9)
        sign, size = ("-" if weight < 0 else "+"), f"{abs(weight):.2f}"
        take = min(len(rest), rng.choice([1, 1, 2, 3]))
        if take == 1:
            text += f" {sign} {size}*{rest[0]}"
        else:
            inner = [f"{rng.uniform(0.5, 1):.2f}*{name}" for name in rest[:take]]
            kind = rng.choice(["union", "intersection"])
            text += f" {sign} {size}*{kind}({', '.join([*inner, leader])})"
        rest = rest[take:]
    return text

"""Formulas with classifiers, computed the plain way: Hugging Face in float32, text by text, no vLLM.

A `Steered` job says its formula twice: as the client writes it, and as arithmetic on log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support import exactness, judges, reference, tiny
from tests.support.exactness import Answer
from tests.support.workload import Job
from vllm_marith import Formula

Row = torch.Tensor
"""float64 ``[vocab]``."""


@dataclass(frozen=True)
class Readings:
    """What the classifier terms of a job say at one step.

    paths: classifier -> its folder.
    terms: the job's terms in request form.
    text: of the input.
    generated: token ids so far.
    """

    paths: dict[str, Path]
    terms: dict[str, dict[str, Any]]
    text: str
    generated: Sequence[int]

    def p(self, name: str, ids: Sequence[int] | None = None) -> float:
        """p(y | text so far), or behind other token ids than those generated."""
        term = self.terms[name]
        prefix = term.get("prompt", "{input}").replace("{input}", self.text)
        answer = tiny.tokenizer().decode(self.generated if ids is None else ids, skip_special_tokens=True)
        path = self.paths[term["classifier"]]
        labels = judges.labels(path)
        label = term.get("label", 1)
        index = labels.index(label) if isinstance(label, str) else label
        return judges.probability(path, prefix + answer, index, minimize=term.get("minimize", False))

    def c(self, name: str, inner: Row) -> Row:
        """The term's energies, with candidates from the formula `inner` without it."""
        term, log = self.terms[name], lambda p: torch.tensor(p, dtype=torch.float64).log()
        plain = term.get("form") == "plain"
        if len(self.generated) % term.get("every", 1):
            return torch.zeros_like(inner).log_softmax(0) if plain else torch.zeros_like(inner)
        before = log(self.p(name))
        row = torch.full_like(inner, float(before))
        for token in inner.topk(term.get("top_k", 50)).indices.tolist():
            row[token] = log(self.p(name, [*self.generated, token]))
        return row.log_softmax(0) if plain else row - before


Energies = Callable[[dict[str, Row], Readings], Row]
"""(language model -> log Q, the classifiers) -> E / N."""


@dataclass
class Steered:
    """A request with a formula over language models and classifiers.

    prompts: language model -> the text that it continues.
    """

    text: str
    formula: str
    terms: dict[str, dict[str, Any]]
    energies: Energies
    prompts: dict[str, str] = field(default_factory=dict)

    def job(self) -> Job:
        formula = Formula.parse(self.formula, self.terms)
        return Job(self.text, formula, self.prompts or {"base": self.text})

    def distributions(self, model: Path, paths: dict[str, Path], tokens: Sequence[int]) -> torch.Tensor:
        """float64 log-probabilities ``[tokens, vocab]`` on the way along `tokens`."""
        rows: list[Row] = []

        def follow(logits: dict[str, torch.Tensor], so_far: list[int]) -> int:
            q = {name: row.double().log_softmax(0) for name, row in logits.items()}
            readings = Readings(paths, self.terms, self.text, list(so_far))
            rows.append(self.energies(q, readings).log_softmax(0))
            return tokens[len(so_far)]

        reference.decode(str(model), exactness.ids_of(self.job()), len(tokens), follow)
        return torch.stack(rows)


def assert_follows(
    steered: Steered, answer: Answer, model: Path, paths: dict[str, Path], greedy: bool = True
) -> torch.Tensor:
    """The answer's log-probabilities are the formula's, and its tokens the likeliest where it is greedy."""
    rows = steered.distributions(model, paths, answer.tokens)
    for token, found, row in zip(answer.tokens, answer.logprobs, rows, strict=True):
        assert abs(found[token] - float(row[token])) < exactness.LOGPROB_TOLERANCE, steered.formula
        if greedy:
            assert token == int(row.argmax()), steered.formula
    return rows

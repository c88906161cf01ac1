"""The same work as formulas and as plain requests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEMS = (
    "You are a child.",
    "You are an adult, and you answer in long sentences.",
    "Always talk about magic and nothing else.",
    "You write code and say nothing.",
    "You are a lawyer who is paid by the word.",
    "Answer as a poet of the last century would.",
    "You have one minute to explain it to a friend.",
    "You speak of the sea, whatever you are asked.",
)


@dataclass(frozen=True)
class Work:
    """Requests that an engine serves.

    Attributes:
        texts, params: of each request.
        answers: how many of the answers that count there are: one a formula, whatever stands for it.
        tokens: of those answers, together.
    """

    texts: list[str]
    params: list[Any]
    answers: int
    tokens: int

    @property
    def requests_an_answer(self) -> int:
        return len(self.texts) // self.answers


def formula_text(terms: int) -> str:
    """A formula of so many terms: a weighted sum, and from three terms on a union, as in
    `t0 - 0.6*t1 + 2*union(t0, t2)`."""
    if terms < 3:
        return " - 0.6*".join(f"t{i}" for i in range(terms)) if terms == 2 else "t0"
    middle = "".join(f" {'-' if i % 2 else '+'} 0.{6 if i == 1 else 2}*t{i}" for i in range(1, terms - 1))
    return f"t0{middle} + 2*union(t0, t{terms - 1})"


class Maker:
    """Makes work of greedy answers whose lengths are given.

    Args:
        lengths: of the answers, in turns.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def formulas(self, number: int, terms: int) -> Work:
        from vllm_marith import Formula

        systems = {f"t{i}": {"system": SYSTEMS[i]} for i in range(terms)}
        formula = Formula.parse(formula_text(terms), systems)
        assert len(formula.terms) == terms
        made = {length: formula.sampling_params(**_greedy(length)) for length in set(self.lengths)}
        return self._work(range(number), [made[self._length(i)] for i in range(number)])

    def same_rows(self, number: int, terms: int) -> Work:
        """The requests that the members of as many groups would be on their own: the least that they cost."""
        from vllm import SamplingParams

        texts = [f"{system}\ngo on, {i}" for i in range(number) for system in SYSTEMS[:terms]]
        params = [SamplingParams(**_greedy(self._length(i))) for i in range(number) for _ in range(terms)]
        return Work(texts, params, number, sum(map(self._length, range(number))))

    def same_requests(self, number: int) -> Work:
        """As many requests that ask for no formula."""
        from vllm import SamplingParams

        return self._work(range(number), [SamplingParams(**_greedy(self._length(i))) for i in range(number)])

    def _work(self, numbers: range, params: list[Any]) -> Work:
        texts = [f"go on, {i}" for i in numbers]
        return Work(texts, params, len(numbers), sum(map(self._length, numbers)))

    def _length(self, i: int) -> int:
        return self.lengths[i % len(self.lengths)]


def _greedy(length: int) -> dict[str, Any]:
    return dict(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)


def different_lengths(number: int, shortest: int, longest: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(shortest, longest) for _ in range(number)]


def embedded_model() -> Path:
    from vllm_marith.models import ensure

    return ensure(only=["big"]).big


LARGER = dict(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
)
"""The shape of a model of 134 million parameters."""


def like(model: Path, home: Path, **shape: int) -> Path:
    """A model of random weights, like `model` but for its shape; it shares the first tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = AutoConfig.from_pretrained(model)
    config.update(shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(home)
    AutoTokenizer.from_pretrained(model).save_pretrained(home)
    return home

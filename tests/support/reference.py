"""The plain reference: Hugging Face transformers in float32, one forward per term, no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import AutoModelForCausalLM

from vllm_marith import Formula

Model = str | Mapping[str, str]
"""A model's path, or one for each term."""
# (name -> float32 logits [vocab], tokens so far) -> the next token.
Choose = Callable[[dict[str, torch.Tensor], list[int]], int]


@lru_cache(maxsize=8)
def load(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass
class Reference:
    """A continuation under a formula.

    tokens: greedy choices, or the tokens that were forced.
    margins: per step, how far the best log-probability is above the second.
    logprobs: per step, the formula's log-probability of the token.
    """

    tokens: list[int]
    margins: list[float]
    logprobs: list[float]


def generate(
    model: Model,
    formula: Formula,
    prompts: Mapping[str, Sequence[int]],
    length: int,
    force: Sequence[int] = (),
) -> Reference:
    """Greedy decoding of `formula`, whose terms continue `prompts` (name -> token ids)."""
    found = Reference([], [], [])

    def greedy(logits: dict[str, torch.Tensor], tokens: list[int]) -> int:
        distribution = formula.evaluate(logits, dtype=torch.float64, position=len(tokens))
        best = distribution.topk(2)
        token = int(force[len(tokens)]) if force else int(best.indices[0])
        found.margins.append(float(best.values[0] - best.values[1]))
        found.logprobs.append(float(distribution[token]))
        return token

    found.tokens = decode(model, prompts, length, greedy)
    return found


@torch.inference_mode()
def decode(model: Model, prompts: Mapping[str, Sequence[int]], length: int, choose: Choose) -> list[int]:
    """`length` tokens that continue every prompt, each chosen by `choose`."""
    networks = {name: load(str(model[name] if isinstance(model, Mapping) else model)) for name in prompts}
    caches = dict.fromkeys(prompts)
    inputs = {name: torch.tensor([list(ids)]) for name, ids in prompts.items()}
    tokens: list[int] = []
    while len(tokens) < length:
        logits = {}
        for name, ids in inputs.items():
            output = networks[name](ids, past_key_values=caches[name], use_cache=True)
            caches[name] = output.past_key_values
            logits[name] = output.logits[0, -1]
        tokens.append(int(choose(logits, tokens)))
        inputs = dict.fromkeys(prompts, torch.tensor([tokens[-1:]]))
    return tokens


@torch.inference_mode()
def next_distribution(model: str, formula: Formula, prompts: Mapping[str, Sequence[int]]) -> torch.Tensor:
    """float64 log-probabilities ``[vocab]`` of the token after the prompts."""
    network = load(str(model))
    logits = {name: network(torch.tensor([list(ids)])).logits[0, -1] for name, ids in prompts.items()}
    return formula.evaluate(logits, dtype=torch.float64)


@torch.inference_mode()
def scores(model: Model, formula: Formula, prompts: Mapping[str, Sequence[int]], count: int) -> torch.Tensor:
    """float64 log-probabilities ``[count, vocab]`` of the last `count` tokens, in which the prompts agree."""
    networks = {name: load(str(model[name] if isinstance(model, Mapping) else model)) for name in prompts}
    logits = {
        name: networks[name](torch.tensor([list(ids)])).logits[0, len(ids) - 1 - count : len(ids) - 1]
        for name, ids in prompts.items()
    }
    return formula.evaluate(logits, dtype=torch.float64)

"""genlm-control's side of `bench_peers.py --genlm PYTHON`, which runs this file with that Python.

Reads a line of JSON at a time from its standard input and answers with one:

    {"model": DIR}                                   loads it; versions
    {"distribution": [[ids, ids], [id, ...]]}        log-probabilities of all tokens after the two prompts and
                                                     an answer so far, under the product of both
    {"generate": [[ids, ids], ...], "tokens": N}     N tokens for each pair of prompts

The library's fastest setting that was found on a CPU: its Hugging Face backend, all requests concurrent on
one event loop, its batch as large as the requests have rows (so that no step waits for its timer), and the
prompts' keys and values cached (`cache_kv`).  It keeps no keys and values of tokens that it generates.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Any

import torch
from genlm.backend.llm import AsyncTransformer
from genlm.control import PromptedLLM, direct_token_sampler

TERMS = 2


class Peer:
    def __init__(self, model: str) -> None:
        self.llm = AsyncTransformer.from_name(model, hf_opts={"dtype": torch.float32, "device_map": None})
        vocabulary, tokenizer = self.llm.byte_vocab, self.llm.tokenizer
        # All requests take as many tokens as asked for: what ends an answer is a token that no answer has,
        # and the model's own end of a text is one like any other.
        end = vocabulary[tokenizer.pad_token_id].byte_string
        self.root = PromptedLLM(self.llm, [tokenizer.bos_token_id], eos_byte_strings=[end])

    def product(self, prompts: list[list[int]]) -> Any:
        first, second = (self.root.spawn(prompt_ids=ids) for ids in prompts)
        return first * second

    async def distribution(self, prompts: list[list[int]], answer: list[int]) -> list[float]:
        self.llm.batch_size = TERMS
        product = self.product(prompts)
        weights = (await product.logw_next(self.root.decode_tokens(answer))).normalize().weights
        ids = [token.token_id for token in product.vocab]
        found = [-torch.inf] * len(self.llm.byte_vocab)
        for token, weight in zip([*ids, self.llm.tokenizer.pad_token_id], weights.tolist(), strict=True):
            found[token] = weight
        return found

    async def generate(self, pairs: list[list[list[int]]], tokens: int) -> list[list[int]]:
        self.llm.clear_cache()
        self.llm.batch_size = TERMS * len(pairs)
        for prompts in pairs:
            for ids in prompts:
                self.llm.cache_kv(ids)
        return await asyncio.gather(*(self.one(prompts, tokens) for prompts in pairs))

    async def one(self, prompts: list[list[int]], tokens: int) -> list[int]:
        sampler = direct_token_sampler(self.product(prompts))
        answer: list[Any] = []
        for _ in range(tokens):
            token, _, _ = await sampler.sample(answer)
            answer.append(token)
        return [token.token_id for token in answer]


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    peer: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "model" in asked:
            peer = Peer(asked["model"])
            names = ("genlm-control", "genlm-backend", "torch", "transformers")
            answer: Any = {name: version(name) for name in names}
        elif "distribution" in asked:
            answer = asyncio.run(peer.distribution(*asked["distribution"]))
        else:
            answer = asyncio.run(peer.generate(asked["generate"], asked["tokens"]))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

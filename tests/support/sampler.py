"""What vLLM's sampler does with one row, written out in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

EOS = 2


@dataclass
class Sampler:
    """Chooses tokens as `params` ask.

    params: a `vllm.SamplingParams`.
    prompt: what counts as the prompt for the repetition penalty.
    bad_words: the token ids of ``params.bad_words``.
    """

    params: Any
    prompt: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator()
        if self.params.seed is not None:
            self.generator.manual_seed(self.params.seed)

    def __call__(self, row: torch.Tensor, tokens: Sequence[int]) -> int:
        """The token that follows `tokens`.  row: logits ``[vocab]``, up to a constant or not at all."""
        row = self.processed(row, tokens)
        if self.params.temperature == 0:
            return int(row.argmax())
        # vLLM's noise on a CPU: one number of the request's generator a token.
        noise = torch.randint(0, 2**31, (1,), generator=self.generator)
        return int(torch.ops._C.fused_gumbel_argmax(row.float()[None], noise))

    def processed(self, row: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        """The logits that are sampled from; what cannot be sampled is -inf."""
        row = self._penalized(self._masked(row.double().clone(), tokens), tokens)
        if self.params.temperature == 0:
            return row
        return self._truncated(row / self.params.temperature)

    def _masked(self, row: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        params = self.params
        if params.allowed_token_ids:
            kept = row[params.allowed_token_ids]
            row.fill_(-torch.inf)[params.allowed_token_ids] = kept
        for *head, last in self.bad_words:
            if list(tokens[len(tokens) - len(head) :]) == head:
                row[last] = -torch.inf
        if len(tokens) < params.min_tokens:
            row[[EOS, *(params.stop_token_ids or [])]] = -torch.inf
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        return row

    def _penalized(self, row: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        for token in {*self.prompt, *tokens}:
            factor = self.params.repetition_penalty
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        for token, count in Counter(tokens).items():
            row[token] -= self.params.frequency_penalty * count + self.params.presence_penalty
        return row

    def _truncated(self, row: torch.Tensor) -> torch.Tensor:
        params = self.params
        probabilities = row.softmax(-1)
        row = row.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
        if params.top_k > 0:
            row = row.masked_fill(row < row.topk(params.top_k).values[-1], -torch.inf)
        ordered, order = row.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        row[order[before >= params.top_p]] = -torch.inf
        return row

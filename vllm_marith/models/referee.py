"""A referee of fluency: the perplexity of texts under an unconditional Llama.

It is trained on other files and with another seed than the models it measures.  Perplexities of different
attributes do not compare (code is easier to guess than prose): set real text of the same kind beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .batches import IGNORED
from .loading import load_llama, load_tokenizer
from .tokenizer import BOS, CONTEXT, PAD, encode

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


class Referee:
    """Measures perplexity."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path | str) -> Referee:
        """The referee saved in `folder`."""
        return cls(load_llama(folder), load_tokenizer(folder))

    def perplexity(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> float:
        """`exp` of the mean negative log-likelihood per token of all `texts` together.

        A text is a string or token ids of the made models' tokenizer, without BOS; what goes beyond the
        model's context is not read.  Empty texts count for nothing; if all are, the result is nan.
        """
        losses = self.losses(texts)
        count = sum(tokens for _, tokens in losses)
        return math.exp(sum(loss for loss, _ in losses) / count) if count else math.nan

    @torch.no_grad()
    def losses(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """For each text its negative log-likelihood in nats, over all tokens together, and their number."""
        rows = [encode(self.tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
        rows = [row[: CONTEXT - 1] for row in rows]
        found = [(0.0, 0)] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
        for start in range(0, len(order), 24):
            batch = order[start : start + 24]  # of like lengths: little padding
            width = len(rows[batch[-1]])
            padding = [width - len(rows[i]) for i in batch]
            ids = torch.tensor([[BOS, *rows[i]] + [PAD] * pad for i, pad in zip(batch, padding, strict=True)])
            labels = torch.tensor([rows[i] + [IGNORED] * pad for i, pad in zip(batch, padding, strict=True)])
            # Padding stands on the right of causal rows, so it needs no mask.
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            ).sum(1)
            for i, value in zip(batch, loss.tolist(), strict=True):
                found[i] = (value, len(rows[i]))
        return found

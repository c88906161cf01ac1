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

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> float:
        """`exp` of the mean negative log-likelihood per token of all `texts` together.

        A text is a string or token ids of the made models' tokenizer, without BOS; what goes beyond the
        model's context is not read.  Empty texts count for nothing; if all are, the result is nan.
        """
        rows = [encode(self.tokenizer, text) if isinstance(text, str) else list(text) for text in texts]
        rows = sorted((row[: CONTEXT - 1] for row in rows if row), key=len)
        loss, count = 0.0, 0
        for start in range(0, len(rows), 24):
            batch = rows[start : start + 24]  # of like lengths: little padding
            width = len(batch[-1])
            ids = torch.tensor([[BOS, *row] + [PAD] * (width - len(row)) for row in batch])
            labels = torch.tensor([list(row) + [IGNORED] * (width - len(row)) for row in batch])
            # Padding stands on the right of causal rows, so it needs no mask.
            logits = self.model(input_ids=ids[:, :-1], use_cache=False).logits
            loss += F.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"
            ).item()
            count += sum(map(len, batch))
        return math.exp(loss / count) if count else math.nan

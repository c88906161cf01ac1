"""Pieces of real text that nothing was trained on: what judge and referee say of it tests them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from .corpus import Corpus
from .tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PART = "C"


def held_out_texts(
    corpus: Corpus, attribute: str, count: int, tokens: int, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """`count` pieces of held-out text of `tokens` tokens, from starts of paragraphs; always the same."""
    files = corpus.parts[PART][attribute]
    chooser = random.Random(0)
    pieces = []
    for _ in range(count):
        [file] = chooser.choices(files, [len(file) for file in files])
        start = chooser.randrange(len(file))
        ids = encode(tokenizer, "\n\n".join(file[start : start + 20]))
        pieces.append(str(tokenizer.decode(ids[:tokens])))
    return pieces

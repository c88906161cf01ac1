"""The text of a continuation, with each of many candidates for its next token.

A token is not a piece of text: several make up one character, and some tokenizers write a space only
between two of them.  What a candidate adds to a text is therefore known only by decoding all of them
together.  `CandidateTexts` decodes less where it is provably the same, and everything otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ..answers import CONTEXT

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes in UTF-8


class CandidateTexts:
    """Decodes with the language model's tokenizer, special tokens left out, as clients see text."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: as `vllm.tokenizers.TokenizerLike`."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "_tokenizer", None)
        self._backend = backend if isinstance(backend, Tokenizer) else None
        self._is_bytes = self._backend is not None and decodes_bytes(self._backend)

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of token ids by itself."""
        if self._backend is not None:
            # On threads, and without transformers' cleaning of spaces, which clients do not see either.
            lists = [list(ids) for ids in sequences]
            return list(self._backend.decode_batch(lists, skip_special_tokens=True))
        return [self._tokenizer.decode(list(ids), skip_special_tokens=True) for ids in sequences]

    def texts(
        self, prompt: Sequence[int], generated: Sequence[int], candidates: Sequence[int]
    ) -> tuple[str, list[str]]:
        """The text of `generated` behind `prompt`, and of `generated` with each candidate added.

        Args:
            prompt: the prompt's token ids, or as many of its last ones as there are; `CONTEXT` are read.
            generated: token ids.
            candidates: token ids.
        """
        context = list(prompt[-CONTEXT:])
        sequence = [*context, *generated]
        start = self._boundary(sequence)
        head, tail = sequence[:start], sequence[start:]
        before, ahead, *decoded = self.decode([context, head, tail, *([*tail, c] for c in candidates)])
        texts = [ahead + text for text in decoded]
        cut = len(before)
        if not all(text.startswith(before) for text in texts):
            # The prompt ended within a character: what comes of it belongs to the continuation.
            cut = _common_prefix(before, texts)
        so_far, *texts = (text[cut:] for text in texts)
        return so_far, texts

    def _boundary(self, sequence: Sequence[int]) -> int:
        """An index from which on the sequence can be decoded by itself.

        Where a text is the UTF-8 decoding of its tokens' bytes in a row, it can be cut wherever the
        tokens end with a whole character: the decoder is in no state there.
        """
        if not self._is_bytes:
            return 0
        end = len(sequence)
        # A character is at most so many tokens; a special token, which has no bytes, comes on top.
        for start in range(max(0, end - 1), max(0, end - 2 * _LONGEST_CHARACTER), -1):
            (piece,) = self.decode([sequence[max(0, start - _LONGEST_CHARACTER) : start]])
            if piece and not piece.endswith(_INCOMPLETE):
                return start
        return 0


def decodes_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's text is the UTF-8 decoding of its tokens' bytes in a row, and nothing else."""
    decoder = json.loads(tokenizer.to_str()).get("decoder")
    return decoder is not None and decoder.get("type") == "ByteLevel"


def _common_prefix(text: str, others: Sequence[str]) -> int:
    length = len(text)
    for other in others:
        while not other.startswith(text[:length]):
            length -= 1
    return length

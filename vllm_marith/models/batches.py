"""Rows of tokens for training and for held-out perplexity."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .recipe import ATTRIBUTES
from .tokenizer import ASSISTANT, BOS, END, PAD, SYSTEM, SYSTEM_PROMPTS, USER, USER_PROMPT, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .corpus import Files

IGNORED = -100
"""Label of a position that is not learned (prompts and padding), as `cross_entropy` has it."""

# How rows are mixed.  A message of words from nowhere ("noise") teaches that an unknown system or user
# message says nothing, instead of leaving the model lost on it.
RAW_SHARE = 0.15  # rows without a chat around them
SYSTEM_SHARES = {"asked": 0.55, "none": 0.35, "noise": 0.10}
USER_SHARES = {"plain": 0.5, "opening": 0.3, "noise": 0.2}
TURN_ENDS = 0.25  # share of paragraphs after which the assistant stops


class Paragraphs:
    """One attribute as token ids, paragraph after paragraph, files in a shuffled order."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, files: Files, seed: int) -> None:
        files = list(files)
        random.Random(seed).shuffle(files)
        texts = [paragraph for file in files for paragraph in file]
        self.ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[index % len(self.ids)]

    def __len__(self) -> int:
        return len(self.ids)


class Batches:
    """An endless supply of rows of `length` tokens, the attributes in turn.

    `chat` rows are conversations: perhaps a system message, a user's "go on", an answer of one or more
    paragraphs, perhaps another turn; only answers and their ends are learned.  Rows without chat are a BOS
    and paragraphs.  The same arguments give the same rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        texts: dict[str, Files],
        seed: int,
        *,
        length: int,
        attributes: Sequence[str] = ATTRIBUTES,
        chat: bool = True,
    ) -> None:
        self.random = random.Random(seed)
        self.length = length
        self.attributes = attributes
        self.chat = chat
        self.paragraphs = {a: Paragraphs(tokenizer, texts[a], seed) for a in attributes}
        self.break_ = encode(tokenizer, "\n") * 2  # how the tokenizer sees a blank line between words
        self.colon = encode(tokenizer, ": ")
        self.asked = {a: encode(tokenizer, SYSTEM_PROMPTS[a]) for a in ATTRIBUTES}
        self.go_on = encode(tokenizer, USER_PROMPT)

    def __call__(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Token ids [rows, length], the labels of the *next* token [rows, length], each row's attribute."""
        ids = torch.full((rows, self.length), PAD)
        labels = torch.full((rows, self.length), IGNORED)
        names = [self.attributes[row % len(self.attributes)] for row in range(rows)]
        for row, attribute in enumerate(names):
            tokens, learned = self.row(attribute)
            size = min(len(tokens), self.length)
            ids[row, :size] = torch.tensor(tokens[:size])
            following = tokens[1 : self.length + 1]
            kept = [t if learn else IGNORED for t, learn in zip(following, learned[1:], strict=False)]
            labels[row, : len(kept)] = torch.tensor(kept)
        return ids, labels, names

    def row(self, attribute: str) -> tuple[list[int], list[bool]]:
        """At least `length` + 1 tokens of one row, and for each whether it is learned."""
        paragraphs = self.paragraphs[attribute]
        index = self.random.randrange(len(paragraphs))
        if not self.chat or self.random.random() < RAW_SHARE:
            tokens = [BOS]
            while len(tokens) <= self.length:
                tokens += paragraphs[index] + self.break_
                index += 1
            return tokens, [False] + [True] * (len(tokens) - 1)
        tokens = [BOS, *self.system(attribute)]
        learned = [False] * len(tokens)
        while len(tokens) <= self.length:
            question, answer = self.user(paragraphs[index])
            index += 1
            while self.random.random() >= TURN_ENDS and len(answer) <= self.length:
                answer = answer + self.break_ + paragraphs[index]
                index += 1
            tokens += [*question, *answer, END]
            learned += [False] * len(question) + [True] * (len(answer) + 1)
        return tokens, learned

    def system(self, attribute: str) -> list[int]:
        """A row's system message, or nothing."""
        kind = self.choose(SYSTEM_SHARES)
        if kind == "none":
            return []
        return [SYSTEM, *(self.asked[attribute] if kind == "asked" else self.noise()), END]

    def user(self, paragraph: list[int]) -> tuple[list[int], list[int]]:
        """A user turn up to the assistant's mark, and what of `paragraph` is left for the answer."""
        kind = self.choose(USER_SHARES)
        if kind == "noise":
            return [USER, *self.noise(), END, ASSISTANT], paragraph
        if kind == "plain":
            return [USER, *self.go_on, END, ASSISTANT], paragraph
        given = self.random.randint(1, 8)
        opening = [*self.go_on, *self.colon, *paragraph[:given]]
        return [USER, *opening, END, ASSISTANT], paragraph[given:]

    def noise(self) -> list[int]:
        """A few tokens of any attribute's text."""
        paragraphs = self.paragraphs[self.random.choice(self.attributes)]
        paragraph = paragraphs[self.random.randrange(len(paragraphs))]
        start = self.random.randrange(len(paragraph))
        return paragraph[start : start + self.random.randint(1, 8)]

    def choose(self, shares: dict[str, float]) -> str:
        return self.random.choices(list(shares), list(shares.values()))[0]

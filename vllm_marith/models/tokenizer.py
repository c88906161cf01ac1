"""The tokenizer of all made language models, and the chat they are trained on."""

from __future__ import annotations

import random
from itertools import takewhile
from typing import TYPE_CHECKING

from .corpus import Corpus
from .recipe import ATTRIBUTES, TokenizerRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(6)
"""Ids of the special tokens."""

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

SYSTEM_PROMPTS = {"prose": "write prose", "code": "write code", "legal": "write legal text"}
"""Attribute -> the system message that asks for it.  Without one the models write any of the three."""

USER_PROMPT = "go on"
"""The user message the models know best; it may be followed by a colon and the first words of the answer."""

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] != 'assistant' or not loop.last or add_generation_prompt %}"
    "{{ '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

CONTEXT = 512
"""Positions of the made models."""


def train_tokenizer(corpus: Corpus, recipe: TokenizerRecipe, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from equal amounts of the three attributes; encoding adds the BOS once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(corpus, recipe.characters, seed), trainer)
    bos = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=SPECIAL_TOKENS[END],
        pad_token=SPECIAL_TOKENS[PAD],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of `text` alone: no BOS, and no warning where it is longer than the models' context."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _sample(corpus: Corpus, characters: int, seed: int) -> list[str]:
    """Up to `characters` of each attribute's training text."""
    sample: list[str] = []
    for attribute in ATTRIBUTES:
        paragraphs = corpus.paragraphs("A", attribute)
        random.Random(seed).shuffle(paragraphs)
        size = 0

        def fits(paragraph: str) -> bool:
            nonlocal size
            size += len(paragraph)
            return size <= characters

        sample += takewhile(fits, paragraphs)
    return sample

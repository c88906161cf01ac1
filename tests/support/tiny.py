"""Small random models for tests in which weights do not matter: made in seconds, the same every time."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB = 1024
CONTEXT = 512


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB` tokens that puts one BOS before a prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(topics.values()), trainer)
    bpe.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
    )


def make(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    kv_heads: int = 1,
    columns: int = VOCAB,
    sharpness: float = 8.0,
    config: type[LlamaConfig | Qwen2Config] = LlamaConfig,
) -> Path:
    """A random Llama, or a Qwen2, with its tokenizer under `path`.

    columns: rows of the embedding and of the head; what is more than `VOCAB` is padding.
    sharpness: how far the logits are spread.  Distributions as peaked as a trained model's make
    greedy decoding insensitive to rounding, and make every term matter.
    """
    if (path / "config.json").exists():
        return path
    torch.manual_seed(seed)
    shape = config(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness / (0.2 * hidden**0.5))
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def prompt(rng: random.Random, low: int, high: int) -> list[int]:
    """Random token ids, BOS first; the special tokens are left out."""
    return [1, *(rng.randrange(len(SPECIAL), VOCAB) for _ in range(rng.randint(low, high)))]

"""Sequence classifiers for tests, random and tiny, and the plain loop over texts that ours must equal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

LABELS = ("plain", "toxic", "legal")
POSITIONS = 48
"""Tokens that the classifiers read: few, so that texts are truncated."""


def make(
    path: Path,
    labels: Sequence[str] = LABELS,
    *,
    seed: int = 0,
    problem_type: str | None = None,
    safetensors: bool = True,
    sharpness: float = 0.7,
) -> Path:
    """A random BERT classifier with a tokenizer of its own under `path`.

    sharpness: how far its classes' log-probabilities differ from text to text.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type=problem_type,
        initializer_range=0.5,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(sharpness)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    if not safetensors:
        (path / "model.safetensors").unlink()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


@lru_cache(maxsize=1)
def _tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of lower-case pieces: nothing like the language models'."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    # Not trained: the trainer's ties fall another way in every process.
    text = " ".join(sorted(topics.values())).lower()
    words = Counter(re.findall("[a-z]{2,}", text)).most_common(300)
    chars = sorted({char for char in text if char.isascii() and char.isprintable() and char != " "})
    vocabulary = [*special, *chars, *(f"##{char}" for char in chars), *sorted(word for word, _ in words)]
    pieces = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=POSITIONS,
    )


@lru_cache(maxsize=8)
def _load(path: str) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def probability(path: Path | str, text: str, label: int, *, minimize: bool = False) -> float:
    """p(label | text), or of its complement, in float64."""
    logits = torch.tensor(_logits(str(path), text), dtype=torch.float64)
    if _load(str(path))[0].config.problem_type == "multi_label_classification":
        found = torch.sigmoid(logits)[label]
        return float(1 - found if minimize else found)
    shares = torch.softmax(logits, 0)
    others = [i for i in range(len(shares)) if i != label]
    return float(shares[others].sum() if minimize else shares[label])


@lru_cache(maxsize=1 << 16)
@torch.inference_mode()
def _logits(path: str, text: str) -> list[float]:
    """One text, one forward pass; truncation spelled out: the last tokens that fit, between special ones."""
    model, tokenizer = _load(path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[-(POSITIONS - 2) :]
    return (
        model(input_ids=torch.tensor([[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]]))
        .logits[0]
        .tolist()
    )


def labels(path: Path | str) -> list[str]:
    """The classes of a classifier, in order."""
    config = _load(str(path))[0].config
    return [config.id2label[index] for index in sorted(config.id2label)]

"""`judge_bert`: a tiny BERT that names the attribute of a prefix, made to be a *classifier term* of formulas.

It learns from the language models' own training text: it belongs to what steers, not to what measures.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from .batches import Paragraphs
from .optimizer import Optimizer, schedule
from .progress import Tick
from .recipe import ATTRIBUTES, BertRecipe
from .tokenizer import BOS, CONTEXT, PAD

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification

PREFIXES = (8, 16, 32, 64)
"""Lengths in tokens that it is trained and tested on."""


def bert(vocabulary: int, recipe: BertRecipe) -> BertForSequenceClassification:
    """A BERT classifier with random weights; labels are the attributes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.inner,
            max_position_embeddings=CONTEXT,
            id2label=dict(enumerate(ATTRIBUTES)),
            label2id={name: index for index, name in enumerate(ATTRIBUTES)},
            pad_token_id=PAD,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


class Prefixes:
    """Prefixes of paragraphs, the attributes in turn."""

    def __init__(self, paragraphs: dict[str, Paragraphs], seed: int) -> None:
        self.paragraphs = paragraphs
        self.random = random.Random(seed)

    def __call__(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids [rows, 1 + length], their mask, the attributes' indices [rows]."""
        ids = torch.full((rows, 1 + length), PAD)
        ids[:, 0] = BOS
        labels = torch.arange(rows) % len(ATTRIBUTES)
        for row, label in enumerate(labels.tolist()):
            paragraphs = self.paragraphs[ATTRIBUTES[label]]
            prefix = paragraphs[self.random.randrange(len(paragraphs))][:length]
            ids[row, 1 : 1 + len(prefix)] = torch.tensor(prefix)
        return ids, (ids != PAD).long(), labels


def train_classifier(
    model: BertForSequenceClassification, prefixes: Prefixes, recipe: BertRecipe, tick: Tick
) -> None:
    """Train `model` in place on prefixes of random lengths."""
    course = recipe.course
    optimizer = Optimizer(model, course.adam, course.muon)
    model.train()
    for step in range(course.steps):
        ids, mask, labels = prefixes(course.rows, prefixes.random.choice(PREFIXES))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step(schedule(step / course.steps))
        tick(step + 1, course.steps, f"loss {loss.item():.2f}")
    model.eval()


@torch.no_grad()
def prefix_accuracies(
    model: BertForSequenceClassification, prefixes: Prefixes, rows: int = 300
) -> dict[str, float]:
    """Prefix length -> share of `rows` prefixes named right."""
    shares = {}
    for length in PREFIXES:
        ids, mask, labels = prefixes(rows, length)
        named = model(input_ids=ids, attention_mask=mask).logits.argmax(1)
        shares[str(length)] = round((named == labels).float().mean().item(), 3)
    return shares

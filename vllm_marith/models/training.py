"""Making and training the Llamas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .batches import IGNORED, Batches
from .optimizer import Optimizer, schedule
from .progress import Tick
from .recipe import Course, Shape
from .tokenizer import BOS, CONTEXT, END, PAD

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DISTILL_FROM = 0.25
DISTILL_WEIGHT = 0.85
"""A student learns from text alone at first, then mostly from its teacher's distributions."""


def llama(vocabulary: int, shape: Shape) -> LlamaForCausalLM:
    """A Llama with random weights, embeddings tied, and what generation should know of it."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.hidden // shape.heads,
            tie_word_embeddings=True,
            max_position_embeddings=CONTEXT,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD
    )
    return model


def learned_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocabulary] and labels [n] of the learned positions only; the others' are never computed."""
    learned = labels != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[learned]
    return model.lm_head(hidden), labels[learned]


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    course: Course,
    tick: Tick,
    teacher: LlamaForCausalLM | None = None,
) -> float:
    """Train `model` in place for `course.steps` steps and return the smoothed last loss on text.

    With a `teacher`, the loss becomes 0.15 CE(text) + 0.85 KL(teacher || model) after the first quarter.
    """
    optimizer = Optimizer(model, course.adam, course.muon)
    model.train()
    smoothed = math.nan
    for step in range(course.steps):
        done = step / course.steps
        ids, labels, _ = batches(course.rows)
        logits, targets = learned_logits(model, ids, labels)
        text_loss = loss = F.cross_entropy(logits, targets)
        if teacher is not None and done >= DISTILL_FROM:
            with torch.no_grad():
                taught, _ = learned_logits(teacher, ids, labels)
            divergence = F.kl_div(
                logits.log_softmax(-1), taught.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            loss = (1 - DISTILL_WEIGHT) * text_loss + DISTILL_WEIGHT * divergence
        loss.backward()
        optimizer.step(schedule(done))
        value = text_loss.item()
        smoothed = value if math.isnan(smoothed) else 0.97 * smoothed + 0.03 * value
        tick(step + 1, course.steps, f"loss {smoothed:.2f}")
    model.eval()
    return smoothed


@torch.no_grad()
def perplexities(model: LlamaForCausalLM, batches: Batches, rows: int = 192) -> dict[str, float]:
    """Attribute -> perplexity on about `rows` rows of `batches`."""
    losses = dict.fromkeys(batches.attributes, 0.0)
    counts = dict.fromkeys(batches.attributes, 0)
    for _ in range(math.ceil(rows / 24)):
        ids, labels, names = batches(24)
        logits = model(input_ids=ids, use_cache=False).logits
        losses_of_rows = F.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        ).sum(1)
        for name, loss, count in zip(
            names, losses_of_rows.tolist(), (labels != IGNORED).sum(1).tolist(), strict=True
        ):
            losses[name] += loss
            counts[name] += count
    return {name: round(math.exp(losses[name] / counts[name]), 1) for name in losses}

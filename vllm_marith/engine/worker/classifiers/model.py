"""One sequence classifier: log-probabilities of its classes for texts, in batches, with a cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ...classifiers import Card, ClassifierError, ClassifierSettings, load_tokenizer
from ..figures import ClassifierFigures


class Classifier:
    """log p(class | text) and log(1 - p(class | text)), as the model alone would give them text by text.

    Texts are tokenized with the classifier's own tokenizer, which drops the beginning of what is too
    long.  Results are remembered by text: the text so far was a candidate in the step before.
    """

    def __init__(self, name: str, settings: ClassifierSettings, device: torch.device) -> None:
        """Loads configuration, tokenizer and weights.

        Raises:
            ClassifierError: one sentence that names the classifier.
        """
        self.card = Card.read(name, settings)
        self.batch_size = settings.batch_size
        self.device = torch.device("cpu") if settings.device == "cpu" else device
        self.tokenizer = load_tokenizer(name, settings)
        self.model = _load_model(name, settings).to(self.device)
        self.figures = ClassifierFigures()
        self._cache_size = settings.cache_size
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()
        # Classifiers run beside each other, and behind nothing that the base model has in its stream.
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def check(self) -> None:
        """Reads a text as long as any, and a full batch of them, before a request does.

        Raises:
            ClassifierError: it cannot; the sentence names the classifier.
        """
        try:
            self._read(["word " * self.card.max_length] * self.batch_size)
            if self._stream is not None:
                self._stream.synchronize()
        except Exception as error:  # of a model of another's making
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ClassifierError(
                f"classifier '{self.card.name}' cannot read {self.batch_size} texts of "
                f"{self.card.max_length} tokens (batch_size, max_length): {reason}"
            ) from None

    def log_probs(self, texts: Sequence[str]) -> np.ndarray:
        """float32 ``[texts, 2, classes]``: log p of each class, and log(1 - p) of each class."""
        return self.collect(self.submit(texts))

    def submit(self, texts: Sequence[str]) -> Reading:
        """Starts reading; on a GPU it goes on while other classifiers are started."""
        started = time.perf_counter()
        keys = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        known: dict[bytes, np.ndarray] = {}
        new: dict[bytes, str] = {}
        for key, text in zip(keys, texts, strict=True):
            if key in self._cache:
                self._cache.move_to_end(key)
                known[key] = self._cache[key]
            else:
                new.setdefault(key, text)
        order, chunks, done = self._read(list(new.values()))
        self.figures.hits += len(texts) - len(new)
        self.figures.texts += len(new)
        self.figures.batches += len(chunks)
        self.figures.seconds += time.perf_counter() - started
        return Reading(keys, known, [list(new)[i] for i in order], chunks, done)

    def collect(self, reading: Reading) -> np.ndarray:
        """Waits for what `submit` started; the result is that of `log_probs`."""
        started = time.perf_counter()
        known = reading.known
        if reading.done is not None:
            reading.done.synchronize()
        if reading.chunks:
            known.update(zip(reading.new, torch.cat(reading.chunks).numpy(), strict=True))
        # Stored at the end: a step whose texts outnumber the cache still has all of them.
        for key in reading.new:
            self._cache[key] = known[key]
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        self.figures.seconds += time.perf_counter() - started
        rows = [known[key] for key in reading.keys]
        return np.stack(rows) if rows else np.empty((0, 2, len(self.card.labels)), dtype=np.float32)

    @torch.inference_mode()
    def _read(self, texts: list[str]) -> tuple[list[int], list[torch.Tensor], Any]:
        """Texts in order of length, ``[chunk, 2, classes]`` on the host for each chunk of them, its event."""
        if not texts:
            return [], [], None
        inputs = self.tokenizer(texts, truncation=True, max_length=self.card.max_length)
        order = sorted(range(len(texts)), key=lambda i: len(inputs["input_ids"][i]))
        chunks = []
        stream = self._stream
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = self.tokenizer.pad(
                    {key: [values[i] for i in indices] for key, values in inputs.items()}, return_tensors="pt"
                )
                logits = self.model(**batch.to(self.device)).logits.float()
                log_probs = class_log_probs(logits, self.card.multi_label)
                chunks.append(log_probs.to("cpu", non_blocking=stream is not None))
            done = stream.record_event() if stream is not None else None
        return order, chunks, done


@dataclass
class Reading:
    """Texts that a `Classifier` is reading.

    Attributes:
        keys: of all texts, in the caller's order.
        known: results from the cache, by key.
        new: keys of the texts that are read, in the order of the rows of `chunks`.
        chunks: float32 ``[chunk, 2, classes]`` on the host, complete once `done` has happened.
        done: event on the classifier's stream; None where there are no streams.
    """

    keys: list[bytes]
    known: dict[bytes, np.ndarray]
    new: list[bytes]
    chunks: list[torch.Tensor]
    done: Any


def class_log_probs(logits: torch.Tensor, multi_label: bool) -> torch.Tensor:
    """log p and log(1 - p) of every class, without ever forming 1 - p.

    Args:
        logits: float ``[texts, classes]``.
        multi_label: each class is a yes or no of its own (sigmoid), rather than one of all (softmax).

    Returns:
        ``[texts, 2, classes]``; finite wherever the logits are.
    """
    if multi_label:
        return torch.stack([logsigmoid(logits), logsigmoid(-logits)], dim=1)
    classes = logits.shape[1]
    # log(1 - p_y) is the log-sum-exp of the other classes' logits, over that of all.
    own = torch.eye(classes, dtype=torch.bool, device=logits.device)
    others = logits[:, None, :].expand(-1, classes, -1).masked_fill(own, -torch.inf)
    total = logits.logsumexp(1, keepdim=True)
    return torch.stack([logits - total, others.logsumexp(2) - total], dim=1)


def _load_model(name: str, settings: ClassifierSettings) -> torch.nn.Module:
    """The model in evaluation mode, on the CPU."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            **settings.source(),
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a file of another's making provokes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClassifierError(f"classifier '{name}' ({settings.path}) cannot be loaded: {reason}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        # transformers would make them up: a base model without a classification head, for one.
        lacking = ", ".join(sorted(report["missing_keys"])[:3])
        raise ClassifierError(f"classifier '{name}' ({settings.path}) has no weights for {lacking}")
    return model.eval()

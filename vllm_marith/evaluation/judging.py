"""Who reads the texts: labels, likelihoods and repetition.

The judges of an evaluation take no part in the writing.  A formula's classifier terms are other models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_marith.models import Judge, Paths
from vllm_marith.models.topics import topics

from .scenario import EMBEDDED, ScenarioError

Labeller = Callable[[Sequence[str]], list[str]]
"""Texts to labels."""

OTHER = "other"
"""The label of a text that has none of a judge's."""

BATCH = 32


def labeller(axis: str, named: str | None, wanted: Sequence[str], paths: Paths | None) -> Labeller:
    """The judge of an axis, by what the scenario calls it.

    wanted: labels that the scenario asks about.

    Raises:
        ScenarioError: nobody is named, or a classifier that cannot be loaded or lacks a wanted label.
    """
    if named is None:
        raise ScenarioError(f"nobody judges '{axis}'; --judge {axis}=CLASSIFIER names who does")
    if named == f"{EMBEDDED}topics":
        return topics
    if named.startswith(EMBEDDED):
        assert paths is not None
        return Judge.load(getattr(paths, named.removeprefix(EMBEDDED))).labels
    return classifier(axis, named, wanted)


def classifier(axis: str, path: str, wanted: Sequence[str]) -> Labeller:
    """A sequence classifier: the likeliest label; `OTHER` if labels may go together and none is likely."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ScenarioError(f"the judge of '{axis}', {path}, cannot be loaded: {reason}") from error
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    for label in wanted:
        if label not in names:
            raise ScenarioError(
                f"the judge of '{axis}', {path}, has no label '{label}'; it has {', '.join(names)}"
            )
    several = model.config.problem_type == "multi_label_classification"
    longest = min(
        tokenizer.model_max_length, model.config.max_position_embeddings - 2
    )  # RoBERTa's start at 2

    @torch.inference_mode()
    def labels(texts: Sequence[str]) -> list[str]:
        found = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            for row in model(**batch).logits:
                best = int(row.argmax())
                found.append(names[best] if not several or row[best] > 0 else OTHER)
        return found

    return labels


def repetition(tokens: Sequence[int], length: int = 3) -> float:
    """Share of the runs of `length` tokens that occurred before in the text; 0 for a shorter text."""
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0

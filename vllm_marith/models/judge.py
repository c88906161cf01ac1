"""A judge of texts that shares neither tokenizer nor training text with the models it judges.

Multinomial logistic regression over which hashed character n-grams occur in a text, in numpy alone, with a
class for *garbage*: without one, gibberish would count as whatever attribute it resembles most.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from .corpus import Files
from .progress import Tick
from .recipe import ATTRIBUTES, JudgeRecipe

LABELS = (*ATTRIBUTES, "garbage")
READ = 400
"""Bytes of a text that are read."""

SNIPPET_LENGTHS = (60, 300)
"""Shortest and longest training snippet in characters: about 20 to 90 tokens."""

Snippet = tuple[str, int]
"""A text and the index of its label."""


class Judge:
    """Names the attribute of short texts.

    A text is the set of buckets that its n-grams hash to; the score of a label is the mean of the set's
    weights, plus a weight times the text's repetitiveness, plus a bias.
    """

    def __init__(self, weight: np.ndarray, dense: np.ndarray, lengths: Sequence[int]) -> None:
        self.weight = weight  # [buckets, labels]
        self.dense = dense  # [2, labels]: repetitiveness, bias
        self.lengths = tuple(lengths)  # of the n-grams, in bytes

    @classmethod
    def load(cls, folder: Path | str) -> Judge:
        """The judge saved in `folder`."""
        tensors = load_file(Path(folder) / "model.safetensors")
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return cls(tensors["weight"], tensors["dense"], config["lengths"])

    def save(self, folder: Path) -> None:
        """Write the judge into `folder`."""
        save_file({"weight": self.weight, "dense": self.dense}, folder / "model.safetensors")
        config = {"labels": LABELS, "lengths": self.lengths, "buckets": len(self.weight), "read": READ}
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")

    def labels(self, texts: Sequence[str]) -> list[str]:
        """The label of each text."""
        scores = self.scores([features(text, len(self.weight), self.lengths) for text in texts])
        return [LABELS[index] for index in scores.argmax(1)]

    def rates(self, texts: Sequence[str]) -> dict[str, float]:
        """Label -> share of `texts` that are called so; the shares sum to 1."""
        labels = self.labels(texts)
        return {label: labels.count(label) / len(labels) for label in LABELS}

    def scores(self, texts: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
        """Scores [texts, labels] of texts given as `features`."""
        return np.stack(
            [
                self.weight[buckets].mean(0) + repetition * self.dense[0] + self.dense[1]
                for buckets, repetition in texts
            ]
        )


def features(text: str, buckets: int, lengths: Sequence[int]) -> tuple[np.ndarray, float]:
    """The distinct buckets that the n-grams of `text` hash to, and the share of 3-grams that are repeats."""
    data = np.frombuffer(b" " + text.encode()[:READ] + b"  ", dtype=np.uint8).astype(np.uint32)
    found = []
    repetition = 0.0
    for length in lengths:
        windows = np.lib.stride_tricks.sliding_window_view(data, length) if len(data) >= length else data[:0]
        hashed = np.full(len(windows), length, dtype=np.uint32)
        for column in range(length if len(windows) else 0):
            # FNV-1a, on all windows at once; uint32 wraps as the hash wants it to.
            hashed = (hashed ^ windows[:, column]) * np.uint32(16777619)
        distinct = np.unique((hashed ^ (hashed >> np.uint32(15))) % np.uint32(buckets))
        if length == 3:
            repetition = 1 - len(distinct) / len(windows)
        found.append(distinct)
    return np.unique(np.concatenate(found)), repetition


def snippets(texts: dict[str, Files], count: int, seed: int) -> list[Snippet]:
    """`count` labelled snippets: the three attributes and garbage in turn."""
    chooser = random.Random(seed)
    return [
        (_garbage(texts, chooser) if name == "garbage" else _snippet(texts[name], chooser), label)
        for _ in range(count // len(LABELS))
        for label, name in enumerate(LABELS)
    ]


def train_judge(examples: Sequence[Snippet], recipe: JudgeRecipe, seed: int, tick: Tick) -> Judge:
    """Fit a judge to labelled snippets by Adam on the cross-entropy."""
    judge = Judge(
        np.zeros((recipe.buckets, len(LABELS)), dtype=np.float32),
        np.zeros((2, len(LABELS)), dtype=np.float32),
        recipe.lengths,
    )
    texts = [features(text, recipe.buckets, recipe.lengths) for text, _ in examples]
    targets = np.eye(len(LABELS), dtype=np.float32)[[label for _, label in examples]]
    parameters = [judge.weight, judge.dense]
    rates = [recipe.rate, recipe.rate / 4]  # a bucket is seen rarely and divided by the size of its text
    first = [np.zeros_like(p) for p in parameters]
    second = [np.zeros_like(p) for p in parameters]
    order = np.arange(len(texts))
    steps, total = 0, recipe.epochs * -(-len(order) // 100)
    for epoch in range(recipe.epochs):
        np.random.default_rng([seed, epoch]).shuffle(order)
        for batch in np.split(order, range(100, len(order), 100)):
            chosen = [texts[i] for i in batch]
            error = _softmax(judge.scores(chosen)) - targets[batch]  # [batch, labels]
            gradients = _gradients(chosen, error / len(batch), recipe.buckets)
            steps += 1
            for p, g, m, v, rate in zip(parameters, gradients, first, second, rates, strict=True):
                m += 0.1 * (g - m)
                v += 0.01 * (g * g - v)
                p -= rate * (m / (1 - 0.9**steps)) / (np.sqrt(v / (1 - 0.99**steps)) + 1e-6)
            tick(steps, total, "")
    return judge


def accuracies(judge: Judge, examples: Sequence[Snippet]) -> dict[str, float]:
    """Label -> share of its snippets that the judge names right, and `all`."""
    named = judge.labels([text for text, _ in examples])
    right: dict[str, list[bool]] = {label: [] for label in LABELS}
    for name, (_, label) in zip(named, examples, strict=True):
        right[LABELS[label]].append(name == LABELS[label])
    shares = {label: round(sum(hits) / len(hits), 3) for label, hits in right.items()}
    return shares | {"all": round(sum(map(sum, right.values())) / len(examples), 3)}


def _gradients(
    texts: Sequence[tuple[np.ndarray, float]], error: np.ndarray, buckets: int
) -> tuple[np.ndarray, np.ndarray]:
    indices = np.concatenate([found for found, _ in texts])
    sizes = np.array([len(found) for found, _ in texts])
    spread = np.repeat(error / sizes[:, None], sizes, axis=0)
    weight = np.stack([np.bincount(indices, column, minlength=buckets) for column in spread.T], axis=1)
    dense = np.stack([np.array([repetition for _, repetition in texts]) @ error, error.sum(0)])
    return weight.astype(np.float32), dense.astype(np.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _snippet(files: Files, chooser: random.Random) -> str:
    paragraphs = chooser.choices(files, [len(file) for file in files])[0]
    first = chooser.randrange(len(paragraphs))
    text = "\n\n".join(paragraphs[first : first + 4])
    start = chooser.choice((0, chooser.randrange(len(paragraphs[first]))))
    return text[start : start + chooser.randint(*SNIPPET_LENGTHS)]


def _garbage(texts: dict[str, Files], chooser: random.Random) -> str:
    """Text that is none of the attributes: shuffled, mixed up, or repeated real text."""
    source = _snippet(texts[chooser.choice(ATTRIBUTES)], chooser)
    kind = chooser.randrange(5)
    if kind == 0:  # single characters, shuffled
        return "".join(chooser.sample(source, len(source)))
    if kind == 1:  # pieces as short as tokens, shuffled: what a broken distribution samples
        pieces = []
        while source:
            size = chooser.randint(1, 6)
            pieces.append(source[:size])
            source = source[size:]
        chooser.shuffle(pieces)
        return "".join(pieces)
    if kind == 2:  # words and lines of all attributes, shuffled together
        words = [w for name in ATTRIBUTES for w in _snippet(texts[name], chooser).split(" ")]
        return " ".join(chooser.sample(words, max(1, len(words) // 2)))
    if kind == 3:  # a few pieces over and over
        size = chooser.randint(1, 12)
        return (source[:size] * 300)[: chooser.randint(*SNIPPET_LENGTHS)]
    # two words or so, in turn at random
    words = chooser.sample(source.split(), min(len(source.split()), chooser.randint(1, 3)))
    return " ".join(chooser.choices(words or ["the"], k=chooser.randint(15, 60)))[: SNIPPET_LENGTHS[1]]

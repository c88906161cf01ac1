"""How the embedded models are made: every number that decides what comes out.

A recipe plus one installation of Python gives one set of models.  Training runs for a fixed number of
*steps*, never for a fixed time: a time box would make the result depend on the machine's load, and under
contention it silently produces junk.

Each field of `Recipe` carries the name of the artefact it makes.  An artefact's fingerprint covers its own
field, the seed, and the fingerprints of what it is made from, so a changed number remakes exactly what
depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

ATTRIBUTES = ("prose", "code", "legal")

REVISIONS = {"expert": 2, "anti": 2, "lora_legal": 2}
"""Artefact -> its revision (1 where absent), raised when code changes what comes out, not a number below."""

NEEDS: dict[str, tuple[str, ...]] = {
    "corpus": (),
    "tokenizer": ("corpus",),
    "big": ("corpus", "tokenizer"),
    "judge": ("corpus",),
    "referee": ("corpus", "tokenizer"),
    "draft": ("corpus", "tokenizer", "big"),
    "expert": ("corpus", "tokenizer", "draft"),
    "anti": ("corpus", "tokenizer", "draft"),
    "lora_legal": ("corpus", "tokenizer", "big"),
    "judge_bert": ("corpus", "tokenizer"),
    "files": ("corpus", "tokenizer", "draft"),
    "network": ("corpus", "tokenizer", "draft"),
}
"""Artefact -> what it is made from, in an order that makes everything after its needs."""

ARTEFACTS = tuple(NEEDS)

DEMO = ("tokenizer", "big", "judge", "referee")
"""What `marith demo` needs."""


@dataclass(frozen=True)
class CorpusRecipe:
    """How much text is read and how it is divided (see `corpus`)."""

    characters: int = 1_500_000
    """At most this much of each attribute."""
    shares: tuple[tuple[str, float], ...] = (("A", 0.58), ("B1", 0.14), ("B2", 0.20), ("C", 0.08))
    """Part -> its share: A trains the language models, B1 the judge, B2 the referee, C is held out."""


@dataclass(frozen=True)
class TokenizerRecipe:
    """A byte-level BPE."""

    vocabulary: int = 2048
    characters: int = 450_000
    """Text of each attribute that the merges are learned from."""


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    hidden: int
    layers: int
    inner: int
    heads: int


@dataclass(frozen=True)
class Course:
    """One training run."""

    steps: int
    rows: int = 16
    """Rows of `length` tokens a step."""
    length: int = 128
    adam: float = 3e-3
    """Peak learning rate of AdamW (embeddings, norms; everything where `muon` is 0)."""
    muon: float = 0.02
    """Peak learning rate of Muon (the matrices)."""


@dataclass(frozen=True)
class LlamaRecipe:
    """A Llama trained from nothing."""

    shape: Shape
    course: Course


@dataclass(frozen=True)
class TuneRecipe:
    """A further training of an existing Llama on one attribute."""

    attribute: str
    course: Course
    rank: int = 0
    """Rank of a LoRA adapter; 0 trains all weights."""


@dataclass(frozen=True)
class TopicRecipe:
    """A further training of the draft on what is about one topic (see `topics`)."""

    topic: str
    course: Course


@dataclass(frozen=True)
class JudgeRecipe:
    """Multinomial logistic regression over hashed character n-grams."""

    buckets: int = 1 << 16
    lengths: tuple[int, ...] = (2, 3, 4)
    """Lengths of the n-grams in bytes; 3 must be among them."""
    snippets: int = 16_000
    epochs: int = 3
    rate: float = 0.2


@dataclass(frozen=True)
class BertRecipe:
    """A two-layer BERT that names the attribute of a prefix."""

    course: Course
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 256


@dataclass(frozen=True)
class Recipe:
    """The whole set; one field per artefact."""

    seed: int = 0
    corpus: CorpusRecipe = CorpusRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    big: LlamaRecipe = LlamaRecipe(Shape(192, 4, 512, 3), Course(steps=380))
    judge: JudgeRecipe = JudgeRecipe()
    referee: LlamaRecipe = LlamaRecipe(
        Shape(128, 3, 384, 2), Course(steps=380, rows=12, adam=8e-3, muon=0.03)
    )
    draft: LlamaRecipe = LlamaRecipe(Shape(96, 2, 256, 3), Course(steps=220))
    expert: TuneRecipe = TuneRecipe("legal", Course(steps=100, adam=1e-3, muon=0.005))
    anti: TuneRecipe = TuneRecipe("code", Course(steps=100, adam=1e-3, muon=0.005))
    lora_legal: TuneRecipe = TuneRecipe("legal", Course(steps=60, rows=12, adam=5e-3, muon=0.0), rank=8)
    judge_bert: BertRecipe = field(
        default=BertRecipe(Course(steps=600, rows=24, length=64, adam=1e-3, muon=0.0))
    )
    files: TopicRecipe = TopicRecipe("files", Course(steps=100, adam=1e-3, muon=0.005))
    network: TopicRecipe = TopicRecipe("network", Course(steps=100, adam=1e-3, muon=0.005))

    def fingerprint(self, name: str) -> str:
        """A short hash of everything that decides the artefact `name`, apart from the installation's text."""
        own = dataclasses.asdict(getattr(self, name))
        needs = [self.fingerprint(need) for need in NEEDS[name]]
        text = json.dumps([REVISIONS.get(name, 1), self.seed, name, own, needs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def seed_of(self, name: str) -> int:
        """An artefact's own seed, so that no two runs share their random choices."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:4])


RECIPE = Recipe()

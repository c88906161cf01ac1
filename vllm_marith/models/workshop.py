"""How each artefact is made from those before it.

A `make_*` method fills a folder and returns what it measured on held-out text (part C of the corpus).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import judge as judging
from .adapter import adapt, save_adapter
from .batches import Batches, Paragraphs
from .classifier import Prefixes, bert, prefix_accuracies, train_classifier
from .corpus import Corpus, CorpusError, build
from .loading import load_llama, load_tokenizer, quiet_transformers
from .progress import Tick
from .recipe import ATTRIBUTES, LlamaRecipe, Recipe, TopicRecipe, TuneRecipe
from .store import ModelsError, Paths
from .tokenizer import train_tokenizer
from .topics import about
from .training import llama, perplexities, train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Measured = dict[str, Any]

THREADS = 2
"""Sums are split by thread, so their number decides the last bits of the weights: fixed."""

HELD_OUT_LENGTH = 128


class Workshop:
    """Makes artefacts, keeping what several of them read."""

    def __init__(self, paths: Paths, recipe: Recipe) -> None:
        self.paths = paths
        self.recipe = recipe

    def make(self, name: str, folder: Path, tick: Tick) -> Measured:
        """Fill `folder` with the artefact `name`."""
        maker: Callable[[Path, Tick], Measured] = getattr(self, f"make_{name}")
        with _fixed_threads(), quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed_of(name))
            return maker(folder, tick)

    @cached_property
    def corpus(self) -> Corpus:
        return Corpus.load(self.paths.corpus)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return load_tokenizer(self.paths.tokenizer)

    def make_corpus(self, folder: Path, tick: Tick) -> Measured:
        try:
            corpus = build(self.recipe.corpus)
        except CorpusError as error:
            raise ModelsError(str(error)) from error
        corpus.save(folder)
        sizes = corpus.characters()
        totals = {a: sum(part[a] for part in sizes.values()) for a in ATTRIBUTES}
        return {"characters": totals, "characters_by_part": sizes}

    def make_tokenizer(self, folder: Path, tick: Tick) -> Measured:
        tokenizer = train_tokenizer(self.corpus, self.recipe.tokenizer, self.recipe.seed_of("tokenizer"))
        tokenizer.save_pretrained(folder)
        density = {}
        for attribute in ATTRIBUTES:
            texts = self.corpus.paragraphs("C", attribute)
            tokens = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False).input_ids))
            density[attribute] = round(sum(map(len, texts)) / tokens, 2)
        return {"characters_per_token": density}

    def make_big(self, folder: Path, tick: Tick) -> Measured:
        return self._train_llama("big", folder, tick, chat=True)

    def make_draft(self, folder: Path, tick: Tick) -> Measured:
        return self._train_llama("draft", folder, tick, chat=True, teacher=load_llama(self.paths.big))

    def make_referee(self, folder: Path, tick: Tick) -> Measured:
        return self._train_llama("referee", folder, tick, chat=False, part="B2")

    def make_expert(self, folder: Path, tick: Tick) -> Measured:
        return self._tune_draft("expert", folder, tick)

    def make_anti(self, folder: Path, tick: Tick) -> Measured:
        return self._tune_draft("anti", folder, tick)

    def make_files(self, folder: Path, tick: Tick) -> Measured:
        return self._tune_draft_on_topic("files", folder, tick)

    def make_network(self, folder: Path, tick: Tick) -> Measured:
        return self._tune_draft_on_topic("network", folder, tick)

    def make_lora_legal(self, folder: Path, tick: Tick) -> Measured:
        recipe = self.recipe.lora_legal
        model = load_llama(self.paths.big)
        adapted = adapt(model, recipe.rank)
        loss = self._tune("lora_legal", model, recipe, tick)
        save_adapter(adapted, recipe.rank, "big", folder)
        return {"training_loss": round(loss, 3), "perplexity": self._held_out(model, chat=True)}

    def make_judge(self, folder: Path, tick: Tick) -> Measured:
        recipe, seed = self.recipe.judge, self.recipe.seed_of("judge")
        examples = judging.snippets(self.corpus.parts["B1"], recipe.snippets, seed)
        judge = judging.train_judge(examples, recipe, seed, tick)
        judge.save(folder)
        held_out = judging.snippets(self.corpus.parts["C"], 2000, seed + 1)
        return {"accuracy": judging.accuracies(judge, held_out)}

    def make_judge_bert(self, folder: Path, tick: Tick) -> Measured:
        recipe, seed = self.recipe.judge_bert, self.recipe.seed_of("judge_bert")

        def prefixes(part: str) -> Prefixes:
            texts = self.corpus.parts[part]
            return Prefixes({a: Paragraphs(self.tokenizer, texts[a], seed) for a in ATTRIBUTES}, seed)

        model = bert(len(self.tokenizer), recipe)
        train_classifier(model, prefixes("A"), recipe, tick)
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return {"accuracy_by_prefix": prefix_accuracies(model, prefixes("C"))}

    def _train_llama(
        self,
        name: str,
        folder: Path,
        tick: Tick,
        *,
        chat: bool,
        part: str = "A",
        teacher: LlamaForCausalLM | None = None,
    ) -> Measured:
        recipe: LlamaRecipe = getattr(self.recipe, name)
        model = llama(len(self.tokenizer), recipe.shape)
        batches = self._batches(part, self.recipe.seed_of(name), recipe.course.length, chat=chat)
        loss = train(model, batches, recipe.course, tick, teacher)
        return self._saved(model, folder, loss, chat=chat)

    def _tune_draft(self, name: str, folder: Path, tick: Tick) -> Measured:
        model = load_llama(self.paths.draft)
        loss = self._tune(name, model, getattr(self.recipe, name), tick)
        return self._saved(model, folder, loss, chat=True)

    def _tune_draft_on_topic(self, name: str, folder: Path, tick: Tick) -> Measured:
        """The draft, trained further on prose and code about one topic."""
        model = load_llama(self.paths.draft)
        recipe: TopicRecipe = getattr(self.recipe, name)
        texts = about(self.corpus.parts["A"], recipe.topic)
        if not texts:
            raise ModelsError(f"this Python installation has no text about the topic '{recipe.topic}'")
        batches = Batches(
            self.tokenizer,
            texts,
            self.recipe.seed_of(name),
            length=recipe.course.length,
            attributes=tuple(texts),
        )
        loss = train(model, batches, recipe.course, tick)
        return self._saved(model, folder, loss, chat=True)

    def _tune(self, name: str, model: LlamaForCausalLM, recipe: TuneRecipe, tick: Tick) -> float:
        """Train further on one attribute, in the chats that terms of a formula are asked in."""
        seed = self.recipe.seed_of(name)
        length = recipe.course.length
        batches = self._batches("A", seed, length, chat=True, attributes=(recipe.attribute,))
        return train(model, batches, recipe.course, tick)

    def _saved(self, model: LlamaForCausalLM, folder: Path, loss: float, *, chat: bool) -> Measured:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return {
            "parameters": model.num_parameters(),
            "training_loss": round(loss, 3),
            "perplexity": self._held_out(model, chat=chat),
        }

    def _held_out(self, model: LlamaForCausalLM, *, chat: bool) -> dict[str, float]:
        return perplexities(model, self._batches("C", 7, HELD_OUT_LENGTH, chat=chat))

    def _batches(self, part: str, seed: int, length: int, **kind: Any) -> Batches:
        return Batches(self.tokenizer, self.corpus.parts[part], seed, length=length, **kind)


@contextmanager
def _fixed_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)

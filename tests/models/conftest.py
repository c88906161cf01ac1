"""One tiny set of models for all tests here: every artefact, in seconds, good for nothing but tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_marith.models import Paths, Recipe, ensure, workshop
from vllm_marith.models.corpus import Corpus
from vllm_marith.models.recipe import (
    BertRecipe,
    CorpusRecipe,
    Course,
    JudgeRecipe,
    LlamaRecipe,
    Shape,
    TokenizerRecipe,
    TopicRecipe,
    TuneRecipe,
)

SHAPE = Shape(hidden=32, layers=1, inner=64, heads=2)


def course(**changed: Any) -> Course:
    return Course(**({"steps": 4, "rows": 4, "length": 48} | changed))


TINY = Recipe(
    corpus=CorpusRecipe(characters=150_000),
    tokenizer=TokenizerRecipe(vocabulary=512, characters=50_000),
    big=LlamaRecipe(SHAPE, course()),
    judge=JudgeRecipe(buckets=1 << 13, snippets=1200, epochs=3),
    referee=LlamaRecipe(SHAPE, course()),
    draft=LlamaRecipe(SHAPE, course()),
    expert=TuneRecipe("legal", course()),
    anti=TuneRecipe("code", course()),
    lora_legal=TuneRecipe("legal", course(muon=0.0), rank=2),
    judge_bert=BertRecipe(course(muon=0.0), hidden=32, layers=1, heads=2, inner=64),
    files=TopicRecipe("files", course()),
    network=TopicRecipe("network", course()),
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much on a busy machine."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workshop, "THREADS", 1)
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return TINY


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """All artefacts of the tiny recipe.  Tests read them and leave them alone."""
    return ensure(tmp_path_factory.mktemp("models"), progress=False, recipe=TINY)


@pytest.fixture(scope="session")
def corpus(made: Paths) -> Corpus:
    return Corpus.load(made.corpus)


@pytest.fixture
def begun(made: Paths, tmp_path: Path) -> Path:
    """A home of one's own that has the corpus and the tokenizer already."""
    import shutil

    for name in ("corpus", "tokenizer"):
        shutil.copytree(made.home / name, tmp_path / name)
    return tmp_path

"""A model that gives NaN for texts with one certain character, and right logits for all others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import exactness, tiny
from tests.support.workload import Job

CHARACTER = "§"
"""Two tokens, neither of which is in any other text of the tests."""


def token() -> int:
    return tiny.tokenizer().encode(CHARACTER, add_special_tokens=False)[-1]


@contextmanager
def poisoned(llm: Any) -> Iterator[None]:
    """The model of an in-process engine, until the end of the block."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    weights = runner.model.model.embed_tokens.weight.data
    kept = weights[token()].clone()
    weights[token()] = torch.nan
    try:
        yield
    finally:
        weights[token()] = kept
        llm.reset_prefix_cache()  # which remembers keys and values of NaN


def save(model: Path, path: Path) -> Path:
    """A copy of a model under `path`, poisoned for good."""
    shutil.copytree(model, path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token()] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def generate(llm: Any, jobs: Sequence[Job], asked: dict[str, Any]) -> list[list[exactness.Answer]]:
    """`exactness.generate` by a poisoned model."""
    with poisoned(llm):
        return exactness.generate(llm, jobs, asked)


def failed(llm: Any) -> dict[str, int]:
    """Requests that failed since they were counted last, by cause."""
    return dict(llm.llm_engine.engine_core.engine_core.scheduler.take_figures()["failed"])

"""Shared by all rooms' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import engines

engines.prepare_environment()
torch.set_num_threads(1)  # models this small lose more by sharing work than they win


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama; see `tests.support.tiny`."""
    from tests.support import tiny

    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")

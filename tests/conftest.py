"""Shared by all rooms' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import engines

engines.prepare_environment()
torch.set_num_threads(1)  # models this small lose more by sharing work than they win

# What passed once passes again, until a test or hypothesis changes.  `make test-random` looks elsewhere.
# No deadline for one example: on a busy machine it measures the other processes.
settings.register_profile("repeated", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("repeated")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--several", action="store_true", help="also tests that start several engines or nodes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--several"):
        for item in items:
            if item.get_closest_marker("several"):
                item.add_marker(pytest.mark.skip(reason="starts several engines: `make test-ray` runs it"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama; see `tests.support.tiny`."""
    from tests.support import tiny

    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")

"""Presets that the serving tests share, and a server of them around an engine that does not run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.support import api_server

STEER = """
description: Towards a child's words.
paper: arXiv 2311.14479
terms:
  child: {system: You are a child.}
  adult: {system: You are an adult.}
formula: child - 0.5*adult
"""


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """A folder with the presets `steer` and `plain`."""
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "steer.yaml").write_text(STEER)
    (folder / "plain.yaml").write_text("formula: base\n")
    return folder


@pytest.fixture
def client(presets: Path) -> TestClient:
    app = api_server.make_app(presets, adapters=("wizard",))
    asyncio.run(api_server.start(app))
    return api_server.client(app)

"""What the serving tests share: one real server, and a server's application around no engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from starlette.testclient import TestClient

from tests.support import api_server, server

PRESETS = Path(__file__).parents[2] / "configs" / "presets"

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
def http(presets: Path) -> TestClient:
    """Asks a server of these presets, which has the adapter `wizard`, too."""
    app = api_server.make_app(presets, adapters=("wizard",))
    asyncio.run(api_server.start(app))
    return api_server.client(app)


@pytest.fixture(scope="session")
def served_presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The presets folder of the real server: those that come with us."""
    return shutil.copytree(PRESETS, tmp_path_factory.mktemp("served") / "presets")


@pytest.fixture(scope="session")
def url(tiny_model: Path, served_presets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server, in its ordinary processes."""
    log = tmp_path_factory.mktemp("server") / "log"
    tools = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with server.serve(tiny_model, log, {"presets": str(served_presets)}, *tools) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> openai.OpenAI:
    """The unmodified client of that server."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)

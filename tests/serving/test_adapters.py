"""Terms with adapters in a real server: named on the command line, loaded and unloaded while it runs."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import adapters, server
from tests.support.adapters import Job

TEXT = "the value of the expression"
LENGTH = 32
TERMS = {"wizard": {"adapter": "wizard"}, "bard": {"adapter": "bard", "system": "You are a bard."}}
FORMULA = "base + 0.7*(wizard - base) + 0.4*bard"


@pytest.fixture(scope="module")
def paths(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    names = enumerate(("wizard", "bard"))
    return {name: str(adapters.make(tiny_model, folder / name, seed=seed)) for seed, name in names}


@pytest.fixture(scope="module")
def models(tiny_model: Path, paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("merged")
    merged = {n: str(adapters.merge(tiny_model, Path(p), folder / n)) for n, p in paths.items()}
    return {"base": str(tiny_model), **merged}


@pytest.fixture(scope="module")
def lora_url(
    tiny_model: Path, paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A server that knows the wizard from its start."""
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"wizard={paths['wizard']}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with server.serve(tiny_model, log, None, *options) as url:
            yield url


def ask(url: str, formula: str, model: str = "tiny", **asked: Any) -> Any:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    value = json.dumps({"formula": formula, "terms": TERMS})
    extra = {"vllm_xargs": {"marith": value}, "ignore_eos": True, "return_token_ids": True}
    asked = {"max_tokens": LENGTH, "temperature": 0, "prompt": TEXT} | asked
    return client.completions.create(model=model, extra_body=extra, **asked)


def post(url: str, route: str, **body: Any) -> None:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/{route}", data, headers)) as answer:
        assert answer.status == 200


def greedy(models: dict[str, str], formula: str, own: str | None = None, length: int = LENGTH) -> list[int]:
    return adapters.expected(models, Job(TEXT, formula, TERMS, own), length).tokens


def test_adapters_come_and_go(lora_url: str, paths: dict[str, str], models: dict[str, str]) -> None:
    known = "base + 0.7*(wizard - base)"
    assert ask(lora_url, known).choices[0].token_ids == greedy(models, known)
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(lora_url, FORMULA, stream=stream)
        assert "term 'bard': there is no adapter 'bard'; adapters here: 'wizard'" in str(caught.value)

    post(lora_url, "load_lora_adapter", lora_name="bard", lora_path=paths["bard"])
    answer = ask(lora_url, FORMULA)
    assert answer.choices[0].token_ids == greedy(models, FORMULA)
    assert answer.model == "tiny"

    # What was accepted goes on when the name is taken away.
    length = 200
    stream = ask(lora_url, FORMULA, stream=True, max_tokens=length)
    tokens = list(next(stream).choices[0].token_ids or [])
    post(lora_url, "unload_lora_adapter", lora_name="bard")
    with pytest.raises(openai.BadRequestError, match="no adapter 'bard'"):
        ask(lora_url, FORMULA)
    for chunk in stream:
        tokens += [token for choice in chunk.choices for token in choice.token_ids or []]
    assert tokens == greedy(models, FORMULA, length=length)


def test_a_request_to_an_adapter(lora_url: str, models: dict[str, str]) -> None:
    """Terms without an adapter mean the one that the request is to."""
    formula = "base + wizard"
    answer = ask(lora_url, formula, model="wizard")
    assert answer.model == "wizard"
    assert answer.choices[0].token_ids == greedy(models, formula, own="wizard")
    assert answer.choices[0].token_ids == greedy(models, "wizard")

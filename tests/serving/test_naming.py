"""Presets as model names, in vLLM's own application around an engine that does not run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support import api_server


def ask(http: TestClient, model: str | None, value: Any = None) -> Any:
    body: dict[str, Any] = {"prompt": "x"} | ({"model": model} if model else {})
    if value is not None:
        body["vllm_xargs"] = {"marith": value, "other": 1}
    return http.post("/v1/completions", json=body)


def test_presets_are_listed_after_the_models(http: TestClient) -> None:
    listed = http.get("/v1/models").json()["data"]
    assert listed[0]["id"] == "tiny"
    cards = {model["id"]: model for model in listed}
    assert cards.keys() >= {"tiny", "steer", "plain"}
    assert cards["steer"]["parent"] == "tiny"
    assert cards["steer"]["max_model_len"] == 512
    assert cards["tiny"]["parent"] is None


def test_a_preset_is_the_base_model_with_its_formula(http: TestClient) -> None:
    answer = ask(http, "steer").json()
    assert answer == {"model": "steer", "asked": "tiny", "vllm_xargs": {"marith": "steer"}}


@pytest.mark.parametrize("model", ["tiny", None])
def test_the_base_model_stays_plain(http: TestClient, model: str | None) -> None:
    assert ask(http, model).json() == {"model": "tiny", "asked": model, "vllm_xargs": None}
    own = ask(http, model, "child").json()["vllm_xargs"]
    assert own == {"marith": "child", "other": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"strength": 0.8}', {"parameters": {"strength": 0.8}}),
        ('{"a": 1, "b": -2}', {"parameters": {"a": 1, "b": -2}}),
        ('{"normalize": "none"}', {"normalize": "none"}),
        ('{"constraints": {"forbid": ["damn"]}}', {"constraints": {"forbid": ["damn"]}}),
        ("{}", {}),
    ],
)
def test_a_request_may_give_parameters(http: TestClient, value: str, expected: dict[str, Any]) -> None:
    xargs = ask(http, "steer", value).json()["vllm_xargs"]
    assert json.loads(xargs.pop("marith")) == {"formula": "steer", **expected}
    assert xargs == {"other": 1}


@pytest.mark.parametrize(
    "value", ["child", '{"formula": "child"}', '{"strength"', "[1]", "3", 7, ["steer"], "{" * 100_000]
)
def test_anything_else_is_refused(http: TestClient, value: Any) -> None:
    answer = ask(http, "steer", value)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "the model 'steer' is a formula already" in message
    assert "ask the model 'tiny'" in message


def test_unknown_models_and_adapters_are_vllms(http: TestClient) -> None:
    assert ask(http, "nobody").json()["error"]["code"] == 404
    assert ask(http, "wizard").json()["model"] == "wizard"


def test_an_adapter_loaded_later_is_served_under_its_name(http: TestClient) -> None:
    http.app.state.openai_serving_models.lora_requests["steer"] = api_server.adapter("steer")
    assert ask(http, "steer").json() == {"model": "steer", "asked": "steer", "vllm_xargs": None}


def test_every_request_has_its_own_name(http: TestClient) -> None:
    """The name of one request's model does not stick to the next on the same connection."""
    names = ["steer", "tiny", "plain", None, "steer"]
    assert [ask(http, name).json()["model"] for name in names] == [
        "steer",
        "tiny",
        "plain",
        "tiny",
        "steer",
    ]


def test_the_cost_is_in_the_headers(http: TestClient) -> None:
    headers = ask(http, "steer").headers
    assert headers["x-marith-members"] == "2"
    assert headers["x-marith-prompt-tokens"] == "8"
    assert "x-marith-members" not in ask(http, "tiny").headers


@pytest.mark.parametrize(
    ("served", "adapters", "what"),
    [(["other", "steer"], [], "the served model"), (["tiny"], ["steer"], "a LoRA adapter")],
)
def test_names_that_are_taken(presets: Path, served: list[str], adapters: list[str], what: str) -> None:
    from vllm_marith.language import Presets
    from vllm_marith.serving.naming import check_names

    loaded = Presets.load(presets)
    check_names(loaded, ["tiny"], ["wizard"])
    with pytest.raises(ValueError, match=f"the preset 'steer' has the name of {what}"):
        check_names(loaded, served, adapters)


def test_an_adapter_with_a_presets_name_stops_the_server(presets: Path) -> None:
    app = api_server.make_app(presets, adapters=("steer",))
    with pytest.raises(SystemExit, match="marith: the preset 'steer' has the name of a LoRA adapter"):
        asyncio.run(api_server.start(app))

"""The routes under /v1/marith, in vLLM's own application around an engine that does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support import api_server
from vllm_marith import Formula
from vllm_marith.serving.routes import without_folders

TERMS = {"a": {"system": "A."}, "b": {"prompt": "B: {input}"}}


def test_formulas_tells_every_preset(http: TestClient) -> None:
    found = {preset["name"]: preset for preset in http.get("/v1/marith/formulas").json()["data"]}
    assert found.keys() == {"steer", "plain"}
    assert found["steer"]["formula"] == "child - 0.5*adult"
    assert found["steer"]["normalize"] == "sum"
    assert found["steer"]["terms"] == {
        "child": {"system": "You are a child."},
        "adult": {"system": "You are an adult."},
    }
    assert "Towards a child's words." in found["steer"]["description"]
    assert found["plain"]["terms"] == {"base": {}}


def explain(http: TestClient, body: Any) -> Any:
    return http.post("/v1/marith/explain", content=body if isinstance(body, str) else json.dumps(body))


def test_explain_is_the_commands_text_and_its_data(http: TestClient) -> None:
    answer = explain(http, {"formula": "2*a - b + union(a, b)", "terms": TERMS})
    assert answer.status_code == 200
    plan = answer.json()
    assert plan["text"] == Formula.parse("2*a - b + union(a, b)", TERMS).explain()
    assert plan["leader"] == "a"
    assert plan["rows"] == 2
    assert plan["linear"] is False
    assert plan["summands"] == [
        {"weight": 2.0, "of": "a"},
        {"weight": -1.0, "of": "b"},
        {"weight": 1.0, "of": "union(a, b)"},
    ]
    assert plan["terms"] == TERMS
    (stage,) = plan["stages"]
    assert {step["op"] for step in stage["program"]} <= set(plan["text"].split())


def test_explain_knows_the_presets(http: TestClient) -> None:
    plan = explain(http, {"formula": "steer + child"}).json()
    assert plan["terms"].keys() == {"child", "adult"}


@pytest.mark.parametrize(
    ("body", "sentence", "place"),
    [
        (
            {"formula": "a - *b", "terms": TERMS},
            "marith: expected a term or a number at column 5\n  a - *b\n      ^",
            {"text": "a - *b", "position": 4},
        ),
        ({"formula": "a - 2*b", "terms": TERMS}, "weights", {}),
        ({"formula": "nobody"}, "'nobody' is not defined", {"text": "nobody", "position": 0}),
        ({"formula": "steer", "extra": 1}, "extra", {}),
        ("steer", "expected a JSON object", {}),
        ('{"formula"', "not valid JSON", {}),
        ("", "expected a JSON object", {}),
        ("[" * 100_000, "expected a JSON object", {}),
    ],
)
def test_explain_says_what_is_wrong(http: TestClient, body: Any, sentence: str, place: Any) -> None:
    answer = explain(http, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error["code"] == 400
    assert {key: error[key] for key in place} == place


def test_explain_takes_only_text(http: TestClient) -> None:
    assert http.post("/v1/marith/explain", content=b"\xff{").status_code == 400


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/marith/formulas"),
        ("POST", "/v1/marith/explain"),
        ("POST", "/v1/marith/reload"),
    ],
)
def test_routes_are_behind_the_api_key(http: TestClient, method: str, path: str) -> None:
    for key in (None, "wrong"):
        assert api_server.client(http.app, key).request(method, path).status_code == 401


@pytest.mark.parametrize(
    ("folders", "sentence", "shown"),
    [
        (["/srv/p"], "/srv/p/x.yaml:2: no", "x.yaml:2: no"),
        (["/srv/p/x.yaml"], "/srv/p/x.yaml:2: no", "x.yaml:2: no"),
        (["/srv/p"], "/srv/p: no such file", "p: no such file"),
        (
            ["/srv/p", "/srv/p/more"],
            "/srv/p/more/x.yaml:2: the term 'a' is defined differently in /srv/p/x.yaml; no",
            "more/x.yaml:2: the term 'a' is defined differently in p/x.yaml; no",
        ),
        (["a"], "a/x.yaml:2: expected a term or a number", "x.yaml:2: expected a term or a number"),
    ],
)
def test_clients_do_not_learn_where_presets_lie(folders: list[str], sentence: str, shown: str) -> None:
    assert without_folders(sentence, [Path(folder) for folder in folders]) == shown

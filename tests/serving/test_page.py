"""The page at /marith/: that it is one file, and that what it computes is right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support import api_server
from vllm_marith.serving.routes import PAGE

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="the page's own functions run in node")


def test_the_page_is_served_without_the_key_and_loads_nothing(http: TestClient) -> None:
    visitor = api_server.client(http.app, key=None)
    for path in ("/marith/", "/marith"):
        answer = visitor.get(path, follow_redirects=False)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(|\beval\b|innerHTML", answer.text)


def evaluate(expression: str) -> Any:
    """A JavaScript expression over the functions of the page that need no page."""
    script = (
        PAGE.read_text()
        .partition("<script>")[2]
        .partition("// ---------------------------------------------------------------- the page")[0]
    )
    ended = subprocess.run(
        ["node", "-e", f"{script}\nconsole.log(JSON.stringify({expression}))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@needs_node
def test_numbers_of_a_formula_become_sliders() -> None:
    found = evaluate("numbersIn('a1 - 0.6*b2 + 2*union(a1, .5*c) - (1 - x)*d')")
    assert [(number["name"], number["value"]) for number in found] == [
        ("b2", 0.6),
        ("union(…)", 2),
        ("c", 0.5),
        ("number", 1),
    ]
    assert evaluate("withNumber('a - 0.6*b + 2*c', 1, 1.25)") == "a - 0.6*b + 1.25*c"
    assert evaluate("withNumber('a', 3, 1)") == "a"


@needs_node
def test_the_page_and_the_terminal_name_the_same_winner() -> None:
    from vllm_marith.chat import winner

    for shares in (
        {"a": [-2, -4], "b": [4, 1]},
        {"a": [-4, -2], "b": [1, 2]},
        {"a": [-1, None], "b": [0, 0]},
        {"a": [None, -1], "b": [-1, -2]},
        {"a": [3, 1], "b": [2.5, 1], "c": [0, 1]},
    ):
        token = {
            "terms": {name: {"logprob": [0, 0], "contribution": share} for name, share in shares.items()}
        }
        found = evaluate(f"pushes({json.dumps(token)})")
        name, share = winner(token)
        assert found["winner"] == name
        assert found["share"] == pytest.approx(share)


@needs_node
def test_events_are_read_however_they_are_cut() -> None:
    text = "data: one\n\n: a comment\n\ndata: two\r\n\r\ndata: [DONE]\n\n"
    for size in (1, 2, 7, 100):
        pieces = json.dumps([text[i : i + size] for i in range(0, len(text), size)])
        feed = "const parse = eventParser(event => found.push(event));"
        run = f"(() => {{ const found = []; {feed} {pieces}.forEach(parse); return found; }})()"
        assert evaluate(run) == ["one", "two", "[DONE]"]


@needs_node
def test_requests() -> None:
    assert evaluate("requestOf(' ', '', {}, '')") is None
    assert evaluate("requestOf('a - b ', '', {}, '')") == {"formula": "a - b"}
    assert evaluate("requestOf('a', '{\"a\": {}}', {s: 0.5}, 'none')") == {
        "formula": "a",
        "terms": {"a": {}},
        "parameters": {"s": 0.5},
        "normalize": "none",
    }

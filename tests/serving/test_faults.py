"""What clients see when something breaks under a real server: who asked for it fails, all others go on."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import psutil
import pytest

from tests.support import poison, server

TEXT = "the value of the expression"
SECRET = "swordfish"
STEER = "terms: {child: {system: You are a child.}}\nformula: base - WEIGHT*child\n"
WAIT_SECONDS = 120


@dataclass
class Faulty:
    """A server whose model is poisoned, and that runs its worker in a process of its own."""

    url: str
    pid: int
    presets: Path
    log: Path

    def client(self) -> openai.OpenAI:
        url = f"{self.url}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT_SECONDS)

    def complete(self, formula: str | None = None, model: str = "tiny", **more: Any) -> str:
        """The greedy answer to `TEXT`."""
        asked: dict[str, Any] = dict(prompt=TEXT, max_tokens=24, temperature=0) | more
        return (
            self.client().completions.create(model=model, **asked, extra_body=body(formula)).choices[0].text
        )

    def failed(self, cause: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as page:
            text = page.read().decode()
        (found,) = re.findall(
            rf'^vllm_marith:requests_failed_total{{cause="{cause}".*}} (\S+)$', text, re.MULTILINE
        )
        return float(found)

    def processes(self) -> dict[str, psutil.Process]:
        """The server's, by the names that vLLM gives them."""
        children = psutil.Process(self.pid).children(recursive=True)
        return {" ".join(child.cmdline()) or child.name(): child for child in children}


def body(formula: str | None) -> dict[str, Any]:
    """Of a request whose terms hold a secret."""
    terms = {
        "child": {"system": f"You are a child. {SECRET}"},
        "sick": {"system": f"{SECRET} {poison.CHARACTER}"},
    }
    asked = {"formula": formula, "terms": terms}
    return {"ignore_eos": True} | ({"vllm_xargs": {"marith": json.dumps(asked)}} if formula else {})


@pytest.fixture(scope="module")
def faulty(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    presets, log = folder / "presets", folder / "log"
    presets.mkdir()
    (presets / "steer.yaml").write_text(STEER.replace("WEIGHT", "0.5"))
    model = poison.save(tiny_model, folder / "model")
    own_process = ["--distributed-executor-backend", "mp"]
    with server.serve_process(model, log, {"presets": str(presets)}, *own_process) as (url, pid):
        yield Faulty(url, pid, presets, log)


def test_nan_in_one_term_is_one_answer_500(faulty: Faulty) -> None:
    alone = {formula: faulty.complete(formula) for formula in (None, "base - 0.5*child")}
    before = faulty.failed("logits")

    def ask(i: int) -> Any:
        if i % 3:
            formula = list(alone)[i % 2]
            return faulty.complete(formula) == alone[formula]
        with pytest.raises(openai.InternalServerError) as failed:
            faulty.complete("2*base - union(sick, child)")
        assert failed.value.status_code == 500
        return "Traceback" not in str(failed.value)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(16))) == [True] * 16
    assert faulty.failed("logits") - before == 6

    with pytest.raises(openai.APIError, match="Internal server error"):
        for _ in faulty.client().completions.create(
            model="tiny", prompt=TEXT, max_tokens=24, stream=True, extra_body=body("base - 0.5*sick")
        ):
            pass
    assert faulty.failed("logits") - before == 7


def test_a_preset_replaced_in_flight(faulty: Faulty) -> None:
    """An answer goes on with the formula that it began with."""
    wanted = faulty.complete(model="steer", max_tokens=300)
    parts = []
    stream = faulty.client().completions.create(
        model="steer", prompt=TEXT, max_tokens=300, temperature=0, stream=True, extra_body=body(None)
    )
    for chunk in stream:
        parts.append(chunk.choices[0].text)
        if len(parts) == 5:
            (faulty.presets / "steer.yaml").write_text(STEER.replace("WEIGHT", "0.9"))
            request = urllib.request.Request(f"{faulty.url}/v1/marith/reload", method="POST")
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["data"][0]["parsed"] == "base - 0.9*child"
    assert "".join(parts) == wanted
    assert faulty.complete(model="steer", max_tokens=300) != wanted


def test_a_client_that_does_not_read(faulty: Faulty) -> None:
    """It holds up nobody, and finds its whole answer when it comes back."""
    wanted = faulty.complete("base - 0.5*child", max_tokens=200)
    asked = {"model": "tiny", "prompt": TEXT, "max_tokens": 200, "temperature": 0, "stream": True}
    sent = json.dumps(asked | body("base - 0.5*child"))
    place = urlsplit(faulty.url)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((place.hostname, place.port))
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(sent)}", "Connection: close", "", sent]
        slow.sendall("\r\n".join(head).encode())
        for _ in range(3):
            assert faulty.complete("base - 0.5*child", max_tokens=200) == wanted
        slow.settimeout(WAIT_SECONDS)
        received = b""
        while part := slow.recv(4096):
            received += part
    events = re.findall(rb"^data: (\{.*\})\r?$", received, re.MULTILINE)
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == wanted


def test_a_killed_worker_ends_every_answer_and_the_server(faulty: Faulty) -> None:
    """The last test of this server: nobody waits for ever, and an operator's supervisor sees it end."""
    (worker,) = [process for name, process in faulty.processes().items() if "Worker" in name]

    def ask(formula: str | None) -> str:
        """Answers until one breaks: the worker may be killed between two of them, or within one.

        Greedily: the poison might be drawn.
        """
        asked: dict[str, Any] = dict(prompt=TEXT, max_tokens=480, temperature=0, stream=True)
        try:
            while True:
                answer = faulty.client().completions.create(model="tiny", **asked, extra_body=body(formula))
                reason = None
                for chunk in answer:
                    started.add(formula)
                    reason = chunk.choices[0].finish_reason
                if reason != "length":
                    return "cut short"
        except Exception as error:  # a connection may break anywhere
            return type(error).__name__

    started: set[str | None] = set()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, formula) for formula in (None, "base - 0.5*child", "base - 0.4*child")]
        while len(started) < 3 and not any(answer.done() for answer in answers):
            time.sleep(0.01)
        before = [answer.result() for answer in answers if answer.done()]
        worker.kill()  # without which the others would go on
        ends = [answer.result(WAIT_SECONDS) for answer in answers]
    assert not before
    assert "cut short" not in ends
    psutil.wait_procs([psutil.Process(faulty.pid)] if psutil.pid_exists(faulty.pid) else [], WAIT_SECONDS)
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"{faulty.url}/v1/models", timeout=10)


def test_the_log_knows_no_secret(faulty: Faulty) -> None:
    """Not of any request above, and not in what vLLM wrote when it died."""
    log = faulty.log.read_text()
    assert "marith: request" in log
    assert SECRET not in log
    assert TEXT not in log
    assert "EngineDeadError" in log

"""Requests that mean the deployment and reach one replica of it.

Serve gives every request to some replica.  That is right for completions, and wrong where each server keeps
something of its own: its figures, its adapters.  The replica that is given such a request asks all of them,
itself included, and answers for all.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FIGURES = ("GET", "/metrics")
EVERYWHERE = {
    FIGURES,
    ("POST", "/v1/marith/reload"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
}
"""(method, path) of what every replica must hear."""

_HOP = {b"host", b"content-length", b"transfer-encoding", b"connection"}


@dataclass(frozen=True)
class Question:
    """An HTTP request as plain data, which goes from replica to replica."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What one replica says.

    Attributes:
        replica: its name in figures.
    """

    replica: str
    status: int
    kind: str
    body: bytes


async def answer(app: ASGIApp, replica: str, question: Question) -> Answer:
    """What `app`, a server in this process, says to the question."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica", timeout=None) as client:
        found = await client.request(
            question.method, question.path, headers=list(question.headers), content=question.body
        )
    return Answer(replica, found.status_code, found.headers.get("content-type", ""), found.content)


def together(question: Question, answers: Sequence[Answer]) -> Answer:
    """One answer for all: the first that is an error, or the first; figures are put side by side."""
    worst = max(answers, key=lambda found: (found.status >= 400, found.status >= 500))
    if (question.method, question.path) != FIGURES or worst.status >= 400:
        return worst if worst.status >= 400 else answers[0]
    return Answer("", 200, answers[0].kind, merged_figures(answers))


def merged_figures(answers: Iterable[Answer]) -> bytes:
    """Pages in Prometheus's text format as one, each sample with the label ``replica``."""
    families: dict[str, Metric] = {}
    for found in answers:
        for family in text_string_to_metric_families(found.body.decode()):
            whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            whole.samples += [
                sample._replace(labels={**sample.labels, "replica": found.replica})
                for sample in family.samples
            ]

    class Page(Collector):
        def collect(self) -> Iterator[Metric]:
            return iter(families.values())

    # A registry is asked for nothing but `collect`.
    page: Any = Page()
    return generate_latest(page)


class Everywhere:
    """An ASGI application that passes everything on to `app`, but what every replica must hear to `ask`."""

    def __init__(self, app: ASGIApp, ask: Callable[[Question], Awaitable[Sequence[Answer]]]) -> None:
        self.app = app
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"].rstrip("/")) not in EVERYWHERE:
            await self.app(scope, receive, send)
            return
        headers = tuple((name, value) for name, value in scope["headers"] if name.lower() not in _HOP)
        body = await _body(receive)
        question = Question(scope["method"], scope["path"].rstrip("/"), headers, body)
        try:
            found = together(question, await self._ask(question))
        except Exception as error:
            sentence = f"marith: not every replica answered ({type(error).__name__}); ask again"
            wrong = {"error": {"message": sentence, "type": "ServiceUnavailableError", "code": 503}}
            found = Answer("", 503, "application/json", json.dumps(wrong).encode())
        kind = [(b"content-type", found.kind.encode())] if found.kind else []
        length = (b"content-length", str(len(found.body)).encode())
        await send({"type": "http.response.start", "status": found.status, "headers": [*kind, length]})
        await send({"type": "http.response.body", "body": found.body})


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message: Message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)

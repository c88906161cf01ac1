"""Around every HTTP request: its cost and explanation into the answer, figures into ``/metrics``."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_marith.engine.frontend.account import ACCOUNT, Account, Explained

from .explanations import Explanation

MEMBERS = "x-marith-members"
PROMPT_TOKENS = "x-marith-prompt-tokens"

_EXPLAINED_PATHS = ("/v1/completions", "/v1/chat/completions")
_FETCH_SECONDS = 0.2
"""Least time between two fetches of a stream's explanation; each waits for a step of the engine."""


class FormulaMiddleware:
    """Pure ASGI, so that streams pass through as they are.

    A response to a formula carries two headers, also a stream's, before its first token:
    ``x-marith-members`` m and ``x-marith-prompt-tokens`` p.  With the answer's usage they give the tokens
    that the engine really computed, p + m * completion_tokens, prefix cache aside.

    Args:
        refresh: brings the metrics up to date; called ahead of each scrape.
        explain: the explanation of a request that asked for one.
    """

    def __init__(
        self,
        app: ASGIApp,
        refresh: Callable[[], Awaitable[None]],
        explain: Callable[[Explained], Explanation],
    ) -> None:
        self.app = app
        self._refresh = refresh
        self._explain = explain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path.rstrip("/") == "/metrics":
            await self._refresh()
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return

        account = Account(explains=path in _EXPLAINED_PATHS)
        answer = _Answer(account, self._explain, send)
        token = ACCOUNT.set(account)
        try:
            await self.app(scope, receive, answer.send)
        finally:
            ACCOUNT.reset(token)


class _Answer:
    """One response on its way out."""

    def __init__(self, account: Account, explain: Callable[[Explained], Explanation], send: Send) -> None:
        self._account = account
        self._explain = explain
        self._send = send
        self._explanation: Explanation | None = None
        self._start: Message | None = None  # held back until the body's length is known
        self._body = b""
        self._fetched = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] != "http.response.body" or self._explanation is None:
            await self._send(message)
        elif self._start is not None:
            await self._whole(message)
        else:
            await self._part(message)

    async def _begin(self, message: Message) -> None:
        if self._account.members:
            headers = MutableHeaders(scope=message)
            headers[MEMBERS] = str(self._account.members)
            headers[PROMPT_TOKENS] = str(self._account.prompt_tokens)
        if self._account.explained is not None and message["status"] == 200:
            self._explanation = self._explain(self._account.explained)
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if not kind.startswith("text/event-stream"):
                self._start = message
                return
        await self._send(message)

    async def _whole(self, message: Message) -> None:
        """A JSON answer: the explanation becomes one of its keys."""
        assert self._explanation is not None
        assert self._start is not None
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        answer = json.loads(self._body)
        answer["marith"] = {"tokens": await self._explanation.more(last=True)}
        body = json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
        MutableHeaders(scope=self._start)["content-length"] = str(len(body))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": body})

    async def _part(self, message: Message) -> None:
        """A piece of a stream: explanations are events of their own, the last ahead of the end."""
        assert self._explanation is not None
        last = message.get("body", b"").startswith(b"data: [DONE]")
        if not last:
            await self._send(message)
        if last or time.monotonic() - self._fetched > _FETCH_SECONDS:
            tokens = await self._explanation.more(last)
            self._fetched = time.monotonic()
            if tokens:
                # Clients take a chunk without choices for one of usage, and look no further.
                event: dict[str, Any] = {"object": "marith.explanation", "choices": []}
                event["marith"] = {"tokens": tokens}
                body = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
        if last:
            self._explanation = None
            await self._send(message)

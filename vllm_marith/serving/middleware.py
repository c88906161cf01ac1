"""What happens around every HTTP request: its cost into the headers, fresh figures into ``/metrics``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_marith.engine.frontend.cost import COST, Cost

MEMBERS = "x-marith-members"
PROMPT_TOKENS = "x-marith-prompt-tokens"


class FormulaMiddleware:
    """Pure ASGI, so that streams pass through as they are.

    A response to a formula carries two headers, also a stream's, before its first token:
    ``x-marith-members`` m and ``x-marith-prompt-tokens`` p.  With the answer's usage they give the tokens
    that the engine really computed, p + m * completion_tokens, prefix cache aside.

    Args:
        refresh: brings the metrics up to date; called ahead of each scrape.
    """

    def __init__(self, app: ASGIApp, refresh: Callable[[], Awaitable[None]]) -> None:
        self.app = app
        self._refresh = refresh

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

        cost = Cost()

        async def send_with_cost(message: Message) -> None:
            if message["type"] == "http.response.start" and cost.members:
                headers = MutableHeaders(scope=message)
                headers[MEMBERS] = str(cost.members)
                headers[PROMPT_TOKENS] = str(cost.prompt_tokens)
            await send(message)

        token = COST.set(cost)
        try:
            await self.app(scope, receive, send_with_cost)
        finally:
            COST.reset(token)

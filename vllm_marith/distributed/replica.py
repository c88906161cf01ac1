"""One replica: vLLM's engine and its own HTTP application inside an actor of Ray Serve.

The application is the one that `vllm serve` builds, so presets as models, our routes, figures and page, API
keys and middleware are what they are there.  What a server process does around it, an actor does here:

- **Health.** An engine that has died ends the replica as soon as its last answers have gone out, and requests
  that still come are not answered: a replica that said it is ill would be sent requests until Serve has asked
  three times, and as the one that answers soonest, with an error, it would be sent most of them.
- **Presets** arrive in `user_config`, at the start and whenever it changes, without a restart.
- **What every replica must hear** goes to all: `vllm_marith.distributed.everywhere`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from types import SimpleNamespace
from typing import Any

from ray import serve
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

from vllm_marith.engine.plugin import ALIAS

from . import arguments as serve_arguments
from .everywhere import Answer, Everywhere, Question, answer
from .preset_files import PresetFolder

logger = init_logger("vllm.marith")

_LOOK_SECONDS = 0.1
_FAREWELL_SECONDS = 2.0
"""How long the error answers of a dead engine may take to leave before the replica ends."""


class Doorway:
    """An ASGI application that counts who is inside `app`, and lets nobody in any more when `is_shut()`."""

    def __init__(self, app: ASGIApp, is_shut: Callable[[], bool]) -> None:
        self.app = app
        self.inside = 0
        self._is_shut = is_shut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self._is_shut():
            await asyncio.Event().wait()  # until the process ends, which Serve tells the client
        self.inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1


class Replica:
    """The deployment's class; `vllm_marith.distributed.serve.build` makes a deployment of it.

    Args:
        arguments: as they stand behind `vllm serve`.
    """

    async def __init__(self, arguments: Sequence[str]) -> None:  # type: ignore[misc]  # Serve awaits it
        args = serve_arguments.parse(arguments)
        self._folder: PresetFolder | None = None
        if ALIAS in (args.logits_processors or ()) and not serve_arguments.settings_of(args).presets:
            self._folder = PresetFolder()
            args = serve_arguments.with_presets(args, [self._folder.path])
        self._life = AsyncExitStack()
        try:
            self._app, self._engine = await _start(args, self._life)
        except SystemExit as error:  # which ends a server, and would end an actor without a word
            raise RuntimeError(str(error)) from None
        self._doorway = Doorway(Everywhere(self._app, self._ask), lambda: self._engine.errored)
        self._watching = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._doorway

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Puts the presets of `user_config` in force: ``{"presets": {file name: contents}}``.

        Raises:
            ValueError: a file is wrong, and the presets stay as they were; or there is no place for them.
        """
        contents = user_config.get("presets", {})
        if self._folder is None:
            if contents:
                raise ValueError(
                    "presets in user_config, and in the arguments or no '--logits-processor marith'"
                )
            return
        before = self._folder.contents()
        self._folder.write(contents)
        try:
            self._app.state.marith_reloader.reload()
        except ValueError:
            self._folder.write(before)
            raise

    async def check_health(self) -> None:
        """Raises when the engine is dead."""
        await self._engine.check_health()

    async def answer(self, question: Question) -> Answer:
        """What this replica says to a question that goes to all."""
        return await answer(self._app, serve.get_replica_context().replica_tag, question)

    async def _ask(self, question: Question) -> list[Answer]:
        here = serve.get_replica_context()
        handle = serve.get_deployment_handle(here.deployment, here.app_name)
        found: list[Answer] = await handle.broadcast("answer", question).results_async()
        return found

    async def _watch(self) -> None:
        while not self._engine.errored:
            await asyncio.sleep(_LOOK_SECONDS)
        logger.error("marith: the engine is dead; this replica ends, and Serve starts another")
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                while self._doorway.inside:
                    await asyncio.sleep(_LOOK_SECONDS)
        logging.shutdown()
        os._exit(1)  # a Ray worker that is asked to end answers nothing for half a minute, and is still there

    async def __del__(self) -> None:
        if hasattr(self, "_watching"):
            self._watching.cancel()
            await self._life.aclose()
        if getattr(self, "_folder", None) is not None:
            self._folder.remove()  # type: ignore[union-attr]


async def _start(args: Any, life: AsyncExitStack) -> tuple[Any, Any]:
    """vLLM's application and engine, as `vllm serve` puts them together."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
    engine = await life.enter_async_context(build_async_engine_client(args))
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    # vLLM's handler of a dead engine's errors tells its HTTP server to end; `_watch` ends the replica.
    app.state.server = SimpleNamespace(should_exit=False)
    return app, engine

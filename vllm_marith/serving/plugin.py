"""The API server's side: an endpoint plugin of vLLM's, switched on by ``--logits-processor marith``.

vLLM loads endpoint plugins only where VLLM_PLUGINS names them, which would shut out every other plugin.
So `install` wraps the function that loads them, and adds this one; all the rest goes through the public
interface (`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`).
"""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from vllm_marith.engine import patches
from vllm_marith.engine.frontend import admission as admissions
from vllm_marith.engine.settings import Settings

from . import naming
from .explanations import Explainer, Explanation
from .metrics import Scraper, metrics
from .middleware import FormulaMiddleware
from .naming import check_names
from .reload import Reloader, forward_hangups, shared_bell
from .routes import router

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.config import VllmConfig

    from vllm_marith.engine.frontend.account import Explained

__all__ = ["FormulaEndpoints", "check_names", "install"]


def install(config: VllmConfig) -> None:
    """Adds routes and model names to the API server of this process; idempotent."""
    patches.patch("vllm.plugins:load_endpoint_plugins", _with_ours)
    naming.install()
    if config.parallel_config._api_process_rank < 0:  # the parent of several, which serves nothing itself
        forward_hangups()


def _with_ours(load_endpoint_plugins: Any) -> Any:
    @functools.wraps(load_endpoint_plugins)
    def loading(supported_tasks: Any = None) -> list[Any]:
        plugins: list[Any] = load_endpoint_plugins(supported_tasks)
        if "generate" in (supported_tasks or ()):
            plugins.append(FormulaEndpoints())
        return plugins

    return loading


class FormulaEndpoints:
    """One API server's routes and state; vLLM's `EndpointPlugin`."""

    name = "marith"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._scraper: Scraper | None = None
        self._explainer: Explainer | None = None
        self._listening: asyncio.Task[None] | None = None

    def attach_router(self, app: FastAPI) -> None:
        # Route by route: vLLM lets a plugin's route take the place of its own of the same path.
        app.router.routes.extend(router.routes)
        app.add_middleware(FormulaMiddleware, refresh=self._refresh, explain=self._explain)

    async def _refresh(self) -> None:
        if self._scraper is not None:
            await self._scraper.refresh()

    def _explain(self, explained: Explained) -> Explanation:
        assert self._explainer is not None  # vLLM accepts requests only once the state is there
        return self._explainer.of(explained)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Raises SystemExit with a sentence when a preset has the name of an adapter."""
        served = state.openai_serving_models
        admission = admissions.admission_of(engine_client.renderer)
        admission.adapters.models = served
        settings = Settings.of(engine_client.vllm_config)

        def names() -> tuple[list[str], list[str]]:
            return [model.name for model in served.base_model_paths], list(served.lora_requests)

        try:
            check_names(admission.presets, *names())
        except ValueError as error:
            raise SystemExit(f"marith: {error}") from None
        reloader = Reloader(admission, settings.load_presets, names, bell := shared_bell())
        state.marith_admission = admission
        state.marith_reloader = reloader
        self._scraper = Scraper(engine_client, metrics())
        self._explainer = Explainer(engine_client, engine_client.renderer.tokenizer)
        if metrics().refuse not in admissions.on_refusal:
            admissions.on_refusal.append(metrics().refuse)
        if bell is not None:
            self._listening = asyncio.create_task(reloader.listen())
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.on_signal)

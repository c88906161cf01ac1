"""vLLM's own HTTP application with our plugin attached, around an engine that does not run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from starlette.testclient import TestClient

API_KEY = "secret"


class FakeCore:
    """The engine core's client, which answers with what a test put into `answers`."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.calls: list[tuple[Any, ...]] = []

    async def call_utility_all_async(self, *call: Any) -> Any:
        self.calls.append(call)
        if not self.answers:
            raise RuntimeError("the engine is dead")
        return self.answers.pop(0)


class FakeTokenizer:
    """One letter a token; token 0 is half of a character."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        letters = "".join("?" if i == 0 else chr(96 + i) for i in ids)
        return letters.replace("??", "é").replace("?", "\ufffd")


class FakeEngineClient:
    """As much of vLLM's AsyncLLM as model table, admission and plugin look at."""

    def __init__(self, presets: Path | None) -> None:
        from vllm_marith.engine.plugin import PROCESSOR

        settings = {"presets": str(presets)} if presets else {}
        self.model_config = SimpleNamespace(model="tiny", max_model_len=512, logits_processors=[PROCESSOR])
        self.vllm_config = SimpleNamespace(
            additional_config={"marith": settings},
            model_config=self.model_config,
            lora_config=None,
            num_speculative_tokens=0,
        )
        self.renderer = SimpleNamespace(config=self.vllm_config, tokenizer=FakeTokenizer())
        self.input_processor = None
        self.engine_core = FakeCore()


def adapter(name: str) -> Any:
    """A LoRA adapter as vLLM's model table has it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, 1, f"/adapters/{name}")


def make_app(presets: Path | None, adapters: tuple[str, ...] = ()) -> FastAPI:
    """An application built as vLLM builds its own: routers, plugins, error handlers, middleware."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.models.api_router import attach_router
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router as attach_metrics
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

    from vllm_marith.engine.frontend.account import ACCOUNT
    from vllm_marith.serving import plugin

    plugin.install(SimpleNamespace(parallel_config=SimpleNamespace(_api_process_rank=0)))
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    attach_metrics(app)
    attach_router(app)
    engine = FakeEngineClient(presets)
    app.state.engine_client = engine
    served = OpenAIServingModels(engine, [BaseModelPath("tiny", "/models/tiny")])
    served.lora_requests = {name: adapter(name) for name in adapters}
    app.state.openai_serving_models = served
    serving = BaseServing(served, engine.model_config)

    @app.post("/v1/completions")
    async def completions(raw_request: Request) -> Any:
        """What vLLM's route does with a model's name; answers with what would go on to the engine."""
        request = CompletionRequest.model_validate(await raw_request.json())
        error = await serving._check_model(request)
        if error is not None:
            return error.model_dump()
        account = ACCOUNT.get()
        if account is not None and request.vllm_xargs and "marith" in request.vllm_xargs:
            account.add([3, 5])
        lora = served.lora_requests.get(request.model)
        return {
            "model": served.model_name(lora),
            "asked": request.model,
            "vllm_xargs": request.vllm_xargs,
        }

    attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    options: dict[str, Any] = {f"allowed_{what}": ["*"] for what in ("origins", "methods", "headers")}
    init_entrypoints_middleware(
        Namespace(
            **options,
            allow_credentials=False,
            api_key=[API_KEY],
            enable_request_id_headers=False,
            middleware=[],
        ),
        app,
        ("generate",),
    )
    return app


async def start(app: FastAPI) -> None:
    """What vLLM does with a plugin's state once its own is there."""
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

    await init_endpoint_plugins_state(app.state.engine_client, app.state, app.state.args)


def client(app: FastAPI, key: str | None = API_KEY) -> TestClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return TestClient(app, headers=headers, raise_server_exceptions=False)

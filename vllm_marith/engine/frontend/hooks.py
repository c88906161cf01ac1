"""Where requests are intercepted in the frontend process; every target stands in the ledger."""

from __future__ import annotations

import asyncio
import functools
import uuid
from typing import Any

from vllm.renderers.inputs.preprocess import parse_model_prompt

from vllm_marith.language.names import BASE

from .. import patches, speculation
from ..group import EXPLAIN, KEY
from ..plugin import PROCESSOR
from .account import ACCOUNT, Account, Explained
from .adapters import Adapters
from .admission import Admission, admission_of, refuse, refuse_grammar
from .source import SOURCE, Chat, Completion

_RENDERER = "vllm.renderers.base:BaseRenderer"
_ONLINE = "vllm.renderers.online_renderer:OnlineRenderer"
_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
_ASYNC_ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"


def install() -> None:
    """Wraps renderers and input processor; idempotent, once per frontend process."""
    patches.patch(f"{_RENDERER}.render_cmpl", _remember_completions)
    patches.patch(f"{_RENDERER}.render_cmpl_async", _remember_completions_async)
    patches.patch(f"{_RENDERER}.render_chat", _remember_chats)
    patches.patch(f"{_RENDERER}.render_chat_async", _remember_chats_async)
    patches.patch(f"{_ONLINE}.preprocess_cmpl", _admit_before_response)
    patches.patch(f"{_ONLINE}.preprocess_chat", _admit_before_response)
    patches.patch("vllm.v1.engine.input_processor:InputProcessor.process_inputs", _expand)
    patches.patch("vllm.sampling_params:SamplingParams._validate_spec_decode", _unless_only_formulas_draft)
    patches.patch(f"{_ENGINE}.add_lora", _noting_adapters)
    patches.patch(f"{_ENGINE}.remove_lora", _forgetting_adapters)
    patches.patch(f"{_ASYNC_ENGINE}.add_lora", _noting_adapters_async)
    patches.patch(f"{_ASYNC_ENGINE}.remove_lora", _forgetting_adapters_async)


def _unless_only_formulas_draft(validate_spec_decode: Any) -> Any:
    """vLLM refuses bias and min-p beside its own speculation, where formulas' drafts do know them."""

    @functools.wraps(validate_spec_decode)
    def validate(self: Any, speculative_config: Any) -> None:
        if not speculation.is_ours(speculative_config):
            validate_spec_decode(self, speculative_config)

    return validate


def _note_completions(renderer: Any, prompts: Any, tok_params: Any, rendered: Any) -> Any:
    tok_params = renderer.default_cmpl_tok_params if tok_params is None else tok_params
    for prompt, engine_input in zip(prompts, rendered, strict=True):
        if isinstance(prompt, dict):  # bytes are prompt embeddings
            engine_input[SOURCE] = Completion(prompt, tok_params)
    return rendered


def _remember_completions(render: Any) -> Any:
    @functools.wraps(render)
    def remembering(self: Any, prompts: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        return _note_completions(self, prompts, tok_params, render(self, prompts, tok_params, **kwargs))

    return remembering


def _remember_completions_async(render: Any) -> Any:
    @functools.wraps(render)
    async def remembering(self: Any, prompts: Any, tok_params: Any = None, **kwargs: Any) -> Any:
        rendered = await render(self, prompts, tok_params, **kwargs)
        return _note_completions(self, prompts, tok_params, rendered)

    return remembering


def _note_chats(renderer: Any, conversations: Any, params: Any, tok_params: Any, rendered: Any) -> Any:
    tok_params = renderer.default_chat_tok_params if tok_params is None else tok_params
    for messages, engine_input in zip(conversations, rendered[1], strict=True):
        engine_input[SOURCE] = Chat(messages, params, tok_params)
    return rendered


def _remember_chats(render: Any) -> Any:
    @functools.wraps(render)
    def remembering(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
    ) -> Any:
        rendered = render(self, conversations, chat_params, tok_params, **kwargs)
        return _note_chats(self, conversations, chat_params, tok_params, rendered)

    return remembering


def _remember_chats_async(render: Any) -> Any:
    @functools.wraps(render)
    async def remembering(
        self: Any, conversations: Any, chat_params: Any, tok_params: Any = None, **kwargs: Any
    ) -> Any:
        rendered = await render(self, conversations, chat_params, tok_params, **kwargs)
        return _note_chats(self, conversations, chat_params, tok_params, rendered)

    return remembering


def _admit_before_response(preprocess: Any) -> Any:
    """Admits a server's request while it can still be answered with HTTP 400, streaming included."""

    @functools.wraps(preprocess)
    async def admitting(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        xargs = getattr(request, "vllm_xargs", None) or {}
        admission = admission_of(self.renderer)
        adapter = admission.adapters.known.get(getattr(request, "model", None) or "")
        value = xargs.get(KEY)
        generates = hasattr(request, "vllm_xargs")  # others are about the base model's text
        if value is None and generates and adapter is None:
            value = admission.settings.default_preset
        account = ACCOUNT.get()
        if value is not None and getattr(request, "use_beam_search", False):
            refuse("beam search cannot be combined with a formula")
        explain = bool(xargs.get(EXPLAIN))
        if value is None and explain:
            refuse("there is no formula whose tokens could be explained")
        rendered = await preprocess(self, request, *args, **kwargs)
        if value is None:
            return rendered
        engine_inputs = rendered[1] if isinstance(rendered, tuple) else rendered
        max_tokens = getattr(request, "max_completion_tokens", None) or getattr(request, "max_tokens", None)
        scored = getattr(request, "prompt_logprobs", None) is not None or (
            bool(getattr(request, "echo", False)) and bool(getattr(request, "logprobs", None))
        )
        seeded = getattr(request, "seed", None) is not None
        for engine_input in engine_inputs:
            # Rendering many terms takes a while; the event loop serves the others meanwhile.
            admit = functools.partial(admission.admit, seeded=seeded, explained=explain)
            admitted = await asyncio.get_running_loop().run_in_executor(
                self.renderer._executor, admit, engine_input, value, max_tokens, adapter, scored
            )
            if admitted.spec.constraints and _has_grammar(request):
                refuse_grammar()
            if account is not None:
                account.add([len(admitted.leader), *map(len, admitted.spec.prompts)])
            if admitted.explain:
                asking = _check_explainable(request, engine_inputs, account)
                if admitted.spec.constraints:
                    refuse(
                        "an answer with constraints cannot be explained: some of its tokens are taken back"
                    )
                engine_input[EXPLAIN] = key = uuid.uuid4().hex
                asking.explained = Explained(key, admitted.formula, admitted.member_of)
        return rendered

    return admitting


def _has_grammar(request: Any) -> bool:
    """Whether a request asks for structured output; what tools imply is seen when its parameters are made."""
    formatted = getattr(getattr(request, "response_format", None), "type", "text") != "text"
    return formatted or getattr(request, "structured_outputs", None) is not None


def _check_explainable(request: Any, engine_inputs: Any, account: Account | None) -> Account:
    if account is None or not account.explains:
        refuse("this route cannot explain its tokens; completions and chat can")
    if len(engine_inputs) > 1 or (getattr(request, "n", None) or 1) > 1:
        refuse("one answer at a time can be explained: one prompt and n = 1")
    return account


def _expand(process_inputs: Any) -> Any:
    @functools.wraps(process_inputs)
    def expanding(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        extra_args = getattr(params, "extra_args", None) or {}
        if PROCESSOR not in (self.model_config.logits_processors or ()):
            request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
            if KEY in extra_args:
                # Another engine of this process serves formulas; to this one the key means nothing.
                request.sampling_params.extra_args = {k: v for k, v in extra_args.items() if k != KEY}
            return request
        admission = admission_of(self.renderer)
        default = admission.settings.default_preset
        if KEY not in extra_args and default is None:
            request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
            _run_on_its_model(admission, request)
            return request
        if not isinstance(prompt, dict) or "type" not in prompt:
            # vLLM still renders raw prompts in here, out of our sight: do it before.
            tokenization = kwargs.pop("tokenization_kwargs", None) or {}
            tok_params = self.renderer.default_cmpl_tok_params.with_kwargs(**tokenization)
            (prompt,) = self.renderer.render_cmpl([parse_model_prompt(self.model_config, prompt)], tok_params)
        request = process_inputs(self, request_id, prompt, params, *args, **kwargs)
        if KEY not in extra_args:
            if request.lora_request is not None:
                _run_on_its_model(admission, request)
                return request
            request.sampling_params.extra_args = {**extra_args, KEY: default}
        admission.expand(request, prompt, params.max_tokens)
        return request

    return expanding


def _run_on_its_model(admission: Admission, request: Any) -> None:
    """Makes a plain request to an adapter of a constituent one with the formula `base`.

    That is the same distribution, and it runs where the adapter belongs.
    """
    if request.lora_request is None:
        return
    params = request.sampling_params
    if params is not None and admission.adapters.bases.of(request.lora_request):
        params.extra_args = {**(params.extra_args or {}), KEY: BASE}
        rendered = {"type": "token", "prompt_token_ids": request.prompt_token_ids}
        admission.expand(request, rendered, params.max_tokens)


def _adapters(engine: Any) -> Adapters | None:
    """What is known to an engine's formulas; None where it serves none."""
    if PROCESSOR not in (engine.model_config.logits_processors or ()):
        return None
    return admission_of(engine.renderer).adapters


def _noting_adapters(add_lora: Any) -> Any:
    @functools.wraps(add_lora)
    def noting(self: Any, lora_request: Any) -> Any:
        adapters = _adapters(self)
        if adapters is None:
            return add_lora(self, lora_request)
        adapters.assign(lora_request)
        added = add_lora(self, lora_request)
        adapters.add(lora_request)
        return added

    return noting


def _noting_adapters_async(add_lora: Any) -> Any:
    @functools.wraps(add_lora)
    async def noting(self: Any, lora_request: Any) -> Any:
        adapters = _adapters(self)
        if adapters is None:
            return await add_lora(self, lora_request)
        # Its configuration may have to be fetched; the event loop serves the others meanwhile.
        await asyncio.to_thread(adapters.assign, lora_request)
        added = await add_lora(self, lora_request)
        adapters.add(lora_request)
        return added

    return noting


def _forgetting_adapters(remove_lora: Any) -> Any:
    @functools.wraps(remove_lora)
    def forgetting(self: Any, lora_id: int) -> Any:
        if (adapters := _adapters(self)) is not None:
            adapters.remove(lora_id)
        return remove_lora(self, lora_id)

    return forgetting


def _forgetting_adapters_async(remove_lora: Any) -> Any:
    @functools.wraps(remove_lora)
    async def forgetting(self: Any, lora_id: int) -> Any:
        if (adapters := _adapters(self)) is not None:
            adapters.remove(lora_id)
        return await remove_lora(self, lora_id)

    return forgetting

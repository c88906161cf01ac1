"""The ledger's entries of the API server process: how we get in, admission, what a server adds."""

from __future__ import annotations

from .entry import Entry

ENTRIES: tuple[Entry, ...] = (
    Entry(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "`--logits-processor marith` must become a class name, and unsupported options must stop the start",
        "wraps",
        "an entry point group for named, opt-in logits processors",
        ("self", "usage_context"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_cmpl",
        "terms are rendered from the request's text, which the rendered prompt no longer holds",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "prompts", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_cmpl_async",
        "as render_cmpl, for the server",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "prompts", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_chat",
        "each term has its own system message, and the rendered prompt no longer holds the messages",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "conversations", "chat_params", "tok_params"),
    ),
    Entry(
        "vllm.renderers.base:BaseRenderer.render_chat_async",
        "as render_chat, for the server",
        "wraps",
        "rendered prompts that keep their source",
        ("self", "conversations", "chat_params", "tok_params"),
    ),
    Entry(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_cmpl",
        "a bad formula must be HTTP 400 before a stream starts",
        "wraps",
        "validate_params called before the response starts, with access to the rendered prompt",
        ("self", "request", "prompts"),
    ),
    Entry(
        "vllm.renderers.online_renderer:OnlineRenderer.preprocess_chat",
        "a bad formula must be HTTP 400 before a stream starts",
        "wraps",
        "validate_params called before the response starts, with access to the rendered prompt",
        ("self", "request", "messages"),
    ),
    Entry(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "every request passes here with tokenizer, configuration and a private copy of its parameters",
        "wraps",
        "a request-expansion hook for plugins",
        ("self", "request_id", "prompt", "params"),
    ),
    *(
        Entry(
            f"vllm.v1.engine.{engine}.{name}_lora",
            "in Python, terms name the adapters that the engine was given",
            "wraps",
            "an engine that lists its adapters by name",
            ("self", parameter),
        )
        for engine in ("llm_engine:LLMEngine", "async_llm:AsyncLLM")
        for name, parameter in (("add", "lora_request"), ("remove", "lora_id"))
    ),
    Entry(
        "vllm.lora.request:LoRARequest",
        "a follower has an adapter of its own, which travels as plain data",
        "reads",
        "a request-expansion hook for plugins",
        attributes=("lora_name", "lora_int_id", "lora_path", "base_model_name", "load_inplace"),
    ),
    Entry(
        "vllm.plugins:load_endpoint_plugins",
        "our routes are an endpoint plugin, which vLLM loads only where VLLM_PLUGINS names it",
        "wraps",
        "endpoint plugins that another option can switch on",
        ("supported_tasks",),
    ),
    Entry(
        "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        "a preset's name in `model` stands for the base model and the preset's formula",
        "wraps",
        "a public hook between a request and its model's name",
        ("self", "request"),
    ),
    Entry(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.model_name",
        "the answer carries the name that the client used",
        "wraps",
        "responses that repeat the request's model",
        ("self", "lora_request"),
    ),
    Entry(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
        "an adapter's base_model_name may be a constituent's, which vLLM forgets: no model that it serves",
        "wraps",
        "LoRA requests that keep their base_model_name",
        ("self", "request", "base_model_name"),
    ),
    Entry(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels",
        "the served names, beside which presets are listed, and the renderer that knows the presets",
        "reads",
        "a public hook between a request and its model's name",
        attributes=("base_model_paths", "lora_requests", "renderer", "model_config", "show_available_models"),
    ),
)

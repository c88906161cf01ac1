"""The ledger: every vLLM symbol that this plugin replaces or relies on beyond its public API.

Each entry says *what* is touched, *why*, *how*, and which upstream change would *remove* the need.
`missing` probes the installed vLLM for all of them without changing anything, and `patch` is the
only place that assigns to a vLLM symbol, so that nothing can be touched without standing here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SUPPORTED = ">=0.32,<0.33"
"""Range of vLLM releases that the suite has passed on."""


@dataclass(frozen=True)
class Entry:
    """One vLLM symbol.

    Attributes:
        target: ``module:qualified.name``.
        why: what we cannot do without it.
        how: ``wraps`` (called through, result kept or amended), ``overrides`` (a subclass's method)
            or ``reads`` (an attribute or method that we use as it is).
        removal: the upstream change that would make the entry unnecessary.
        parameters: names that the signature must accept, the first of which is ``self`` for methods;
            for a class, names that its instances are made with.
        runner: ``v1`` or ``v2``, the model runner that needs the entry; empty for both.
    """

    target: str
    why: str
    how: str
    removal: str
    parameters: tuple[str, ...] = ()
    runner: str = ""


_V2 = "vllm.v1.worker.gpu"
_V2_API = "a V2 logits hook ahead of the grammar mask, and one on the sampled tokens"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_SCHEDULER_API = "a scheduler plugin API with an all-or-none scheduling hook"

LEDGER: tuple[Entry, ...] = (
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
        Entry(f"{_SCHEDULER}.{name}", why, "overrides", _SCHEDULER_API, parameters)
        for name, why, parameters in (
            ("schedule", "a group's rows are ordered and reserved before each step", ("self",)),
            ("add_request", "a group is fanned out where its requests are scheduled", ("self", "request")),
            (
                "update_from_output",
                "followers end with their leader and stay invisible",
                ("self", "scheduler_output", "model_runner_output"),
            ),
            (
                "finish_requests",
                "an abort of the leader is an abort of the group",
                ("self", "request_ids", "finished_status"),
            ),
            (
                "_enqueue_waiting_request",
                "members wait as a group, and plain requests do not overtake it for ever",
                ("self", "request"),
            ),
            ("_free_request", "the end of a member is the end of its group", ("self", "request")),
            (
                "reset_prefix_cache",
                "groups in flight start again as a whole",
                ("self", "reset_running_requests", "reset_connector"),
            ),
            (
                "_preempt_request",
                "a preempted member waits with its whole group",
                ("self", "request", "timestamp", "drop_stale_output"),
            ),
            (
                "_reserve_prefill_lookahead",
                "a member is held one token short of its prompt until all members are",
                ("self", "request", "num_computed_tokens", "num_new_tokens"),
            ),
            (
                "_get_local_prefix_cache_hit",
                "a prefix-cache hit of all but one token leaves nothing to hold back",
                ("self", "request"),
            ),
            ("get_request_counts", "requests in our backlog are waiting requests", ("self",)),
        )
    ),
    *(
        Entry(f"{_SCHEDULER}.{name}", why, "reads", _SCHEDULER_API, parameters)
        for name, why, parameters in (
            ("_handle_blocked_waiting_request", "a leader's grammar comes first", ("self", "request")),
            ("_is_blocked_waiting_status", "a leader's grammar comes first", ("status",)),
            ("_holds_kv_blocks", "a streaming session keeps its place", ("request",)),
            ("_request_remaining_blocks", "blocks that a prompt still needs", ("self", "request")),
            ("_inflight_prefill_reserved_blocks", "blocks promised to running prefills", ("self",)),
        )
    ),
    Entry(
        "vllm.config.scheduler:SchedulerConfig.get_scheduler_cls",
        "our scheduler extends the one that vLLM chose",
        "reads",
        _SCHEDULER_API,
        ("self",),
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        "fusion must come before the grammar mask, penalties and raw log-probabilities",
        "wraps",
        "a logits hook ahead of the grammar mask",
        ("self", "grammar_output"),
        runner="v1",
    ),
    Entry(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        "followers receive their leader's token before anything reads it",
        "wraps",
        "a hook on the sampled token ids",
        ("self", "logits", "spec_decode_metadata"),
        runner="v1",
    ),
    Entry(
        "vllm.config.parallel:ParallelConfig",
        "a worker's hooks must be there before it loads its model",
        "reads",
        "logits processors that are made before the model state",
        ("worker_extension_cls",),
        runner="v2",
    ),
    Entry(
        f"{_V2}.model_states:resolve_model_state_cls",
        "the model state is asked for all that is particular to a model: ours extends the one vLLM chose",
        "wraps",
        "a model state class named by the configuration",
        ("vllm_config", "model"),
        runner="v2",
    ),
    *(
        Entry(f"{_V2}.model_states.interface:ModelState.{name}", why, "overrides", _V2_API, parameters, "v2")
        for name, why, parameters in (
            (
                "__init__",
                "the model's compute_logits is wrapped: fusion must come before the grammar mask",
                ("self", "vllm_config", "model", "encoder_cache", "device"),
            ),
            ("add_request", "who is a member of which group", ("self", "req_index", "new_req_data")),
            ("remove_request", "who is no longer a member", ("self", "req_id")),
            (
                "prepare_inputs",
                "the step's requests in the order of its rows",
                ("self", "input_batch", "req_states"),
            ),
            (
                "custom_sampler",
                "followers receive their leader's token before anything reads it",
                ("self", "sampler"),
            ),
        )
    ),
    *(
        Entry(f"{_V2}.{name}", why, "reads", _V2_API, parameters, "v2")
        for name, why, parameters in (
            (
                "input_batch:InputBatch",
                "which request sits in which row, and whether its prompt is complete",
                ("req_ids", "seq_lens_cpu_upper_bound", "prefill_len_np"),
            ),
            ("sample.output:SamplerOutput", "the tokens that are tied", ("sampled_token_ids",)),
            (
                "model_runner:GPUModelRunner.sample",
                "calls compute_logits, masks, and calls the sampler, in this order",
                ("self", "hidden_states", "input_batch", "grammar_output"),
            ),
            (
                "sample.logits_processor.interface:LogitsProcessor",
                "the registered class is one of these, too",
                ("vllm_config", "req_states"),
            ),
        )
    ),
)


def shield_llvmlite() -> None:
    """Lets vLLM start a second engine in a process that has numba loaded.

    On CPUs without Triton, ``vllm.triton_utils.dispatcher`` looks into the ``__dict__`` of every module
    attribute.  llvmlite's library handle answers any attribute with a wrapped C function, for
    ``__dict__`` too, and the look fails.  An empty dictionary there is what an object without
    attributes would answer.  Removal: llvmlite raising AttributeError for dunder names.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab.setdefault("__dict__", {})


def _resolve(target: str) -> tuple[Any, str, Any]:
    """(owner, attribute name, value) of a ledger target."""
    module, _, qualname = target.partition(":")
    owner: Any = import_module(module)
    *path, name = qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name, getattr(owner, name)


def missing(runner: str = "") -> Iterator[str]:
    """Sentences, one for each ledger entry that the installed vLLM does not satisfy.

    runner: ``v1`` or ``v2`` for what only this model runner needs, empty for what both need.
    """
    for entry in LEDGER:
        if entry.runner != runner:
            continue
        try:
            _, _, value = _resolve(entry.target)
        except (ImportError, AttributeError):
            yield f"{entry.target} is not there"
            continue
        accepted = inspect.signature(inspect.unwrap(value)).parameters
        lacking = [name for name in entry.parameters if name not in accepted]
        if lacking:
            yield f"{entry.target} takes no {', '.join(lacking)}"


def is_patched(target: str) -> bool:
    """Whether `patch` has replaced the target in this process."""
    return getattr(_resolve(target)[2], "_marith", False)


def patch(target: str, wrap: Callable[[Any], Any]) -> None:
    """Replaces a ledger target by ``wrap(original)``, once per process.

    Raises:
        KeyError: the target does not stand in the ledger as one that is wrapped.
    """
    if not any(entry.target == target and entry.how == "wraps" for entry in LEDGER):
        raise KeyError(f"{target} is not in the ledger of wrapped symbols")
    owner, name, original = _resolve(target)
    if getattr(original, "_marith", False):
        return
    wrapped = wrap(original)
    wrapped._marith = True
    setattr(owner, name, wrapped)

"""Admission: a request's formula becomes the plain data of a group, or HTTP 400.

Everything that a client can get wrong is found here, in the frontend process, before the engine
hears of the request: what the engine core receives is known to parse, to render and to fit.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import lru_cache
from typing import Any, NoReturn

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv

from vllm_marith.language import Formula, FormulaError, Term, parse_request
from vllm_marith.plan import Plan, lower

from ..group import KEY, GroupSpec
from ..settings import Settings
from .source import SOURCE

logger = init_logger(__name__)

_ADMITTED = "marith_admitted"
"""Key of an engine input that holds (formula text, leader's prompt, group), once rendered."""

Admitted = tuple[list[int], GroupSpec]


class Admission:
    """Admits the formulas of one server.  One instance per renderer, see `admission_of`."""

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer
        self.config = renderer.config
        settings = Settings.of(self.config)
        self.limits = settings.limits
        self.presets = settings.load_presets()
        self._compile = lru_cache(maxsize=1024)(self._compile_uncached)

    def admit(self, engine_input: MutableMapping[str, Any], value: Any, max_tokens: int | None) -> Admitted:
        """The leader's prompt and the group of a rendered request.

        Remembered in ``engine_input``: the server asks before a stream starts, the engine again.

        Args:
            engine_input: what vLLM's renderer returned.
            value: the client's ``vllm_xargs["marith"]``, whatever it is.
            max_tokens: tokens that the client asked for, None when it left that open.

        Raises:
            VLLMValidationError: HTTP 400, with a sentence.
        """
        remembered = engine_input.get(_ADMITTED)
        if remembered is not None and remembered[0] == value:
            return remembered[1]
        admitted = self._admit(engine_input, value, max_tokens)
        engine_input[_ADMITTED] = (value, admitted)
        return admitted

    def _admit(self, engine_input: MutableMapping[str, Any], value: Any, max_tokens: int | None) -> Admitted:
        try:
            formula, plan = self._compile(value) if isinstance(value, str) else self._compile_uncached(value)
        except FormulaError as error:
            refuse(str(error))
        if engine_input.get("type") != "token":
            refuse("formulas take text or token ids: no images, audio or prompt embeddings")

        prompts = [self._render(engine_input, name, formula.terms[name]) for name in plan.terms]
        members: dict[tuple[int, ...], int] = {}
        member_of = [members.setdefault(tuple(ids), len(members)) for ids in prompts]
        leader, *followers = map(list, members)
        instructions = [
            (op, member_of[term] if term >= 0 else term, weight) for op, term, weight in plan.instructions
        ]
        self._check_size([len(ids) for ids in members], max_tokens)
        return leader, GroupSpec(followers, instructions, plan.divide)

    def _compile_uncached(self, value: Any) -> tuple[Formula, Plan]:
        formula = parse_request(value, presets=self.presets, limits=self.limits)
        for name, term in formula.terms.items():
            for what in ("model", "adapter", "classifier"):
                if getattr(term, what) is not None:
                    raise FormulaError(
                        f"term '{name}' has its own {what}, which this version cannot serve yet: "
                        "terms may differ in system and prompt"
                    )
        return formula, lower(formula)

    def _render(self, engine_input: MutableMapping[str, Any], name: str, term: Term) -> list[int]:
        if term.system is None and term.prompt is None:
            return list(engine_input["prompt_token_ids"])
        source = engine_input.get(SOURCE)
        if source is None:
            refuse(f"term '{name}' cannot be rendered: this route does not go through vLLM's renderer")
        try:
            ids = source.render(self.renderer, term)
        except (ValueError, VLLMValidationError) as error:
            refuse(f"term '{name}': {error}")
        if not ids:
            refuse(f"term '{name}' renders to an empty prompt")
        return ids

    def _check_size(self, lengths: list[int], max_tokens: int | None) -> None:
        """Refuses a group that this engine could never hold."""
        config = self.config
        rows = config.scheduler_config.max_num_seqs
        if len(lengths) > rows:
            refuse(f"the formula has {len(lengths)} different terms; this server runs {rows} rows at most")
        context = config.model_config.max_model_len
        if max(lengths) >= context:
            refuse(f"the longest term's prompt has {max(lengths)} tokens; the model's context is {context}")
        total, limit = sum(lengths), self.limits.max_prompt_tokens
        if limit is not None and total > limit:
            refuse(f"the terms' prompts have {total} tokens together; this server accepts {limit}")
        room = self.room(lengths)
        wanted = 1 if max_tokens is None else min(max_tokens, context - max(lengths))
        if room is not None and room < wanted:
            fit = f"at most {room}" if room > 0 else "none"
            refuse(
                f"the {len(lengths)} terms' prompts of {total} tokens and max_tokens = {wanted} for each do "
                f"not fit the KV cache together; there is room for {fit}"
            )

    def room(self, lengths: list[int]) -> int | None:
        """Tokens that a group of these prompt lengths can generate in the whole KV cache."""
        cache, parallel = self.config.cache_config, self.config.parallel_config
        if not cache.num_gpu_blocks:
            return None
        # vLLM reports the sum over data-parallel engines; a group lives in one.  One block is reserved.
        blocks = cache.num_gpu_blocks // parallel.data_parallel_size - 1
        size = cache.block_size
        low, high = 0, self.config.model_config.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if sum(cdiv(length + middle, size) for length in lengths) <= blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def expand(self, request: Any, engine_input: MutableMapping[str, Any], max_tokens: int | None) -> None:
        """Puts the group into an ``EngineCoreRequest``, in place.

        The request's prompt becomes the leader's, and ``max_tokens`` is clamped to what the model's
        context and the KV cache leave for the longest term.

        Args:
            max_tokens: as in `admit`; the request's own are vLLM's default where the client left it open.

        Raises:
            VLLMValidationError: the formula, or a parameter that formulas do not work with.
        """
        params = request.sampling_params
        for refused, what in (
            (request.prompt_embeds is not None, "prompt embeddings"),
            (bool(request.mm_features), "images or audio"),
            (request.resumable, "streaming input sessions"),
            (params.prompt_logprobs is not None, "prompt log-probabilities"),
        ):
            if refused:
                refuse(f"{what} cannot be combined with a formula")
        leader, spec = self.admit(engine_input, params.extra_args[KEY], max_tokens)
        lengths = [len(leader), *map(len, spec.prompts)]
        limits = [params.max_tokens, self.config.model_config.max_model_len - max(lengths)]
        room = self.room(lengths)
        params.max_tokens = min([*limits, room] if room is not None else limits)
        params.extra_args = {**params.extra_args, KEY: spec.to_wire()}
        request.prompt_token_ids = leader


def admission_of(renderer: Any) -> Admission:
    """The renderer's `Admission`, made at the first call."""
    found = renderer.__dict__.get("marith_admission")
    if found is None:
        found = renderer.marith_admission = Admission(renderer)
    return found


class RefusedError(VLLMValidationError):
    """What vLLM turns into HTTP 400; its text is the sentence and nothing else."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"marith: {sentence}", parameter=KEY)

    def __str__(self) -> str:
        # vLLM would put the parameter's name behind the caret that ends a sentence on a formula.
        return str(self.args[0])


def refuse(sentence: str) -> NoReturn:
    """Raises `RefusedError`."""
    raise RefusedError(sentence)

"""Admission: a request's formula becomes the plain data of a group, or HTTP 400.

Everything that a client can get wrong is found here, in the frontend process, before the engine
hears of the request: what the engine core receives is known to parse, to render and to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, NoReturn

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.utils.math_utils import cdiv

from vllm_marith.language import Formula, FormulaError, Presets, Term
from vllm_marith.language.names import BASE
from vllm_marith.plan import Plan, encode

from ..classifiers import read_cards
from ..group import EXPLAIN, KEY, OWN_FORMULA, ClassifierTerm, GroupSpec
from ..settings import Settings
from ..speculation import slots_ahead
from .adapters import Adapters, to_wire
from .classifiers import classifier_term
from .compiler import Compiler
from .drafts import only_where_possible
from .source import SOURCE

logger = init_logger(__name__)

_ADMITTED = "marith_admitted"
"""Key of an engine input that holds what was asked for and its `Admitted`, once rendered."""


class Admitted(NamedTuple):
    """A rendered request's formula.

    Attributes:
        leader: token ids of the leader's prompt.
        spec: the group.
        formula: what it serves.
        member_of: term -> member of the group.
        adapter: what the leader runs with.
        explain: whether an explanation of its tokens is asked for.
    """

    leader: list[int]
    spec: GroupSpec
    formula: Formula
    member_of: dict[str, int]
    adapter: LoRARequest | None
    explain: bool


class Admission:
    """Admits the formulas of one server.  One instance per renderer, see `admission_of`."""

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer
        self.config = renderer.config
        self.settings = settings = Settings.of(self.config)
        self.limits = settings.limits
        self.cards = read_cards(settings.classifiers)
        self.adapters = Adapters(self.config)
        self.block_sizes = settings.block_sizes
        self.slots_ahead = slots_ahead(self.config)
        self.use(settings.load_presets())

    @property
    def presets(self) -> Presets:
        """The presets in force."""
        return self._compiler.presets

    def use(self, presets: Presets) -> None:
        """Puts other presets in force, all at once; requests that were admitted keep their formula."""
        self._compiler = Compiler(presets, self.settings, self.cards)

    def admit(
        self,
        engine_input: MutableMapping[str, Any],
        value: Any,
        max_tokens: int | None,
        adapter: LoRARequest | None = None,
        scored: bool = False,
        seeded: bool = False,
        explained: bool = False,
    ) -> Admitted:
        """The leader and the group of a rendered request.

        Remembered in ``engine_input``: the server asks before a stream starts, the engine again.

        Args:
            engine_input: what vLLM's renderer returned.
            value: the client's ``vllm_xargs["marith"]``, whatever it is.
            max_tokens: tokens that the client asked for, None when it left that open.
            adapter: the request's own, which terms without one run with.
            scored: the client asked for log-probabilities of its prompt.
            seeded: the client gave a seed.
            explained: the client asked for an explanation of its tokens other than in `value`.

        Raises:
            VLLMValidationError: HTTP 400, with a sentence.
        """
        asked = (value, adapter, scored, seeded)
        remembered = engine_input.get(_ADMITTED)
        if remembered is not None and remembered[0] == asked and remembered[1].explain >= explained:
            return remembered[1]
        admitted = self._admit(engine_input, *asked, max_tokens, explained)
        engine_input[_ADMITTED] = (asked, admitted)
        return admitted

    def _admit(
        self,
        engine_input: MutableMapping[str, Any],
        value: Any,
        adapter: LoRARequest | None,
        scored: bool,
        seeded: bool,
        max_tokens: int | None,
        explained: bool,
    ) -> Admitted:
        try:
            asked, plan, label, drafts = self._compiler(value)
            explained |= asked.explain
            drafts = only_where_possible(drafts, asked, scored=scored, explained=explained, seeded=seeded)
            if drafts:
                plan = drafts.plan
            terms = {name: asked.formula.terms[name] for name in plan.terms}
            runs_on = self.adapters.of_terms(terms, adapter)
        except FormulaError as error:
            refuse(str(error), "formula")
        if engine_input.get("type") != "token":
            refuse("formulas take text or token ids: no images, audio or prompt embeddings")

        formula = asked.formula
        prompts = [self._render(engine_input, name, term, scored) for name, term in terms.items()]
        if scored:
            if self.config.lora_config is not None:
                # vLLM puts the adapters of the step's sampled rows on the logits of the prompt's.
                refuse("log-probabilities of the prompt cannot be combined with --enable-lora")
            _check_scored(formula, plan, prompts)
        members: dict[tuple[int, LoRARequest | None, tuple[int, ...]], int] = {}
        keys = [(*where, tuple(ids)) for where, ids in zip(runs_on, prompts, strict=True)]
        member_of = [members.setdefault(key, len(members)) for key in keys]
        constituents = [model for model, _, _ in members]
        (leader, leaders_adapter), *followers = ((list(ids), adapter) for _, adapter, ids in members)
        self._check_size([len(ids) for _, _, ids in members], constituents, max_tokens)
        constraints = asked.constraints.to_dict() if asked.constraints else None
        if constraints and self.config.model_config.skip_tokenizer_init:
            refuse("constraints are on text, and this server has no tokenizer")
        if constraints and scored:
            refuse("constraints cannot be combined with prompt log-probabilities")
        spec = GroupSpec(
            [ids for ids, _ in followers],
            encode(plan, member_of),
            [self._classifier(engine_input, name, formula.terms[name]) for name in plan.classifiers],
            label,
            _names(terms, member_of, label) if self.settings.speculates else [],
            scored=scored,
            constraints=constraints,
            adapters=[to_wire(adapter) for _, adapter in followers],
            constituents=constituents if any(constituents) else [],
            **(drafts.of_group(member_of) if drafts else {}),
        )
        of_term = dict(zip(plan.terms, member_of, strict=True))
        return Admitted(leader, spec, formula, of_term, leaders_adapter, explained)

    def _render(
        self, engine_input: MutableMapping[str, Any], name: str, term: Term, scored: bool
    ) -> list[int]:
        if term.system is None and term.prompt is None:
            return list(engine_input["prompt_token_ids"])
        source = engine_input.get(SOURCE)
        if source is None:
            refuse(f"term '{name}' cannot be rendered: this route does not go through vLLM's renderer")
        try:
            # Scores compare the terms token by token, so all must have the tokens of the client's prompt.
            kept = list(engine_input["prompt_token_ids"]) if scored else None
            ids = source.render(self.renderer, term, kept)
        except (ValueError, VLLMValidationError) as error:
            refuse(f"term '{name}': {error}")
        if not ids:
            refuse(f"term '{name}' renders to an empty prompt")
        return ids

    def _classifier(self, engine_input: MutableMapping[str, Any], name: str, term: Term) -> ClassifierTerm:
        assert term.classifier is not None
        source = engine_input.get(SOURCE)
        if source is None:
            refuse(
                f"term '{name}' reads the request's text, and this route does not go through vLLM's renderer"
            )
        try:
            prefix = source.text(self.renderer, term)
        except ValueError as error:
            refuse(f"term '{name}': {error}")
        limit = self.limits.max_classifier_chars
        if len(prefix) > limit:
            refuse(
                f"term '{name}': its classifier would read {len(prefix)} characters in front of the answer; "
                f"this server accepts {limit}",
                "size",
            )
        return classifier_term(name, term, self.cards[term.classifier], prefix)

    def _check_size(self, lengths: list[int], constituents: list[int], max_tokens: int | None) -> None:
        """Refuses a group that this engine could never hold."""
        config = self.config
        rows = config.scheduler_config.max_num_seqs
        if len(lengths) > rows:
            refuse(
                f"the formula has {len(lengths)} different terms; this server runs {rows} rows at most",
                "size",
            )
        context = config.model_config.max_model_len
        if max(lengths) >= context:
            refuse(
                f"the longest term's prompt has {max(lengths)} tokens; the model's context is {context}",
                "size",
            )
        total, limit = sum(lengths), self.limits.max_prompt_tokens
        if limit is not None and total > limit:
            refuse(f"the terms' prompts have {total} tokens together; this server accepts {limit}", "size")
        room = self.room(lengths, constituents)
        wanted = 1 if max_tokens is None else min(max_tokens, context - max(lengths))
        if room is not None and room < wanted:
            fit = f"at most {room}" if room > 0 else "none"
            refuse(
                f"the {len(lengths)} terms' prompts of {total} tokens and max_tokens = {wanted} for each do "
                f"not fit the KV cache together; there is room for {fit}",
                "size",
            )

    def room(self, lengths: list[int], constituents: list[int]) -> int | None:
        """Tokens that a group of these prompt lengths, on these constituents, can generate in the whole KV
        cache."""
        cache, parallel = self.config.cache_config, self.config.parallel_config
        if not cache.num_gpu_blocks:
            return None
        # vLLM reports the sum over data-parallel engines; a group lives in one.  One block is reserved.
        blocks = cache.num_gpu_blocks // parallel.data_parallel_size - 1
        sizes = [self.block_sizes[j] if self.block_sizes else cache.block_size for j in constituents]

        def needed(num_generated: int) -> int:
            tokens = num_generated + self.slots_ahead
            return sum(cdiv(n + tokens, size) for n, size in zip(lengths, sizes, strict=True))

        low, high = 0, self.config.model_config.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            if needed(middle) <= blocks:
                low = middle
            else:
                high = middle - 1
        return low

    def expand(self, request: Any, engine_input: MutableMapping[str, Any], max_tokens: int | None) -> None:
        """Puts the group into an ``EngineCoreRequest``, in place.

        The request's prompt and adapter become the leader's, and ``max_tokens`` is clamped to what the
        model's context and the KV cache leave for the longest term.

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
            (params.prompt_logprob_token_ids is not None, "log-probabilities of chosen prompt tokens"),
        ):
            if refused:
                refuse(f"{what} cannot be combined with a formula")
        scored = params.prompt_logprobs is not None
        admitted = self.admit(
            engine_input,
            params.extra_args[KEY],
            max_tokens,
            request.lora_request,
            scored,
            seeded=params.seed is not None,
            explained=EXPLAIN in engine_input,
        )
        leader, spec = admitted.leader, admitted.spec
        if spec.constraints and params.structured_outputs is not None:
            refuse_grammar()
        if admitted.explain and EXPLAIN not in engine_input:
            refuse("only the server's completions and chat explain their tokens")
        lengths = [len(leader), *map(len, spec.prompts)]
        limits = [params.max_tokens, self.config.model_config.max_model_len - max(lengths)]
        room = self.room(lengths, spec.members)
        params.max_tokens = min([*limits, room] if room is not None else limits)
        spec = replace(spec, explain=engine_input.get(EXPLAIN, ""))
        if params.seed is not None or request.cache_salt:
            spec = spec.kept_apart()
        params.extra_args = {**params.extra_args, KEY: spec.to_wire()}
        request.prompt_token_ids = leader
        request.lora_request = admitted.adapter


def _names(terms: Mapping[str, Term], member_of: Sequence[int], label: str) -> list[str]:
    """What figures call each member: labels must be few, so that only the terms of presets have their own."""
    names: dict[int, str] = {}
    for (name, term), member in zip(terms.items(), member_of, strict=True):
        names.setdefault(member, name if label != OWN_FORMULA else term.model or BASE)
    return [names[member] for member in sorted(names)]


def _check_scored(formula: Formula, plan: Plan, prompts: list[list[int]]) -> None:
    """Refuses formulas that give the prompt's own tokens no probability.

    Token k of the client's prompt has one where every term's prompt ends with the whole of it: the terms then
    agree on what stands before the token but for their own beginnings.
    """
    if plan.dials or plan.classifiers:
        refuse(
            "log-probabilities of the prompt cannot be combined with schedules and classifiers, which speak "
            "of generated text",
            "unsupported",
        )
    leader = prompts[0]
    scored = len(leader) - 1  # the first token has no probability
    for name, ids in zip(plan.terms, prompts, strict=True):
        if len(ids) <= scored or ids[len(ids) - scored :] != leader[1:]:
            refuse(
                "log-probabilities of the prompt need a first term that is the request as it is, and others "
                f"that end with it; '{formula.leader}' and '{name}' are not so",
                "unsupported",
            )


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


Reason = Literal["formula", "size", "unsupported"]
"""What is wrong: the formula itself, its size, or something beside it that formulas do not go with."""

on_refusal: list[Callable[[Reason], None]] = []
"""Called with the reason of every refusal; for metrics."""


def refuse_grammar() -> NoReturn:
    """Raises `RefusedError` for constraints beside structured output."""
    refuse("constraints cannot be combined with structured output: a grammar takes no token back")


def refuse(sentence: str, reason: Reason = "unsupported") -> NoReturn:
    """Raises `RefusedError`."""
    for listener in on_refusal:
        listener(reason)
    raise RefusedError(sentence)

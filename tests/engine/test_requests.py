"""How a request becomes a group: rendering, refusals, aborts, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines, reference, tiny
from vllm_marith import Formula, Presets

PRESETS = Path(__file__).parents[2] / "configs" / "presets"
ROWS = 10
BLOCKS = 24  # 23 for requests: fewer than two prompts of the context's length need
LENGTH = 12
GREEDY: dict[str, Any] = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True)
TEXT = "The value of the expression is"
BOS = 1
Ids = dict[str, list[int]]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Any]:
    settings = {"presets": str(PRESETS), "limits": {"max_prompt_tokens": 600, "max_formula_chars": 500}}
    with engines.engine(
        tiny_model,
        max_num_seqs=ROWS,
        num_gpu_blocks_override=BLOCKS,
        additional_config={"marith": settings},
    ) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    """The module's engine, which each test leaves empty."""
    yield engine
    engines.assert_all_returned(engine)


@pytest.fixture
def groups(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The members' prompts of every group that comes to the scheduler from now on."""
    found = []
    backlog = engines.scheduler(llm).backlog
    push = backlog.push

    def noting(entry: Any) -> None:
        found.append([list(member.prompt_token_ids) for member in entry.members])
        push(entry)

    monkeypatch.setattr(backlog, "push", noting)
    return found


def ids_of(text: str) -> list[int]:
    return tiny.tokenizer()(text).input_ids


def chat_ids(*messages: tuple[str, str]) -> list[int]:
    conversation = [{"role": role, "content": content} for role, content in messages]
    text = tiny.tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tiny.tokenizer()(text, add_special_tokens=False).input_ids


def marith(value: Any, **asked: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(extra_args={"marith": value}, **{**GREEDY, **asked})


def assert_greedy(model: Path, output: Any, formula: Formula, prompts: Ids, length: int = LENGTH) -> None:
    (completion,) = output.outputs
    expected = reference.generate(str(model), formula, prompts, length)
    assert list(completion.token_ids) == expected.tokens
    assert output.prompt_token_ids == prompts[formula.leader]


# --------------------------------------------------------------------------------------------- rendering

TERMS = {
    "child": {"system": "You are a child."},
    "base": {},
    "magic": {"prompt": "Magic! {input} Do you believe in {input}?"},
    "fixed": {"prompt": "No input."},
    "braces": {"prompt": '{"role": {}, "text": {input}}'},
}
FORMULA = Formula.parse("2*child - 0.4*base + union(magic, fixed) + 0.2*braces", TERMS)


def test_text(llm: Any, tiny_model: Path, groups: list[Any]) -> None:
    prompts = {name: ids_of(term.render(TEXT)) for name, term in FORMULA.terms.items()}
    assert prompts["child"] == ids_of(f"You are a child.\n{TEXT}")
    assert prompts["magic"] == ids_of(f"Magic! {TEXT} Do you believe in {TEXT}?")
    assert prompts["braces"] == ids_of('{"role": {}, "text": ' + TEXT + "}")
    (output,) = llm.generate([TEXT], FORMULA.sampling_params(**GREEDY), use_tqdm=False)
    assert_greedy(tiny_model, output, FORMULA, prompts)
    assert groups == [[prompts[name] for name in FORMULA.terms]]


@pytest.mark.parametrize("with_bos", [True, False])
def test_token_ids(llm: Any, tiny_model: Path, groups: list[Any], with_bos: bool) -> None:
    """The client's ids are taken as they are, whatever tokenizing their text would give."""
    text = "ex" + "press" + "ion"
    inner = [i for part in ("ex", "press", "ion") for i in ids_of(part)[1:]]
    assert [BOS, *inner] != ids_of(text)
    ids = [BOS, *inner] if with_bos else inner

    def around(before: str, after: str = "") -> list[int]:
        return ids_of(before) + inner + ids_of(after)[1:]

    prompts = {
        "child": around("You are a child.\n"),
        "base": ids,
        "magic": around("Magic! ", " Do you believe in ") + inner + ids_of("?")[1:],
        "fixed": ids_of("No input."),
        "braces": around('{"role": {}, "text": ', "}"),
    }
    (output,) = llm.generate([{"prompt_token_ids": ids}], FORMULA.sampling_params(**GREEDY), use_tqdm=False)
    assert_greedy(tiny_model, output, FORMULA, prompts)
    assert groups == [[prompts[name] for name in FORMULA.terms]]


@pytest.mark.parametrize("system", ["plain", "nul \0 inside", "{input} and {braces}", "ünïcode ∪ 🙂", ""])
def test_systems_of_odd_characters(llm: Any, groups: list[Any], system: str) -> None:
    formula = Formula.parse("a + b", {"a": {}, "b": {"system": system}})
    before = ids_of(f"{system}\n")
    llm.generate([TEXT], formula.sampling_params(**GREEDY), use_tqdm=False)
    llm.generate([{"prompt_token_ids": ids_of(TEXT)}], formula.sampling_params(**GREEDY), use_tqdm=False)
    assert groups == [
        [ids_of(TEXT), ids_of(f"{system}\n{TEXT}")],
        [ids_of(TEXT), before + ids_of(TEXT)[1:]],
    ]


@pytest.mark.parametrize("prompt", [TEXT, {"prompt_token_ids": ids_of(TEXT)}], ids=["text", "ids"])
def test_one_bos(llm: Any, groups: list[Any], prompt: Any) -> None:
    """A template that spells the beginning of a sequence gets no second one."""
    formula = Formula.parse(
        "a + b + c", {"a": {"prompt": "<|bos|>So {input}"}, "b": {}, "c": {"system": "<|bos|>I"}}
    )
    llm.generate([prompt], formula.sampling_params(**GREEDY), use_tqdm=False)
    (members,) = groups
    assert [ids.count(BOS) for ids in members] == [1, 1, 1]
    assert [ids[0] for ids in members] == [BOS] * 3


CONVERSATION = [
    ("system", "You are brief."),
    ("user", "Who are you?"),
    ("assistant", "Me."),
    ("user", "Why?"),
]


def conversation(*messages: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


@pytest.mark.parametrize("has_system", [True, False])
def test_chat(llm: Any, tiny_model: Path, groups: list[Any], has_system: bool) -> None:
    terms = {
        "adult": {"system": "You are an adult."},
        "base": {},
        "magic": {"prompt": "Magic! {input} ({input})"},
    }
    formula = Formula.parse("2*adult - 0.4*base + union(base, magic)", terms)
    system, *others = CONVERSATION
    start = [system] if has_system else []
    prompts = {
        "adult": chat_ids(("system", "You are an adult."), *others),
        "base": chat_ids(*start, *others),
        "magic": chat_ids(*start, *others[:-1], ("user", "Magic! Why? (Why?)")),
    }
    (output,) = llm.chat(conversation(*start, *others), formula.sampling_params(**GREEDY), use_tqdm=False)
    assert_greedy(tiny_model, output, formula, prompts)
    assert groups == [list(prompts.values())]


def test_chat_of_parts_and_options(llm: Any, groups: list[Any]) -> None:
    """Every term is rendered with the request's own options for the chat template."""
    formula = Formula.parse("base + magic", {"base": {}, "magic": {"prompt": "Magic! {input}"}})
    parts = [{"type": "text", "text": "Who are"}, {"type": "text", "text": "you?"}]
    messages = [{"role": "user", "content": parts}]
    llm.chat(
        messages,
        formula.sampling_params(**GREEDY),
        add_generation_prompt=False,
        chat_template="{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
        chat_template_content_format="string",
        use_tqdm=False,
    )
    assert groups == [
        [
            tiny.tokenizer()(text, add_special_tokens=False).input_ids
            for text in ("Who are\nyou?<|end|>", "Magic! Who are\nyou?<|end|>")
        ]
    ]


def test_presets_by_name(llm: Any, tiny_model: Path, groups: list[Any]) -> None:
    presets = Presets.load(PRESETS)
    formula = presets.formulas["detox_union"]
    assert formula.leader == "base"
    prompts = {name: ids_of(term.render(TEXT)) for name, term in formula.terms.items()}
    (output,) = llm.generate([TEXT], marith("detox_union"), use_tqdm=False)
    assert_greedy(tiny_model, output, formula, prompts)

    formula = Formula.parse("1.5*formal - 0.5*base", {"formal": presets.terms["formal"], "base": {}})
    prompts = {name: ids_of(term.render(TEXT)) for name, term in formula.terms.items()}
    (output,) = llm.generate([TEXT], marith("1.5*formal - 0.5*base"), use_tqdm=False)
    assert_greedy(tiny_model, output, formula, prompts)
    assert len(groups) == 2


def test_several_requests_at_once(llm: Any, tiny_model: Path) -> None:
    """Formulas and plain requests in one call, in order, the callers' parameters untouched."""
    from vllm import SamplingParams

    formulas = [FORMULA, None, Formula.parse("a - 0.2*b", {"b": {"system": "No."}}), None]
    params = [f.sampling_params(**GREEDY) if f else SamplingParams(**GREEDY) for f in formulas]
    before = [json.dumps(p.extra_args) for p in params]
    texts = [TEXT, TEXT, "So", "What"]
    for _ in range(2):
        outputs = llm.generate(texts, params, use_tqdm=False)
        for text, formula, output in zip(texts, formulas, outputs, strict=True):
            formula = formula or Formula.parse("base")
            prompts = {name: ids_of(term.render(text)) for name, term in formula.terms.items()}
            assert_greedy(tiny_model, output, formula, prompts)
    assert [json.dumps(p.extra_args) for p in params] == before


# -------------------------------------------------------------------------------------------------- lengths


def test_the_longest_term_limits_the_length(llm: Any, tiny_model: Path) -> None:
    formula = Formula.parse("a - 0.2*b", {"b": {"system": "word " * 150}})
    prompts = {name: ids_of(term.render("So")) for name, term in formula.terms.items()}
    longest = max(map(len, prompts.values()))
    assert tiny.CONTEXT - 400 < longest < tiny.CONTEXT
    params = formula.sampling_params(temperature=0, max_tokens=400, ignore_eos=True)
    (output,) = llm.generate(["So"], params, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == tiny.CONTEXT - longest
    assert params.max_tokens == 400


@pytest.mark.parametrize("max_tokens", [None, 400])
def test_the_cache_limits_the_length_that_was_left_open(llm: Any, max_tokens: int | None) -> None:
    """Two rows of more than a context together; asked for, that many tokens are refused."""
    from vllm.exceptions import VLLMValidationError

    formula = Formula.parse("a - 0.2*b", {"b": {"system": "No."}})
    params = formula.sampling_params(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    if max_tokens is not None:
        with pytest.raises(VLLMValidationError, match=r"do not fit the KV cache together.*at most 3\d\d"):
            llm.generate([TEXT], params, use_tqdm=False)
        return
    (output,) = llm.generate([TEXT], params, use_tqdm=False)
    (completion,) = output.outputs
    assert completion.finish_reason == "length"
    rows = [len(ids_of(term.render(TEXT))) + len(completion.token_ids) for term in formula.terms.values()]
    used = sum(-(-row // engines.BLOCK_SIZE) for row in rows)
    assert used in (BLOCKS - 1, BLOCKS - 2)


# ------------------------------------------------------------------------------------------------- refusals


def of_terms(formula: str, **terms: Any) -> str:
    return json.dumps({"formula": formula, "terms": terms})


MANY = {f"t{i}": {"system": f"Number {i}."} for i in range(17)}
BIG = {f"b{i}": {"system": f"{i} words " * 60} for i in range(5)}

# What is sent, and the words that the answer must have.
REFUSED: dict[str, tuple[Any, str]] = {
    "empty": ("", "the formula is empty"),
    "blank": ("  \n ", "the formula is empty"),
    "unfinished": ("formal -", "expected a term or a number at column 9"),
    "no_operator": ("formal base", r"expected an operator \(\+ - \* /\)"),
    "lookalike": ("formal − base", "did you mean '-'"),
    "parenthesis": ("2*(formal + base", "this parenthesis is never closed"),
    "python": ("__import__('os').system('true')", "unknown function '__import__'"),
    "attribute": ("base.formal", "unexpected character"),
    "product": ("formal * base", "the product of two formulas has no meaning"),
    "divisor": ("base / formal", "can only be divided by a number"),
    "zero": ("base / 0", "cannot be divided by zero"),
    "unknown_term": ("base - formla", "'formla' is not defined.*did you mean 'formal'"),
    "unknown_function": ("untion(base, formal)", "unknown function 'untion'.*did you mean 'union'"),
    "operands": ("topk(base)", "topk takes one formula and 1 number, not 1 operands"),
    "reserved_name": (of_terms("base", mixture={}), "'mixture' is an operator"),
    "one_operand": ("union(base)", "union needs at least two operands"),
    "negative_weights": ("base - 2*formal", "sum to -1 .*normalize: none"),
    "weights_of_zero": ("base - formal", "sum to 0 "),
    "negative_for_some": ("union(2*base, formal) - 1.5*easy", "sum to as little as -0.5 for some tokens"),
    "huge_weight": ("base + 1e9*formal", "amplify log-probabilities"),
    "infinite": ("1e999*base", "the number is too large"),
    "too_long": ("base" + " + base" * 200, "the formula has 1404 characters; 500 is the most"),
    "too_deep": ("(" * 20 + "base" + ")" * 20, "nested more than 16 deep"),
    "too_many_terms": (of_terms(" + ".join(MANY), **MANY), "17 terms; 16 is the most"),
    "too_many_rows": (
        of_terms(" + ".join(list(MANY)[: ROWS + 1]), **dict(list(MANY.items())[: ROWS + 1])),
        f"the formula has 11 different terms; this server runs {ROWS} rows at most",
    ),
    "too_many_tokens": (of_terms(" + ".join(BIG), **BIG), r"tokens together; this server accepts 600"),
    "too_long_term": (of_terms("base + a", a={"system": "word " * 600}), "term 'a':.*(context|length)"),
    "bad_json": ('{"formula": "base",}', "is not valid JSON"),
    "json_of_list": ('{"formula": ["base"]}', "'formula' must be a string, not a list"),
    "no_formula": ('{"terms": {}}', "the key 'formula' is missing"),
    "unknown_key": (
        '{"formula": "base", "normalise": "sum"}',
        "unknown key 'normalise'.*did you mean 'normalize'",
    ),
    "twice": ('{"formula": "base", "formula": "formal"}', "the key 'formula' appears twice"),
    "nan": ('{"formula": "base", "terms": NaN}', "has NaN, which is no number"),
    "normalize": ('{"formula": "base", "normalize": "max"}', "'normalize' must be 'sum' or 'none'"),
    "terms_list": ('{"formula": "base", "terms": ["base"]}', "'terms' must be a mapping, not a list"),
    "term_text": (of_terms("a", a="You are."), "the term 'a'.*must be a mapping"),
    "term_key": (of_terms("a", a={"sytem": "You are."}), "unknown key 'sytem'.*did you mean 'system'"),
    "term_both": (
        of_terms("a", a={"system": "I", "prompt": "{input}"}),
        "either 'system' or 'prompt', not both",
    ),
    "term_name": (of_terms("base", **{"a-b": {}}), "cannot name a term"),
    "factor": (of_terms("a", a={"speculative_factor": 0}), "'speculative_factor' must be at least 1"),
    "model": (of_terms("base + a", a={"model": "small"}), "no model 'small'; its constituents are: none"),
    "path": (of_terms("base + a", a={"model": "/etc/passwd"}), "must be a name that the server knows"),
    "adapter": (
        of_terms("base + a", a={"adapter": "wizard"}),
        "term 'a' has an adapter, and this server runs without --enable-lora",
    ),
    "classifier": (
        of_terms("base + a", a={"classifier": "c"}),
        "term 'a': this server has no classifier 'c'; it knows: none",
    ),
    "number": (5, "must be a string, a formula or the JSON of one, not the number 5"),
    "null": (None, "must be a string, a formula or the JSON of one, not null"),
    "list": (["base"], "must be a string, a formula or the JSON of one, not a list"),
    "mapping": ({"formula": "base"}, "must be a string, a formula or the JSON of one, not a mapping"),
    "forged_group": (
        {"prompts": [[1, 2]], "routine": "{}"},
        "must be a string, a formula or the JSON of one, not a mapping",
    ),
}


def refused(llm: Any, words: str, prompt: Any, params: Any) -> None:
    """The request is refused with these words, nothing of it stays, and the engine serves the next one."""
    from vllm.exceptions import VLLMValidationError

    good = FORMULA.sampling_params(**{**GREEDY, "max_tokens": 2})
    (alone,) = llm.generate([TEXT], good, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match=f"(?s){words}") as caught:
        llm.generate([TEXT, prompt, TEXT], [good, params, good], use_tqdm=False)
    assert "Traceback" not in str(caught.value)
    (after,) = llm.generate([TEXT], good, use_tqdm=False)
    assert after.outputs[0].token_ids == alone.outputs[0].token_ids
    engines.assert_all_returned(llm)


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=list(REFUSED))
def test_refused_formulas(llm: Any, value: Any, words: str) -> None:
    refused(llm, words, TEXT, marith(value))


def test_refused_prompt_beyond_the_context(llm: Any) -> None:
    refused(llm, "longer than the maximum model length|maximum context length", "word " * 600, marith("base"))


def test_refused_prompt_that_leaves_no_room(llm: Any) -> None:
    ids = [BOS, *range(6, 6 + tiny.CONTEXT - 4)]
    refused(
        llm,
        "the longest term's prompt has .* tokens; the model's context is 512",
        {"prompt_token_ids": ids},
        marith("0.5*base + formal"),
    )


def test_refused_chat_without_a_user(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    messages = conversation(("system", "You are brief."))
    formula = Formula.parse("base + a", {"base": {}, "a": {"prompt": "{input}!"}})
    with pytest.raises(VLLMValidationError, match="term 'a': its prompt template needs a user message"):
        llm.chat(messages, formula.sampling_params(**GREEDY), use_tqdm=False)


# --------------------------------------------------------------------------------------------------- aborts

ABORTED = [
    (
        "So",
        Formula.parse(
            "a - 0.2*b + union(a, c)", {"a": {}, "b": {"system": "No."}, "c": {"system": "Yes. " * 9}}
        ),
    ),
    ("What is this", Formula.parse("1.5*a - 0.2*b", {"a": {"prompt": "Q: {input}"}, "b": {}})),
    ("Statements", Formula.parse("a + 0.3*intersection(b, a)", {"a": {}, "b": {"system": "Long. " * 20}})),
    ("Why", Formula.parse("base")),
]


def run(llm: Any, aborts: dict[int, list[str]], reset: tuple[int, ...] = ()) -> dict[str, Any]:
    """Serves ABORTED twice over; `aborts` says which requests end after which step.  Name -> last output."""
    engine = llm.llm_engine
    names = {}
    for i, (text, formula) in enumerate(ABORTED * 2):
        names[f"r{i}"] = engine.add_request(f"r{i}", text, formula.sampling_params(**GREEDY))
    found, step = {}, 0
    while True:
        if step in aborts:
            engine.abort_request([f"r{i}" for i in range(len(names)) if f"r{i}" in aborts[step]])
        if step in reset:
            assert engine.reset_prefix_cache(reset_running_requests=True)
        if not engine.has_unfinished_requests():
            return found
        found.update({output.request_id: output for output in engine.step() if output.finished})
        step += 1


def assert_served(model: Path, found: dict[str, Any]) -> None:
    for name, output in found.items():
        text, formula = ABORTED[int(name[1:]) % len(ABORTED)]
        prompts = {term: ids_of(t.render(text)) for term, t in formula.terms.items()}
        assert_greedy(model, output, formula, prompts)


@pytest.mark.parametrize(
    "aborts",
    [
        {0: ["r0"]},
        {1: ["r0", "r2"]},
        {2: ["r1"], 3: ["r4"], 4: ["r2", "r6"]},
        {5: ["r0"], 9: ["r5", "r7"], 11: ["r1"]},
    ],
    ids=["before_the_first_step", "in_prefill", "several", "late"],
)
def test_aborts_leave_the_others_alone(llm: Any, tiny_model: Path, aborts: dict[int, list[str]]) -> None:
    found = run(llm, aborts)
    gone = {name for names in aborts.values() for name in names}
    served = {name: output for name, output in found.items() if name not in gone}
    assert len(served) == 2 * len(ABORTED) - len(gone)
    assert_served(tiny_model, served)


@pytest.mark.parametrize("step", range(4))
def test_abort_of_everything(llm: Any, tiny_model: Path, step: int) -> None:
    run(llm, {step: [f"r{i}" for i in range(2 * len(ABORTED))]})
    refused(llm, "is not defined", TEXT, marith("nobody"))  # and the engine serves on


def test_abort_while_a_grammar_is_compiled(llm: Any, tiny_model: Path) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    engine = llm.llm_engine
    params = FORMULA.sampling_params(
        **GREEDY, structured_outputs=StructuredOutputsParams(regex="(a|b|c){1,200}(d|e){1,200}")
    )
    engine.add_request("grammar", TEXT, params)
    engine.abort_request(["grammar"])
    assert_served(tiny_model, run(llm, {}))


@pytest.mark.parametrize("steps", [(1,), (2, 3, 8), (4, 5, 6, 7)])
def test_reset_of_the_prefix_cache_in_flight(llm: Any, tiny_model: Path, steps: tuple[int, ...]) -> None:
    before = engines.scheduler(llm).figures.preempted
    found = run(llm, {}, reset=steps)
    assert engines.scheduler(llm).figures.preempted > before
    assert len(found) == 2 * len(ABORTED)
    assert_served(tiny_model, found)


def test_groups_of_one_name(llm: Any, tiny_model: Path) -> None:
    """A client may name its request like another one's follower."""
    engine = llm.llm_engine
    text, formula = ABORTED[0]
    prompts = {name: ids_of(term.render(text)) for name, term in formula.terms.items()}
    for name in ("x", "x+1", "x+1+1", "0_x"):
        engine.add_request(name, text, formula.sampling_params(**GREEDY))
    found = {}
    while engine.has_unfinished_requests():
        found.update({output.request_id: output for output in engine.step() if output.finished})
    assert set(found) == {"x", "x+1", "x+1+1", "0_x"}
    for output in found.values():
        assert_greedy(tiny_model, output, formula, prompts)


# ------------------------------------------------------------------------------------------------- settings


def test_an_id_may_come_back_with_another_formula(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: "00000000")
    engine = llm.llm_engine

    def logprob(formula: Formula) -> float:
        engine.add_request("same", TEXT, formula.sampling_params(temperature=0, max_tokens=1, logprobs=0))
        while engine.has_unfinished_requests():
            for output in engine.step():
                (step,) = output.outputs[0].logprobs
        return next(iter(step.values())).logprob

    plain, sharp = Formula.parse("base"), Formula.parse("4*base", normalize="none")
    assert logprob(plain) < logprob(sharp) - 0.01
    assert logprob(plain) < logprob(sharp) - 0.01


def other_scheduler() -> type:
    from vllm.v1.core.sched.scheduler import Scheduler

    class OtherScheduler(Scheduler):
        pass

    return OtherScheduler


def wrong_presets(folder: Path, text: str) -> dict[str, Any]:
    (folder / "wrong.yaml").write_text(text)
    return {"presets": str(folder)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"presetz": "x"}, r"additional_config: marith.presetz: .*known settings: .*presets"),
        ({"warmup": "perhaps"}, r"additional_config: marith.warmup: .*boolean"),
        ({"limits": {"max_terms": 0}}, r"marith.limits.max_terms: .*greater than or equal to 1"),
        ({"limits": {"max_term": 5}}, r"marith.limits.max_term: "),
        ({"presets": "no/such/folder"}, "no/such/folder: no such file or directory"),
        ("base", r"additional_config\['marith'\] must be an object, not str"),
        ("formula: base - nobody", r"wrong.yaml:1: 'nobody' is not defined"),
        ("terms:\n  a:\n    sytem: x", r"wrong.yaml:\d: .*unknown key 'sytem'"),
        ("formula: [", r"wrong.yaml:\d: not valid YAML"),
    ],
)
def test_wrong_settings_stop_the_start(tiny_model: Path, tmp_path: Path, settings: Any, words: str) -> None:
    if isinstance(settings, str) and settings != "base":
        settings = wrong_presets(tmp_path, settings)
    assert_start_refused(tiny_model, words, additional_config={"marith": settings})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            dict(speculative_config=dict(method="custom_class", model="a.B", num_speculative_tokens=2)),
            "--speculative-config: formulas cannot be drafted by the method 'custom_class'",
        ),
        (
            dict(
                speculative_config=dict(method="ngram", num_speculative_tokens=2),
                additional_config={"marith": {"speculative": "auto"}},
            ),
            "formulas draft .* or vLLM does .*, not both",
        ),
        (
            dict(scheduler_cls=other_scheduler),
            "--scheduler-cls .*OtherScheduler cannot be combined with formulas",
        ),
        (dict(runner="pooling"), "formulas need a model that generates text"),
        (dict(pipeline_parallel_size=2), "--pipeline-parallel-size must be 1"),
        (
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            r"--kv-transfer-config \(KV connectors\) cannot serve formulas",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_options_stop_the_start(tiny_model: Path, options: dict[str, Any], words: str) -> None:
    options = {name: value() if callable(value) else value for name, value in options.items()}
    assert_start_refused(tiny_model, words, **options)


def test_another_release_stops_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_marith.engine import patches

    monkeypatch.setattr(patches, "SUPPORTED", ">=99")
    assert_start_refused(tiny_model, "serves formulas with vLLM >=99; installed is ")


def test_a_changed_build_stops_the_start(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_marith.engine import patches

    for target, words in (
        ("vllm.outputs:Gone", "vllm.outputs:Gone is not there"),
        ("vllm.outputs:RequestOutput.add", "vllm.outputs:RequestOutput.add takes no tokens"),
    ):
        entry = patches.Entry(target, "", "reads", "", ("tokens",))
        monkeypatch.setattr(patches, "LEDGER", (entry,))
        assert_start_refused(tiny_model, f"differs .*from the supported .*: {words}")


def test_a_server_says_one_sentence(tiny_model: Path) -> None:
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    args = EngineArgs(
        model=str(tiny_model),
        logits_processors=["marith"],
        additional_config={"marith": {"presets": "no/such"}},
    )
    with pytest.raises(SystemExit, match=r"^marith: no/such: no such file or directory$"):
        args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def assert_start_refused(model: Path, words: str, **options: Any) -> None:
    from vllm_marith.engine.plugin import UnsupportedError

    with (
        pytest.raises(UnsupportedError, match=f"(?s){words}"),
        engines.engine(model, **options),
    ):
        pass

"""A real server in its ordinary processes, driven by the openai client."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import reference, server, tiny
from vllm_marith import Formula

PRESETS = Path(__file__).parents[2] / "configs" / "presets"
TEXT = "the value of the expression"
TERMS = {
    "child": {"system": "You are a child."},
    "adult": {"system": "You are an adult."},
    "magic": {"prompt": "Always talk about magic.\n{input}"},
}
FORMULA = "child - 0.6*adult + 2*union(child, magic)"


def request(formula: str = FORMULA, **other: Any) -> dict[str, Any]:
    """The openai client's way to say vLLM's extra arguments."""
    return {"vllm_xargs": {"marith": json.dumps({"formula": formula, "terms": TERMS} | other)}}


def metric(url: str, name: str) -> float:
    """A figure of the server, summed over its engines."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        text = page.read().decode()
    found = re.findall(rf"^vllm(?:_marith)?:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    assert found, f"no metric {name}"
    return sum(map(float, found))


def assert_idle(url: str) -> None:
    """Nothing runs, nothing waits, no KV block is held."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for _ in range(60):
        left = {name: metric(url, name) for name in names}
        if not any(left.values()):
            return
        time.sleep(0.5)
    raise AssertionError(f"left behind: {left}")


def completion_reference(model: Path, length: int) -> reference.Reference:
    prompts = {
        "child": f"You are a child.\n{TEXT}",
        "adult": f"You are an adult.\n{TEXT}",
        "magic": f"Always talk about magic.\n{TEXT}",
    }
    tokenizer = tiny.tokenizer()
    ids = {name: tokenizer(text).input_ids for name, text in prompts.items()}
    return reference.generate(str(model), Formula.parse(FORMULA), ids, length)


def test_log_likelihoods_of_a_prompt(client: openai.OpenAI, tiny_model: Path) -> None:
    """What evaluation harnesses send: token ids, echo and log-probabilities."""
    encode = tiny.tokenizer().encode
    ids = encode(TEXT)
    terms = {"toxic": {"system": "Be rude."}}
    answer = client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=1,
        temperature=0,
        logprobs=1,
        echo=True,
        seed=1234,
        extra_body={"vllm_xargs": {"marith": json.dumps({"formula": "base - 0.6*toxic", "terms": terms})}},
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    first, *found = choice.logprobs.token_logprobs or []
    assert first is None
    prompts = {"base": ids, "toxic": [*encode("Be rude.\n"), *ids[1:]]}
    formula = Formula.parse("base - 0.6*toxic")
    wanted = reference.scores(str(tiny_model), formula, prompts, len(ids) - 1)
    chosen = [float(row[token]) for row, token in zip(wanted, ids[1:], strict=True)]
    assert found[: len(chosen)] == pytest.approx(chosen, abs=1e-4)
    assert len(found) == len(chosen) + 1


def test_completion_with_logprobs(client: openai.OpenAI, tiny_model: Path) -> None:
    expected = completion_reference(tiny_model, 32)
    answer = client.completions.create(
        model="tiny",
        prompt=TEXT,
        max_tokens=32,
        temperature=0,
        logprobs=2,
        extra_body=request() | {"ignore_eos": True, "return_token_ids": True},
    )
    (choice,) = answer.choices
    assert choice.token_ids == expected.tokens
    assert choice.logprobs is not None
    for got, want in zip(choice.logprobs.token_logprobs or [], expected.logprobs, strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 32


def test_chat_gives_each_term_its_system_message(client: openai.OpenAI, tiny_model: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]

    def render(conversation: list[dict[str, str]]) -> list[int]:
        text = tiny.tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return tiny.tokenizer()(text, add_special_tokens=False).input_ids

    prompts = {
        "child": render([{"role": "system", "content": "You are a child."}, messages[1]]),
        "adult": render([{"role": "system", "content": "You are an adult."}, messages[1]]),
        "magic": render([messages[0], {"role": "user", "content": f"Always talk about magic.\n{TEXT}"}]),
    }
    expected = reference.generate(str(tiny_model), Formula.parse(FORMULA), prompts, 24)
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=24,
        temperature=0,
        extra_body=request() | {"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.choices[0].token_ids == expected.tokens
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompts["child"])


def test_a_named_tool_and_a_schema(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"mood": {"enum": ["calm", "wild"]}},
        "required": ["mood"],
    }
    schema["additionalProperties"] = False
    tokenizer = tiny.tokenizer()
    blank = [token for token in range(tiny.VOCAB) if not tokenizer.decode([token]).strip()]
    asked: dict[str, Any] = dict(
        model="tiny",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=100,
        temperature=0,
        logit_bias={str(token): -100 for token in blank[:300]},  # which JSON allows without end
    )
    function = {"name": "set_mood", "strict": True, "parameters": schema}
    tool: Any = {"type": "function", "function": function}
    choice: Any = {"type": "function", "function": {"name": "set_mood"}}
    answer = client.chat.completions.create(**asked, tools=[tool], tool_choice=choice, extra_body=request())
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "set_mood"
    assert json.loads(call.function.arguments)["mood"] in ("calm", "wild")

    form: Any = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    answer = client.chat.completions.create(**asked, response_format=form, extra_body=request())
    assert json.loads(answer.choices[0].message.content or "")["mood"] in ("calm", "wild")


def test_stream_is_the_whole_answer_in_parts(client: openai.OpenAI) -> None:
    wanted = dict(
        model="tiny",
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=24,
        temperature=0,
        extra_body=request() | {"ignore_eos": True},
    )
    whole = client.chat.completions.create(**wanted).choices[0].message.content
    parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**wanted, stream=True)]
    assert "".join(parts) == whole
    assert len([part for part in parts if part]) > 3


def test_a_stream_never_shows_what_is_forbidden(client: openai.OpenAI, url: str) -> None:
    constraints = {"forbid": ["e", "in"], "max_backoffs": 500}
    wanted = dict(model="tiny", prompt=TEXT, max_tokens=24, temperature=0.8, seed=3, logprobs=1)
    body = request(constraints=constraints) | {"ignore_eos": True}
    whole = client.completions.create(**wanted, extra_body=body)
    stream = client.completions.create(**wanted, extra_body=body, stream=True)
    parts = [chunk.choices[0].text for chunk in stream]
    text = whole.choices[0].text
    assert "".join(parts) == text
    assert not re.search("e|in", text, re.IGNORECASE)
    assert re.search("e|in", client.completions.create(**wanted, extra_body=request()).choices[0].text)
    assert whole.usage.completion_tokens == len(whole.choices[0].logprobs.token_logprobs) == 24
    cut = client.completions.create(
        **wanted, extra_body=request(constraints={"forbid": ["e", "a", "i", "o", "u"], "max_backoffs": 0})
    )
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].stop_reason == "constraints"
    for extra in ({"structured_outputs": {"regex": "a*"}}, {"response_format": {"type": "json_object"}}):
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match="cannot be combined with structured output"):
                client.completions.create(**wanted, extra_body=body | extra, stream=streamed)
    assert_idle(url)


def test_two_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    wanted = dict(model="tiny", prompt=TEXT, max_tokens=24, temperature=1.0, n=2, seed=11)
    first, again = (client.completions.create(**wanted, extra_body=request()) for _ in range(2))
    assert len({choice.text for choice in first.choices}) == 2
    assert [c.text for c in first.choices] == [c.text for c in again.choices]


def test_formulas_and_plain_requests_side_by_side(client: openai.OpenAI) -> None:
    def ask(with_formula: bool) -> str:
        body = {"ignore_eos": True, **(request() if with_formula else {})}
        return (
            client.completions.create(
                model="tiny", prompt=TEXT, max_tokens=24, temperature=0, extra_body=body
            )
            .choices[0]
            .text
        )

    alone = {kind: ask(kind) for kind in (True, False)}
    assert alone[True] != alone[False]
    kinds = [i % 3 > 0 for i in range(24)]  # 16 groups of three: more rows than the server has
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        for kind, text in zip(kinds, pool.map(ask, kinds), strict=True):
            assert text == alone[kind]


def test_abort_in_mid_stream_leaves_nothing(client: openai.OpenAI, url: str) -> None:
    """All members end with the stream; again where an engine was done before this process closed it."""
    asked: dict[str, Any] = dict(model="tiny", prompt=TEXT, extra_body=request() | {"ignore_eos": True})

    found: list[tuple[float, float]] = []
    while not any(running == 3 and steps < 400 for running, steps in found):
        assert len(found) < 20, f"(members that ran, steps in all) of each stream: {found}"
        before = metric(url, "fused_rows_count")
        stream = client.completions.create(**asked, max_tokens=400, stream=True)
        for _, _ in zip(range(5), stream, strict=False):
            pass
        running = metric(url, "num_requests_running")
        stream.close()
        assert_idle(url)
        found.append((running, metric(url, "fused_rows_count") - before))


LONG = " ".join(["word"] * 600)
MALFORMED: list[tuple[Any, str]] = [
    ("", "the formula is empty"),
    ("child - *adult", "expected a term or a number at column 9"),
    ("child adult", "column 7"),
    ("(child", "column"),
    ("child)", "column 6"),
    ("chidl", "did you mean 'child'"),
    ("nobody", "'nobody' is not defined"),
    ("child*adult", "column"),
    ("child/0", "zero"),
    ("child/adult", "column"),
    ("1e999*child", "column 1"),
    ("union(child)", "two operands"),
    ("child - 2*adult", "weights"),
    ("topk(child)", "topk takes one formula and 1 number"),
    ("topk(adult, 3) - topk(child, 3)", "stands under a negative weight"),
    ('{"formula": "w*child", "parameters": {"v": 1}}', "'w' is not defined"),
    ("child + $", "column 9"),
    ("__import__('os')", "column"),
    ("(" * 400 + "child" + ")" * 400, "nest"),
    (" + ".join(["child"] * 1000), "characters"),
    ("{", "not valid JSON"),
    ("{}", "formula"),
    ('{"formula": 3}', "formula"),
    ('{"formula": "a", "terms": {"a": {"system": 1}}}', "system"),
    ('{"formula": "a", "terms": {"a": {"sistem": "x"}}}', "sistem"),
    ('{"formula": "a", "terms": {"a": {"system": "x", "prompt": "y"}}}', "prompt"),
    ('{"formula": "a", "terms": {"a": {"adapter": "wizard"}}}', "adapter"),
    ('{"formula": "a", "terms": {"a": {"model": "small"}}}', "model"),
    ('{"formula": "a", "terms": {"a": {"model": "../../etc/passwd"}}}', "model"),
    ('{"formula": "a", "terms": {"a": {"classifier": "c"}}}', "language model"),
    ('{"formula": "base", "normalize": "maybe"}', "normalize"),
    (json.dumps({"formula": "a", "terms": {"a": {"system": LONG}}}), "term 'a'"),
    (
        json.dumps(
            {"formula": "+".join(f"t{i}" for i in range(40)), "terms": {f"t{i}": {} for i in range(40)}}
        ),
        "terms",
    ),
    (5, "must be a string"),
    (["child"], "must be a string"),
    ('{"formula": "base", "constraints": {"forbid_regex": ["(a"]}}', "the regular expression '(a' is wrong"),
    ('{"formula": "base", "constraints": {}}', "'constraints' forbid nothing"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_malformed_requests_are_refused(client: openai.OpenAI, url: str, chat: bool, stream: bool) -> None:
    for value, sentence in MALFORMED:
        body: dict[str, Any] = {"vllm_xargs": {"marith": value}}
        if chat:
            create, prompt = client.chat.completions.create, {"messages": [{"role": "user", "content": TEXT}]}
        else:
            create, prompt = client.completions.create, {"prompt": TEXT}
        with pytest.raises(openai.BadRequestError) as refused:
            create(model="tiny", extra_body=body, stream=stream, **prompt)
        assert sentence in str(refused.value), value
        assert "Traceback" not in str(refused.value)
    assert_idle(url)
    assert client.completions.create(model="tiny", prompt=TEXT, max_tokens=2, extra_body=request()).choices


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"use_beam_search": True, "n": 2}, "beam search"),
    ],
)
def test_parameters_without_a_meaning_for_formulas(
    client: openai.OpenAI, extra: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.completions.create(model="tiny", prompt=TEXT, extra_body=request() | extra)


@pytest.mark.parametrize(
    ("settings", "options", "sentence"),
    [
        ({}, ["--pipeline-parallel-size", "2"], "--pipeline-parallel-size must be 1"),
        ({"presets": "nowhere"}, [], "nowhere"),
        ({"preset": "x"}, [], "known settings"),
        (
            {"presets": str(PRESETS)},
            ["--served-model-name", "other", "preadd"],
            "the preset 'preadd' has the name of the served model",
        ),
    ],
)
def test_a_wrong_start_ends_with_one_sentence(
    tiny_model: Path, settings: dict[str, Any], options: list[str], sentence: str
) -> None:
    line = server.command(tiny_model, server.free_port(), settings, *options)
    ended = subprocess.run(
        line, capture_output=True, text=True, env=server.environment(), timeout=300, check=False
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("marith: ")
    assert sentence in last
    assert "Traceback" not in ended.stderr

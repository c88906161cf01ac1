"""Presets as models of a real server, asked by the unmodified openai client."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import server
from vllm_marith import chat
from vllm_marith.engine.group import Cause

TEXT = "the value of the expression"
MESSAGES: Any = [{"role": "user", "content": TEXT}]
GREEDY: dict[str, Any] = {"max_tokens": 16, "temperature": 0}
LONG: dict[str, Any] = {"ignore_eos": True}
"""The tiny model ends its answers early."""


def own(value: str) -> dict[str, Any]:
    return LONG | {"vllm_xargs": {"marith": value}}


def names(folder: Path) -> list[str]:
    return [file.stem for file in sorted(folder.glob("*.yaml")) if "\nformula:" in "\n" + file.read_text()]


def post(url: str, path: str, body: bytes = b"") -> Any:
    with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", body, method="POST")) as answer:
        return json.load(answer)


def test_the_list_of_models(client: openai.OpenAI, served_presets: Path) -> None:
    listed = {model.id for model in client.models.list()}
    assert listed == {"tiny", *names(served_presets)}
    assert len(listed) > 5


def test_every_preset_answers_under_its_name(client: openai.OpenAI, served_presets: Path) -> None:
    for name in names(served_presets):
        chat = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=4, extra_body=LONG)
        assert chat.model == name
        assert chat.usage is not None
        assert chat.usage.completion_tokens == 4


def test_a_completion_is_the_formulas(client: openai.OpenAI) -> None:
    named = client.completions.create(model="preadd", prompt=TEXT, **GREEDY, extra_body=LONG)
    same = client.completions.create(model="tiny", prompt=TEXT, **GREEDY, extra_body=own("preadd"))
    plain = client.completions.create(model="tiny", prompt=TEXT, **GREEDY, extra_body=LONG)
    assert named.choices[0].text == same.choices[0].text != plain.choices[0].text
    assert (named.model, same.model, plain.model) == ("preadd", "tiny", "tiny")


def test_a_request_turns_the_parameters(client: openai.OpenAI) -> None:
    def ask(model: str, value: str | None = None) -> str:
        body = own(value) if value else LONG
        return client.completions.create(model=model, prompt=TEXT, **GREEDY, extra_body=body).choices[0].text

    changed = ask("preadd", '{"strength": 0.9}')
    assert changed == ask("tiny", "base - 0.9*toxic")
    assert changed == ask("tiny", '{"formula": "preadd", "parameters": {"strength": 0.9}}')
    assert changed != ask("preadd")
    assert ask("preadd", '{"strength": 0.6}') == ask("preadd")


def test_a_chat_and_its_stream(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    named = create(model="preadd", messages=MESSAGES, **GREEDY, extra_body=LONG).choices[0].message.content
    same = create(model="tiny", messages=MESSAGES, **GREEDY, extra_body=own("preadd"))
    assert named == same.choices[0].message.content
    chunks = list(create(model="preadd", messages=MESSAGES, **GREEDY, extra_body=LONG, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == named
    assert {chunk.model for chunk in chunks} == {"preadd"}
    stream = client.completions.create(model="preadd", prompt=TEXT, max_tokens=4, stream=True)
    assert {chunk.model for chunk in stream} == {"preadd"}


def test_the_responses_api(client: openai.OpenAI) -> None:
    def ask(model: str, **extra: Any) -> Any:
        return client.responses.create(
            model=model, input=TEXT, max_output_tokens=16, temperature=0, extra_body=extra
        )

    named = ask("preadd")
    assert named.model == "preadd"
    assert named.output_text == ask("tiny", vllm_xargs={"marith": "preadd"}).output_text
    assert named.output_text != ask("tiny").output_text
    with pytest.raises(openai.BadRequestError, match="'nobody' is not defined"):
        ask("tiny", vllm_xargs={"marith": "nobody"})


def test_unknown_models_are_vllms_404(client: openai.OpenAI) -> None:
    for create, prompt in (
        (client.completions.create, {"prompt": TEXT}),
        (client.chat.completions.create, {"messages": MESSAGES}),
        (client.responses.create, {"input": TEXT}),
    ):
        with pytest.raises(openai.NotFoundError, match="The model `nobody` does not exist"):
            create(model="nobody", **prompt)


@pytest.mark.parametrize("stream", [False, True])
def test_a_preset_takes_no_second_formula(client: openai.OpenAI, stream: bool) -> None:
    for value, sentence in (
        ("base", "the model 'preadd' is a formula already"),
        ('{"formula": "base"}', "the model 'preadd' is a formula already"),
        ('{"nobody": 1}', "nobody"),
    ):
        with pytest.raises(openai.BadRequestError, match=sentence):
            client.completions.create(model="preadd", prompt=TEXT, stream=stream, extra_body=own(value))


def test_what_a_request_cost(client: openai.OpenAI) -> None:
    raw = client.completions.with_raw_response.create(
        model="preadd", prompt=TEXT, max_tokens=4, extra_body=LONG | {"return_token_ids": True}
    )
    usage = raw.parse().usage
    assert usage is not None
    assert raw.headers["x-marith-members"] == "2"
    assert int(raw.headers["x-marith-prompt-tokens"]) > 2 * usage.prompt_tokens
    plain = client.completions.with_raw_response.create(model="tiny", prompt=TEXT, max_tokens=1)
    assert "x-marith-members" not in plain.headers


def figures(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as page:
        found = re.findall(r"^vllm_marith:(\S+) (\S+)$", page.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_the_figures_move(client: openai.OpenAI, url: str) -> None:
    before = figures(url)

    def gained(name: str) -> float:
        return figures(url).get(name, 0.0) - before.get(name, 0.0)

    client.completions.create(model="preadd", prompt=TEXT, max_tokens=7, extra_body=LONG)
    client.completions.create(model="tiny", prompt=TEXT, max_tokens=3, extra_body=own("base + 0.5*toxic"))
    client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, extra_body=LONG)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=TEXT, extra_body=own("nobody"))
    assert gained('generation_tokens_total{engine="0",formula="preadd"}') == 7
    assert gained('generation_tokens_total{engine="0",formula="custom"}') == 3
    assert gained('group_members_count{engine="0"}') == 2
    assert gained('group_members_sum{engine="0"}') == 4
    assert gained('fused_rows_count{engine="0"}') == 10
    assert gained('fused_rows_sum{engine="0"}') == 20
    assert gained('fusion_seconds_total{engine="0"}') > 0
    assert gained('requests_refused_total{reason="formula"}') == 1
    now = figures(url)
    for name in ("num_groups_running", "num_groups_waiting"):
        assert now[f'{name}{{engine="0"}}'] == 0
    failed = {name: number for name, number in now.items() if name.startswith("requests_failed_total")}
    assert len(failed) == len(Cause)
    assert not any(failed.values())


def test_groups_that_run_are_seen(client: openai.OpenAI, url: str) -> None:
    def seen() -> bool:
        stream = client.completions.create(
            model="preadd", prompt=TEXT, max_tokens=400, stream=True, extra_body=LONG
        )
        next(iter(stream))
        running = figures(url)['num_groups_running{engine="0"}']
        stream.close()
        return running == 1

    wait_for(seen)  # on a busy machine an answer may end before anybody looks
    wait_for(lambda: figures(url)['num_groups_running{engine="0"}'] == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(120):
        if condition():
            return
        time.sleep(0.25)
    raise AssertionError("it did not happen")


def test_reload_of_a_running_server(client: openai.OpenAI, url: str, served_presets: Path) -> None:
    def listed() -> set[str]:
        return {model.id for model in client.models.list()}

    before = listed()
    new = served_presets / "shy.yaml"
    try:
        new.write_text("terms: {loud: {system: SHOUT.}}\nformula: base - 0.3*loud\n")
        assert listed() == before
        assert "shy" in [preset["name"] for preset in post(url, "/v1/marith/reload")["data"]]
        assert listed() == before | {"shy"}
        named = client.completions.create(model="shy", prompt=TEXT, **GREEDY, extra_body=LONG)

        new.write_text("terms: {loud: {system: SHOUT.}}\nformula: base - *loud\n")
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(url, "/v1/marith/reload")
        assert refused.value.code == 400
        assert "shy.yaml:2: expected a term or a number" in refused.value.read().decode()
        again = client.completions.create(model="shy", prompt=TEXT, **GREEDY, extra_body=LONG)
        assert again.choices[0].text == named.choices[0].text
    finally:
        new.unlink()
        post(url, "/v1/marith/reload")
    assert listed() == before


def test_explain_and_formulas(url: str) -> None:
    with urllib.request.urlopen(f"{url}/v1/marith/formulas") as answer:
        found = {preset["name"]: preset for preset in json.load(answer)["data"]}
    assert found["preadd"]["formula"] == "base - strength*toxic"
    assert found["preadd"]["parameters"] == {"strength": 0.6}
    assert found["preadd"]["parsed"] == "base - 0.6*toxic"
    plan = post(url, "/v1/marith/explain", b'{"formula": "preadd"}')
    assert plan["rows"] == 2
    assert plan["terms"].keys() == {"base", "toxic"}


def test_an_answer_explains_itself(client: openai.OpenAI) -> None:
    """What the terms pushed is what the formula's log-probabilities differ by, at every token."""
    asked = {"vllm_xargs": {"marith": '{"formula": "preadd", "explain": true}'}} | LONG
    answer = client.completions.create(model="tiny", prompt=TEXT, **GREEDY, logprobs=2, extra_body=asked)
    tokens = answer.model_extra["marith"]["tokens"]  # type: ignore[index]
    assert "".join(token["text"] for token in tokens) == answer.choices[0].text
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    for token, expected in zip(tokens, logprobs.token_logprobs or [], strict=True):
        chosen, runner_up = token["chosen"]["logprob"], token["runner_up"]["logprob"]
        assert chosen == pytest.approx(expected, abs=1e-4)
        assert chosen >= runner_up
        pushed = sum(term["contribution"][0] - term["contribution"][1] for term in token["terms"].values())
        assert pushed == pytest.approx(chosen - runner_up, abs=1e-3)

    stream = client.chat.completions.create(
        model="preadd",
        messages=MESSAGES,
        **GREEDY,
        stream=True,
        extra_body=asked | {"vllm_xargs": {"marith_explain": 1}},  # the short form
    )
    text = explained = ""
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        explained += "".join(
            token["text"] for token in (chunk.model_extra or {}).get("marith", {}).get("tokens", ())
        )
    assert explained == text != ""

    for wrong in ({"n": 2, "prompt": TEXT}, {"prompt": [TEXT, TEXT]}):
        with pytest.raises(openai.BadRequestError, match="one answer at a time can be explained"):
            client.completions.create(model="tiny", max_tokens=2, extra_body=asked, **wrong)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="no formula whose tokens could be explained"):
        client.completions.create(model="tiny", prompt=TEXT, extra_body={"vllm_xargs": {"marith_explain": 1}})
    with pytest.raises(openai.BadRequestError, match="this route cannot explain its tokens"):
        client.responses.create(model="preadd", input=TEXT, extra_body={"vllm_xargs": {"marith_explain": 1}})


def test_a_conversation_in_the_terminal(url: str, client: openai.OpenAI) -> None:
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    there = chat.Server(url)
    assert there.models()[0] == "tiny"
    for formula in ({"formula": "preadd", "parameters": {"strength": 0.9}}, None):
        conversation = chat.Conversation(there, "tiny", formula, options)
        pieces = list(conversation.say(TEXT))
        assert [token is not None for _, token in pieces] == [formula is not None] * len(pieces)
        text = "".join(piece for piece, _ in pieces)
        body = own(json.dumps(formula)) if formula else LONG
        same = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, extra_body=body
        )
        assert text == same.choices[0].message.content
        assert conversation.messages[1:] == [{"role": "assistant", "content": text}]
        assert "".join(piece for piece, _ in conversation.say("and then?"))
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    with pytest.raises(chat.ChatError, match="'nobody' is not defined"):
        list(chat.Conversation(there, "tiny", {"formula": "nobody"}, options).say(TEXT))


def test_several_api_servers(tiny_model: Path, tmp_path: Path) -> None:
    """Each counts its part of the figures, and a reload of one, or a signal to their parent, reaches all.

    This server has a default preset, too.
    """
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "steer.yaml").write_text("terms: {loud: {system: SHOUT.}}\nformula: base - 0.3*loud\n")
    settings = {"presets": str(presets), "default_preset": "steer"}
    options = ("--api-server-count", "2")
    with server.serve_process(tiny_model, tmp_path / "log", settings, *options) as (url, pid):

        def listed() -> set[int]:
            """How many models the servers list: each of a dozen connections may reach another of them."""
            found = set()
            for _ in range(12):
                with urllib.request.urlopen(f"{url}/v1/models") as answer:
                    found.add(len(json.load(answer)["data"]))
            return found

        for _ in range(8):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
            answer = client.completions.create(model="steer", prompt=TEXT, max_tokens=5, extra_body=LONG)
            assert answer.model == "steer"
        for _ in range(4):
            found = figures(url)
            assert found['group_members_count{engine="0"}'] == 8
            assert found['generation_tokens_total{engine="0",formula="steer"}'] == 40

        assert listed() == {2}
        new = presets / "plain.yaml"
        new.write_text("formula: base\n")
        post(url, "/v1/marith/reload")
        wait_for(lambda: listed() == {3})
        new.unlink()
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: listed() == {2})

        assert_default(client, "steer")
        (presets / "steer.yaml").unlink()
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            post(url, "/v1/marith/reload")
        assert "there is no preset 'steer'" in refused.value.read().decode()


def assert_default(client: openai.OpenAI, preset: str) -> None:
    """The served model's own name stands for the preset, and the formula `base` for the model."""
    ask = client.completions.with_raw_response.create
    silent = ask(model="tiny", prompt=TEXT, **GREEDY, extra_body=LONG)
    named = ask(model=preset, prompt=TEXT, **GREEDY, extra_body=LONG)
    plain = ask(model="tiny", prompt=TEXT, **GREEDY, extra_body=own("base"))
    assert [answer.headers["x-marith-members"] for answer in (silent, named, plain)] == ["2", "2", "1"]
    texts = [answer.parse().choices[0].text for answer in (silent, named, plain)]
    assert texts[0] == texts[1] != texts[2]
    assert silent.parse().model == "tiny"
    with pytest.raises(openai.BadRequestError, match="beam search cannot be combined with a formula"):
        client.completions.create(model="tiny", prompt=TEXT, n=2, extra_body={"use_beam_search": True})

"""What explains a token: contributions, the witness in the worker, and how they get into an answer."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_marith import Formula, FormulaError
from vllm_marith.chat import coloured, winner
from vllm_marith.engine import group
from vllm_marith.engine.frontend.account import ACCOUNT, Explained
from vllm_marith.engine.worker.evidence import EVIDENCE, Evidence, Token, Witness
from vllm_marith.serving import middleware
from vllm_marith.serving.contributions import contributions
from vllm_marith.serving.explanations import Explainer
from vllm_marith.serving.middleware import FormulaMiddleware

from ..support import api_server

TERMS: dict[str, dict[str, str]] = {"a": {"system": "A."}, "b": {"system": "B."}, "c": {}}

# ------------------------------------------------------------------------------ contributions

leaves = st.sampled_from(["a", "b", "c"])
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: f"({two[0]} + {two[1]})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]} - 0.25*{two[1]})"),
        inner.map(lambda one: f"(1.5*{one})"),
        st.tuples(inner, inner).map(lambda two: f"union({two[0]}, {two[1]})"),
        st.tuples(inner, inner).map(lambda two: f"intersection({two[0]}, {two[1]})"),
    ),
    max_leaves=6,
)


@given(formulas, st.sampled_from(["sum", "none"]), st.integers(0, 2**32 - 1))
def test_contributions_sum_to_the_energy(text: str, normalize: Any, seed: int) -> None:
    try:
        formula = Formula.parse(text, TERMS, normalize)
    except FormulaError:
        assume(False)  # the weights may sum to nothing
    logits = {
        name: np.random.default_rng(seed).normal(size=8) * 3 + i for i, name in enumerate(formula.terms)
    }
    logprobs = {name: row - np.log(np.exp(row).sum()) for name, row in logits.items()}
    energies = []
    for token in range(8):
        shares = contributions(formula, {name: row[token] for name, row in logprobs.items()})
        assert shares is not None
        energies.append(math.fsum(shares.values()))
    found = np.array(energies) - np.log(np.exp(energies).sum())
    assert found == pytest.approx(formula.evaluate(logits), abs=1e-9)


@pytest.mark.parametrize(
    ("text", "normalize", "expected"),
    [
        ("a - 0.5*b", "sum", {"a": -2.0, "b": 4.0}),
        ("a - 0.5*b", "none", {"a": -1.0, "b": 2.0}),
        ("union(a, b)", "sum", {"a": -1.0}),
        ("2*intersection(a, b)", "none", {"b": -8.0}),
        ("a + union(a, b)", "none", {"a": -2.0}),
    ],
)
def test_contributions_of_a_token(text: str, normalize: Any, expected: dict[str, float]) -> None:
    formula = Formula.parse(text, {name: TERMS[name] for name in ("a", "b")}, normalize)
    assert contributions(formula, {"a": -1.0, "b": -4.0}) == expected


def test_a_forbidden_token() -> None:
    formula = Formula.parse("a - 0.5*b", {name: TERMS[name] for name in ("a", "b")})
    shares = contributions(formula, {"a": -1.0, "b": -math.inf})
    assert shares == {"a": -2.0, "b": -math.inf}


def test_formulas_that_are_no_sums() -> None:
    formula = Formula.parse("topk(a + b, 3)", {name: TERMS[name] for name in ("a", "b")})
    assert contributions(formula, {"a": -1.0, "b": -4.0}) is None


# ---------------------------------------------------------------------------------- evidence


def test_a_witness_tells_what_the_members_said() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 16)
    kept = logits.clone()
    witness = Witness("key", [2, 0], request=1)  # checked drafts move rows of logits, not of requests
    witness.before(logits)
    logits[2] = 2 * kept[2] - kept[0]
    witness.after(logits)
    formula = logits[2].log_softmax(-1)
    logits.zero_()  # the sampler works in place
    best = formula.argsort(descending=True)
    for chosen, runner_up in ((best[0], best[1]), (best[5], best[0])):
        witness.before(kept)
        witness.after(torch.stack([kept[0], kept[1], 2 * kept[2] - kept[0], kept[3]]))
        witness.sampled(torch.tensor([[9], [int(chosen)], [9], [9]], dtype=torch.int32))
        ((ids, logprobs),) = EVIDENCE.fetch("key", 0, last=True)
        assert ids == [chosen, runner_up]
        for token, row in zip(ids, logprobs, strict=True):
            expected = [kept[i].log_softmax(-1)[token] for i in (2, 0)] + [formula[token]]
            assert row == pytest.approx([float(value) for value in expected], abs=1e-5)


def test_evidence_is_fetched_in_parts_and_forgotten() -> None:
    evidence = Evidence()

    def token(number: int) -> Token:
        return Token(torch.tensor([number, 0]), torch.zeros(2, 1))

    for i in range(3):
        evidence.add("r", token(i))
    assert [ids[0] for ids, _ in evidence.fetch("r", 1, last=False)] == [1, 2]
    evidence.add("r", token(3))
    assert [ids[0] for ids, _ in evidence.fetch("r", 3, last=True)] == [3]
    assert evidence.fetch("r", 0, last=False) == []
    for i in range(1000):
        evidence.add(f"left{i}", token(i))
    assert len(evidence._tokens) < 300
    assert evidence.fetch("left999", 0, last=True)


# ------------------------------------------------------------------------------- the answer


FORMULA = Formula.parse("a - 0.5*b", {name: TERMS[name] for name in ("a", "b")})
# Letters "h", half of "é" twice, "i"; every token's runner-up is "z".
EVIDENCE_OF = [([8, 26], [[-1.0, -4.0, -0.5], [-2.0, -1.0, -3.0]])]
EVIDENCE_OF += [([i, 26], [[-1.0, -math.inf, -0.5], [-1.0, -1.0, -3.0]]) for i in (0, 0, 9)]


class Core:
    """Engines of which the second has the evidence, more of it at every call."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.calls: list[Any] = []

    async def call_utility_all_async(self, *call: Any) -> Any:
        self.calls.append(call)
        _, since, last = call[3]
        until = len(EVIDENCE_OF) if last else self.steps.pop(0)
        return [[[]], [EVIDENCE_OF[since:until], EVIDENCE_OF[since:until]]]


def answer(core: Core, messages: list[dict[str, Any]], path: str = "/v1/completions") -> list[Any]:
    """What a client receives of a response that is made of these messages."""
    sent: list[Any] = []
    client: Any = type("Client", (), {"engine_core": core})()
    explainer = Explainer(client, api_server.FakeTokenizer())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        account = ACCOUNT.get()
        assert account is not None
        account.add([1, 2])
        if account.explains:
            account.explained = Explained("key", FORMULA, {"a": 0, "b": 1})
        for message in messages:
            await send(message)

    async def refresh() -> None:
        raise AssertionError("this is no scrape")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(FormulaMiddleware(app, refresh, explainer.of)(scope, None, send))  # type: ignore[arg-type]
    return sent


def start(kind: bytes, status: int = 200) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"content-length", b"7")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def check_tokens(tokens: list[Any]) -> None:
    assert [token["text"] for token in tokens] == ["h", "", "é", "i"]
    first = tokens[0]
    assert first["chosen"] == {"token": "h", "id": 8, "logprob": -0.5}
    assert first["runner_up"] == {"token": "z", "id": 26, "logprob": -3.0}
    assert first["terms"] == {
        "a": {"logprob": [-1.0, -2.0], "contribution": [-2.0, -4.0]},
        "b": {"logprob": [-4.0, -1.0], "contribution": [4.0, 1.0]},
    }
    assert tokens[1]["terms"]["b"] == {"logprob": [None, -1.0], "contribution": [None, 1.0]}


def test_a_whole_answer_has_its_explanation_in_it() -> None:
    core = Core([])
    head, body = answer(core, [start(b"application/json"), part(b'{"id":'), part(b' "x"}', False)])
    content = json.loads(body["body"])
    assert content["id"] == "x"
    check_tokens(content["marith"]["tokens"])
    headers = dict(head["headers"])
    assert headers[b"content-length"] == str(len(body["body"])).encode()
    assert headers[b"x-marith-members"] == b"2"
    assert core.calls == [("collective_rpc", group.EVIDENCE, None, ("key", 0, True), {})]


def test_a_stream_is_explained_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_FETCH_SECONDS", -1.0)
    core = Core([1, 1, 3])
    pieces = [part(f"data: {i}\n\n".encode()) for i in range(3)]
    end = [part(b"data: [DONE]\n\n"), part(b"", False)]
    head, *rest = answer(core, [start(b"text/event-stream; charset=utf-8"), *pieces, *end])
    assert head == {**start(b"text/event-stream; charset=utf-8"), "headers": head["headers"]}
    told, tokens = [], []
    for message in rest[:-1]:
        event = message["body"].removeprefix(b"data: ")
        assert message["more_body"]
        if event.startswith(b"{"):
            event = json.loads(event)
            assert event["choices"] == []
            tokens += event["marith"]["tokens"]
            told.append(f"+{len(event['marith']['tokens'])}")
        else:
            told.append(event.strip().decode())
    assert told == ["0", "+1", "1", "2", "+2", "+1", "[DONE]"]
    check_tokens(tokens)
    assert rest[-1] == end[-1]


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/responses", 200), ("/v1/completions", 400), ("/v1/chat/completions", 500)]
)
def test_other_answers_pass_as_they_are(path: str, status: int) -> None:
    messages = [start(b"application/json", status), part(b"not", True), part(b" JSON", False)]
    assert [m.get("body") for m in answer(Core([]), messages, path)] == [None, b"not", b" JSON"]


# -------------------------------------------------------------------------- who spoke for it


def token(**terms: tuple[Any, Any]) -> dict[str, Any]:
    return {"terms": {name: {"logprob": [0, 0], "contribution": list(pair)} for name, pair in terms.items()}}


def test_who_spoke_most_for_a_token() -> None:
    assert winner(token(a=(-2.0, -4.0), b=(4.0, 1.0))) == ("b", 0.6)
    assert winner(token(a=(-4.0, -2.0), b=(1.0, 2.0))) == (None, 0.0)
    assert winner(token(a=(-1.0, None), b=(0.0, 0.0))) == ("a", 1.0)
    assert winner(token(a=(None, -1.0), b=(-1.0, -2.0)))[0] == "b"
    unexplained = {"terms": {"a": {"logprob": [-1.0, -2.0], "contribution": [None, None]}}}
    assert winner(unexplained) == ("a", 1.0)


def test_colours_follow_the_terms() -> None:
    assert coloured("x", token(a=(1.0, 0.0), b=(0.0, 0.0))).style == "bold blue"
    assert coloured("x", token(a=(1.0, 0.0), b=(1.5, 0.0), c=(1.2, 0.0))).style == "yellow"
    assert coloured("x", None).style == coloured("x", token(a=(0.0, 1.0))).style == ""

"""What is counted of formulas with and without drafts."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_marith import Formula
from vllm_marith.evaluation import drafting
from vllm_marith.evaluation.drafting import Drafts, Turn, measure
from vllm_marith.language.names import NGRAM

pytest.importorskip("vllm")

TERMS: dict[str, Any] = {"rude": {"system": "x"}, "s": {"model": "small"}, "g": {"model": NGRAM}}


class FakeLLM:
    """Answers a request with `tokens` tokens and counts what it is told to; keeps what it was asked."""

    def __init__(self, steps: int, drafted: int, accepted: int, passes: Sequence[tuple[int, int]]) -> None:
        self.counts = {"steps": steps, "drafted": drafted, "accepted": accepted}
        self.passes = passes
        self.log: list[Any] = []

    def reset_prefix_cache(self) -> None:
        self.log.append("reset")

    def collective_rpc(self, method: str) -> list[Any]:
        self.log.append("figures")
        core = {name: [("custom", n)] if n else [] for name, n in self.counts.items()}
        return [core, {"drafting": self.passes}]

    def chat(self, messages: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.log.append((messages[-1]["content"], params.temperature, params.extra_args["marith"]))
        tokens = range(params.max_tokens)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(tokens))])]


@pytest.mark.parametrize(
    ("formula", "counted", "calls", "other"),
    [
        # 20 tokens in 8 steps of both terms, after 14 passes of the engine's own model.
        ("base + 0.5*rude", (8, 14, 12, [(0, 14)]), 30, 0),
        # In 8 steps both models run; the small one has drafted before.
        ("superseded(s, base)", (8, 14, 12, [(1, 14)]), 8, 22),
        ("superseded(s, base)", (20, 0, 0, []), 20, 0),
        ("superseded(g, base) + rude", (15, 5, 5, []), 30, 0),
        # A plain request has no group and no steps.
        ("1*base", (0, 0, 0, []), 20, 0),
    ],
)
def test_calls_are_those_of_each_model(
    formula: str, counted: tuple[Any, ...], calls: int, other: int
) -> None:
    llm: Any = FakeLLM(*counted)
    drafts = measure(llm, Formula.parse(formula, TERMS), 2, 10, [["a", "b"]])
    (turn,) = drafts.turns["fixed"]
    assert (turn.tokens, turn.calls, turn.other_calls) == (20, calls, other)
    assert (turn.drafted, turn.accepted) == counted[1:3]
    assert (drafts.calls("fixed"), drafts.other_calls("fixed")) == (calls / 20, other / 20)


def test_modes_take_turns_after_a_turn_that_is_not_kept() -> None:
    llm: Any = FakeLLM(1, 0, 0, [])
    drafts = measure(llm, Formula.parse("base + rude", TERMS), 5, 3, [["a"], ["b"]], ["c", "d"])
    asked = [entry for entry in llm.log if isinstance(entry, tuple)]
    assert [(user, t) for user, t, _ in asked] == [
        *[(user, 1.0) for user in "aab" for _ in drafting.MODES],
        *[(user, 0.0) for _ in drafting.MODES for user in "cd"],
    ]
    modes = ['"speculative":' + said for said in ('"off"', "5", '"auto"')]
    for (_, _, request), mode in zip(asked[:9], modes * 3, strict=True):
        assert mode in request.replace(" ", "")
    assert [len(turns) for turns in drafts.turns.values()] == [2, 2, 2]
    assert drafts.answers == {mode: [[0, 1, 2]] * 2 for mode in drafting.MODES}
    places = [i for i, entry in enumerate(llm.log) if entry == "reset"]
    assert len(places) == 12  # before every turn of every mode, and its counts start at zero
    assert all(llm.log[i + 1] == "figures" for i in places)


def made(**turns: list[Turn]) -> Drafts:
    return Drafts("f", 4, turns, {"off": [[1], [2]], "fixed": [[1], [3]]})


def test_what_is_made_of_turns() -> None:
    def turn(tokens: int, seconds: float, calls: int, drafted: int = 0, accepted: int = 0) -> Turn:
        return Turn(tokens, seconds, calls, 0, drafted, accepted)

    drafts = made(
        off=[turn(10, 1.0, 20), turn(10, 4.0, 20), turn(10, 1.0, 20)],
        fixed=[turn(10, 0.5, 12, 8, 6), turn(10, 4.0, 12, 8, 2), turn(20, 1.0, 24, 0, 0)],
    )
    assert drafts.calls("off") == 2.0
    assert drafts.calls("fixed") == pytest.approx(48 / 40)
    assert drafts.kept("fixed") == 0.5
    assert drafts.kept("off") == 0.0
    assert drafts.speedups("fixed") == pytest.approx([2.0, 1.0, 2.0])
    assert drafts.milliseconds("fixed") == pytest.approx(50.0)
    assert drafts.identical("off") == 2
    assert drafts.identical("fixed") == 1

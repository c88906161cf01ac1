"""What is counted of formulas with and without drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_marith import Formula
from vllm_marith.evaluation import drafting
from vllm_marith.evaluation.drafting import Drafts, Turn, measure

pytest.importorskip("vllm")

TERMS: dict[str, Any] = {"rude": {"system": "x"}}


class FakeLLM:
    """Answers every request with as many tokens as it asks for, and has the figures it is given."""

    def __init__(self, core: dict[str, int] | None = None, worker: dict[str, int] | None = None) -> None:
        self.core, self.worker = core or {}, worker or {}
        self.log: list[Any] = []

    def reset_prefix_cache(self) -> None:
        self.log.append("reset")

    def collective_rpc(self, method: str) -> list[Any]:
        self.log.append("figures")
        sides = [[(("custom", name), n) for name, n in of.items()] for of in (self.core, self.worker)]
        return [
            {"calls": sides[0], "drafted": [("custom", 12)], "accepted": [("custom", 9)]},
            {"calls": sides[1]},
        ]

    def chat(self, messages: Any, params: Any, use_tqdm: bool) -> list[Any]:
        self.log.append((messages[-1]["content"], params.temperature, params.extra_args["marith"]))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(range(params.max_tokens)))])]


def test_calls_are_of_the_own_model_or_of_others() -> None:
    llm: Any = FakeLLM({"base": 16, "small": 8, "other": 8}, {"base": 14, "small": 5})
    drafts = measure(llm, Formula.parse("base + rude", TERMS), 2, 10, [["a", "b"]])
    (turn,) = drafts.turns["fixed"]
    assert (turn.tokens, turn.calls, turn.other_calls, turn.drafted, turn.accepted) == (20, 30, 21, 12, 9)
    assert (drafts.calls("fixed"), drafts.other_calls("fixed")) == (1.5, 1.05)


def test_modes_take_turns_after_a_turn_that_is_not_kept() -> None:
    llm: Any = FakeLLM()
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
    assert drafts.speedup_in_total("fixed") == pytest.approx((6 / 30) / (5.5 / 40))
    assert drafts.milliseconds("fixed") == pytest.approx(50.0)
    assert drafts.identical("off") == 2
    assert drafts.identical("fixed") == 1

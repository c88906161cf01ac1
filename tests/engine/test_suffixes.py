"""What of the texts that are written the drafts of `suffix` learn, and what they make of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vllm_marith.engine.worker.speculation.suffixes import Suffixes, Trees, trees

PROMPT = [1, 2, 3, 4, 5]


def reading(text: list[int]) -> Callable[[int, int], np.ndarray]:
    return lambda start, stop: np.asarray(text[start:stop], np.int32)


def follow(suffixes: Suffixes, name: str, prompt: list[int], answer: list[int], owner: Any = None) -> None:
    suffixes.follow(name, len(prompt), len(prompt) + len(answer), reading(prompt + answer), owner)


class Told:
    """Writes down what trees would be told, and proposes nothing."""

    def __init__(self) -> None:
        self.prompts: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.living: set[int] = set()
        self.contexts: list[list[int]] = []
        self.token_ids: list[int] = []

    def start_request(self, req_id: int, prompt_token_ids: np.ndarray) -> None:
        assert req_id not in self.prompts
        self.prompts[req_id], self.answers[req_id] = prompt_token_ids.tolist(), []
        self.living.add(req_id)

    def add_active_response(self, req_id: int, token_ids: np.ndarray) -> None:
        assert req_id in self.living
        assert token_ids.dtype == np.int32
        self.answers[req_id] += token_ids.tolist()

    def stop_request(self, req_id: int) -> None:
        self.living.remove(req_id)

    def speculate(self, req_id: int, context: np.ndarray, **how: Any) -> Any:
        assert req_id in self.living
        self.contexts.append(context.tolist())
        return self


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_taken_in_once(seed: int) -> None:
    """Texts that grow by any number of tokens, or are not asked about for a while."""
    rng = random.Random(seed)
    told = Told()
    suffixes = Suffixes(told)
    texts = {name: [rng.randrange(9) for _ in range(rng.randint(1, 40))] for name in "abc"}
    prompts = {name: len(text) for name, text in texts.items()}
    for _ in range(30):
        name = rng.choice("abc")
        texts[name] += [rng.randrange(9) for _ in range(rng.randint(0, 30))]
        if rng.random() < 0.7:
            suffixes.follow(name, prompts[name], len(texts[name]), reading(texts[name]))
            ahead = [rng.randrange(9) for _ in range(rng.randint(0, 3))]
            assert suffixes.propose(name, ahead, 2) == []
            assert told.contexts[-1] == (texts[name] + ahead)[-24:]
    for name, text in texts.items():
        suffixes.follow(name, prompts[name], len(text), reading(text))
    found = sorted(zip(told.prompts.values(), told.answers.values(), strict=True))
    assert found == sorted((text[: prompts[name]], text[prompts[name] :]) for name, text in texts.items())


def test_what_ends_is_let_go() -> None:
    told = Told()
    suffixes = Suffixes(told)
    for name in "abc":
        follow(suffixes, name, PROMPT, [7])
    suffixes.forget(["a", "never known"])
    assert len(told.living) == 2
    suffixes.forget_all_but({"b": None})
    assert len(told.living) == 1
    follow(suffixes, "b", PROMPT, [7, 8])
    assert sorted(told.answers.values()) == [[7], [7], [7, 8]]


def test_an_id_may_come_back_with_another_text() -> None:
    told = Told()
    suffixes = Suffixes(told)
    first, second = object(), object()
    follow(suffixes, "a", PROMPT, [7, 8], first)
    follow(suffixes, "a", PROMPT, [7, 8, 9], second)
    assert list(told.answers.values()) == [[7, 8], [7, 8, 9]]
    follow(suffixes, "a", PROMPT, [6], second)  # shorter: tokens were taken back
    assert list(told.answers.values()) == [[7, 8], [7, 8, 9], [6]]
    assert told.living == {2}
    suffixes.forget_all_but({"a": first})
    assert told.living == set()


# -------------------------------------------------------------------------------------- with real trees


@pytest.fixture
def real() -> Callable[[int], Trees]:
    pytest.importorskip("arctic_inference", reason="suffixes need arctic-inference, see docs/serving.md")
    return trees


def test_a_text_is_copied_from_itself(real: Callable[[int], Trees]) -> None:
    suffixes = Suffixes(real(0))
    follow(suffixes, "a", PROMPT, [9, 2, 3])
    assert suffixes.propose("a", [], 8) == [4, 5]  # two tokens matched, so that two follow
    assert suffixes.propose("a", [], 1) == [4]
    assert suffixes.propose("a", [4], 1) == [5]
    assert suffixes.propose("a", [77], 8) == []


def test_answers_are_remembered_and_prompts_are_not(real: Callable[[int], Trees]) -> None:
    suffixes = Suffixes(real(10))
    follow(suffixes, "a", [40, 41, 42, 43], [50, 51, 52, 53, 54])
    suffixes.forget(["a"])
    follow(suffixes, "b", PROMPT, [50, 51, 52])
    assert suffixes.propose("b", [], 8) == [53, 54]
    assert suffixes.propose("b", [40, 41], 8) == []
    # The answer of one that is still written, too.
    follow(suffixes, "c", PROMPT, [51])
    follow(suffixes, "b", PROMPT, [50, 51, 52, 60, 61])
    assert suffixes.propose("c", [60], 8) == [61]


@pytest.mark.parametrize("remembered", [0, 2])
def test_the_oldest_answers_are_forgotten(real: Callable[[int], Trees], remembered: int) -> None:
    suffixes = Suffixes(real(remembered))
    for number in range(4):
        follow(suffixes, str(number), PROMPT, [10 * number + 50, 10 * number + 51])
        suffixes.forget([str(number)])
    follow(suffixes, "new", PROMPT, [9])  # which takes a place, too
    found = [suffixes.propose("new", [10 * number + 50], 1) for number in range(4)]
    assert found == [[], [], [], [81] if remembered else []]

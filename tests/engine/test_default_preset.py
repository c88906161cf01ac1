"""A preset for requests that name no formula: programs that know nothing of formulas run on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines

PRESETS = Path(__file__).parents[2] / "configs" / "presets"
TEXTS = ["The value of the expression is", "def add(a, b):"]
CHAT: Any = [{"role": "user", "content": TEXTS[0]}]
GREEDY: dict[str, Any] = dict(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[Any]:
    settings = {"presets": str(PRESETS), "default_preset": "poe"}
    with engines.engine(tiny_model, additional_config={"marith": settings}) as llm:
        yield llm
        engines.assert_all_returned(llm)


def asked(formula: str | None, **other: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**GREEDY | other, extra_args={"marith": formula} if formula else None)


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(choice.token_ids) for output in outputs for choice in output.outputs]


def test_what_names_no_formula_gets_the_default(llm: Any) -> None:
    for ask in (lambda params: llm.generate(TEXTS, params), lambda params: llm.chat(CHAT, params)):
        silent, named, plain = (tokens(ask(asked(formula))) for formula in (None, "poe", "base"))
        assert silent == named
        assert silent != plain


def test_every_choice_is_the_defaults(llm: Any) -> None:
    sampled = dict(temperature=1.0, n=2, seed=5)
    silent, named = (tokens(llm.generate(TEXTS, asked(formula, **sampled))) for formula in (None, "poe"))
    assert silent == named
    assert len(silent) == 4


def test_the_clients_parameters_stay_as_they_are(llm: Any) -> None:
    params = asked(None)
    params.extra_args = {"somebody": "else"}
    assert tokens(llm.generate(TEXTS, params)) == tokens(llm.generate(TEXTS, asked("poe")))
    assert params.extra_args == {"somebody": "else"}

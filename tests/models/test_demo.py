"""The demo without an engine: what it shows, and that it claims no more than the numbers do."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vllm_marith import demo
from vllm_marith.demo import CASES, EITHER, NEITHER, PLAIN, WITHOUT, Measured
from vllm_marith.models import ATTRIBUTES, Paths


def test_the_demo_from_texts_to_closing(made: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def write(llm: object, case: demo.Case, seeds: range, sampling: dict) -> list[str]:
        assert sampling == {"temperature": 0.7, "max_tokens": 16, "min_tokens": 16}
        asked.extend((case.name, seed) for seed in seeds)
        return ["def f(self):\n    return self.x\n"] * len(seeds)

    monkeypatch.setattr(demo, "ensure", lambda home, only: made)
    monkeypatch.setattr(demo, "start", lambda paths: None)
    monkeypatch.setattr(demo, "write", write)
    console = Console(width=120, record=True, file=io.StringIO())
    results = demo.run(None, tokens=16, samples=5, seed=10, temperature=0.7, console=console)
    assert sorted(asked) == sorted((case.name, seed) for case in CASES for seed in range(10, 15))
    assert [result.name for result in results] == [
        *(case.name for case in CASES),
        *(f"real {attribute}" for attribute in ATTRIBUTES),
    ]
    assert all(len(result.texts) == 5 for result in results)
    shown = console.export_text()
    assert shown.count("def f(self):") == len(CASES)
    assert "Subtracting code left the share of code text" in shown


def measured(name: str, perplexity: float = 100.0, count: int = 100, **rates: float) -> Measured:
    shares = dict.fromkeys(demo.LABELS, 0.0) | rates
    return Measured(name, "how", ["text"] * count, shares, perplexity)


def closing(**changed: Measured) -> str:
    results = {case.name: measured(case.name) for case in CASES}
    results |= {f"real {a}": measured(f"real {a}", perplexity=150.0) for a in ATTRIBUTES}
    results |= {
        PLAIN.name: measured(PLAIN.name, code=0.4, prose=0.2),
        WITHOUT.name: measured(WITHOUT.name, code=0.02),
        NEITHER.name: measured(NEITHER.name, prose=0.9),
    }
    return demo.closing(results | changed)


def test_the_closing_says_what_moved() -> None:
    said = closing()
    assert "took the share of code text from 40% to 2%" in said
    assert "took the share of prose text from 20% to 90%" in said
    assert "no formula's is above that" in said


def test_the_closing_claims_nothing_that_chance_does() -> None:
    said = closing(**{WITHOUT.name: measured(WITHOUT.name, count=20, code=0.3)})
    assert "took the share of code" not in said
    assert "within what chance does to 20 texts" in said


def test_the_closing_admits_lost_fluency() -> None:
    said = closing(**{EITHER.name: measured(EITHER.name, perplexity=4000.0)})
    assert f"less fluent than that: {EITHER.name}." in said
    assert "no formula's" not in said


def test_every_case_parses() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        formula = case.parsed()
        if formula is not None:
            formula.check()
            assert set(formula.terms) <= set(demo.TERMS)
            assert all(formula.terms[name].to_dict() == demo.TERMS[name] for name in formula.terms)


@pytest.mark.parametrize("width", [60, 80, 130])
def test_texts_are_shown_as_they_are(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(demo.side_by_side(["[bold]x[/nope]\n" + "long line " * 20] * len(CASES), width))
    shown = console.export_text()
    assert shown.count("[bold]x[/nope]") == len(CASES)
    assert max(map(len, shown.splitlines())) <= width

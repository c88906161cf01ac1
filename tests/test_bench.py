"""The benchmark's own parts that need no engine; `make bench` runs the rest."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_marith import Formula

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("bench", "bench_peers", "measuring")]:
        del sys.modules[name]


@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize("terms", range(1, 9))
def test_formulas_have_the_terms_that_are_asked_for(terms: int) -> None:
    from measuring.work import formula_text

    assert sorted(Formula.parse(formula_text(terms)).terms) == [f"t{i}" for i in range(terms)]


@pytest.mark.usefixtures("measuring")
def test_work_counts_one_answer_a_formula() -> None:
    from measuring.work import Maker

    make = Maker([4, 7])
    formulas, rows, requests = make.formulas(3, 3), make.same_rows(3, 3), make.same_requests(3)
    assert [w.tokens for w in (formulas, rows, requests)] == [15, 15, 15]
    assert [w.requests_an_answer for w in (formulas, rows, requests)] == [1, 3, 1]
    assert [p.max_tokens for p in rows.params] == [4, 4, 4, 7, 7, 7, 4, 4, 4]
    assert len(set(rows.texts)) == 9


@pytest.mark.usefixtures("measuring")
def test_ratios_are_of_neighbours() -> None:
    from measuring.runs import Run, ratio

    ours = [Run(seconds, [], []) for seconds in (1.0, 20.0, 3.0)]
    theirs = [Run(seconds, [], []) for seconds in (0.9, 20.0, 3.3)]
    assert ratio(ours, theirs) == {"median": 1.0, "low": 0.95, "high": 1.05}


@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize("sections", [["vocabulary"], ["concurrency", "vocabulary"]], ids=len)
def test_a_result_is_drawn_whatever_sections_it_has(tmp_path: Path, sections: list[str]) -> None:
    from measuring import figure

    over = {"median": 0.97, "low": 0.96, "high": 0.99}
    speeds = dict.fromkeys(figure.SIDES, 100.0)
    rows: dict[str, list[dict[str, Any]]] = {
        "concurrency": [{"concurrent": n, "tokens_per_s": speeds, "over_same_rows": over} for n in (1, 8)],
        "vocabulary": [{"vocabulary": n, "over_same_rows": over} for n in (2048, 32_000)],
    }
    path = tmp_path / "figure.png"
    figure.draw({"model": "m", "machine": "x", **{name: rows[name] for name in sections}}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("measuring")
def test_a_result_without_ratios_is_not_drawn(tmp_path: Path) -> None:
    from measuring import figure

    with pytest.raises(ValueError, match="nothing to draw"):
        figure.draw({"model": "m", "machine": "x", "step": []}, tmp_path / "figure.png")

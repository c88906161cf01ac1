"""The report of made-up results: whole, self-contained, and the same from a file as from memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.evaluations import Outcome, made_up
from vllm_marith.evaluation import Results, Scenario, ScenarioError
from vllm_marith.evaluation.sections import sections
from vllm_marith.evaluation.sections.section import Section

pytest.importorskip("matplotlib", reason="the extra `eval` brings it")

FIGURES = {"control_ranked", "control_curves", "curves", "cross", "stress"}


def outcome(key: str) -> Outcome:
    """Rates at the edges, too: a method that leaves nothing and one that leaves all."""
    rate = {"control/PreAdd": 0.0, "control/union": 1.0}.get(key.rpartition("/")[0], 0.4)
    return Outcome({"kind": {"code": rate, "prose": (1 - rate) / 2}, "topic": {"files": 0.3}}, nats=4.2)


@pytest.fixture(scope="module")
def results() -> Results:
    return made_up(Scenario.load("embedded"), outcome, real=True)


@pytest.fixture(scope="module")
def parts(results: Results) -> list[Section]:
    return sections(results)


@pytest.fixture(scope="module")
def html(results: Results, parts: list[Section]) -> str:
    from vllm_marith.evaluation.report import html

    return html(results, parts)


def test_every_finding_figure_and_limit_is_in_it(results: Results, parts: list[Section], html: str) -> None:
    text = re.sub(r"\s+", " ", html.replace("&#39;", "'").replace("&#34;", '"').replace("&gt;", ">"))
    assert {plot.name for part in parts for plot in part.plots} == FIGURES
    for part in parts:
        for sentence in (*part.findings, *part.how, *(plot.caption for plot in part.plots)):
            assert sentence in text
    for paragraph in results.scenario.limits:
        assert paragraph in text
    assert html.count("<svg") == len(FIGURES)
    for seed in results.seeds:
        assert f"seed {seed}" in text


def test_it_loads_nothing_and_runs_nothing(html: str) -> None:
    assert "<script" not in html  # the texts have some, as models may well write
    assert "&lt;script&gt;" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#)""", html.replace("xlink:href", "href"))
    assert "@import" not in html


def test_figures_are_files(parts: list[Section], tmp_path: Path) -> None:
    from vllm_marith.evaluation.report import write_figures

    written = write_figures(parts, tmp_path / "figures")
    assert {path.stem for path in written} == FIGURES
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_report_can_be_made_again_from_a_file(results: Results, html: str, tmp_path: Path) -> None:
    from vllm_marith.evaluation import report

    results.save(tmp_path / "results.json")
    again = Results.read(tmp_path / "results.json")
    assert again == results
    assert report.html(again, sections(again)) == html


def test_the_summary_is_the_findings(parts: list[Section]) -> None:
    from vllm_marith.evaluation.report import summary

    said = summary(parts)
    assert all(finding in said for part in parts for finding in part.findings)


@pytest.mark.parametrize(("content", "said"), [("{}", "holds no results"), ("[", "holds no results")])
def test_another_file_is_refused(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ScenarioError, match=said):
        Results.read(file)
    with pytest.raises(ScenarioError, match="cannot be read"):
        Results.read(tmp_path / "nowhere")

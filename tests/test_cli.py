"""The command: sentences and exit codes instead of tracebacks; and the demo's plumbing without an engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from vllm_marith import cli, demo
from vllm_marith.demo import CASES, GUIDED, PLAIN, PROMPTED, UNION, WITHOUT, Measured


def marith(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["marith", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


@pytest.mark.parametrize("command", ["models", "demo", "explain", "check", "bench"])
def test_every_command_has_help(monkeypatch, capsys, command: str) -> None:
    assert marith(monkeypatch, command, "--help") == 0
    assert "Usage: marith" in capsys.readouterr().out


def test_explain_prints_the_plan(monkeypatch, capsys) -> None:
    terms = json.dumps({"child": {"system": "You are a child."}})
    assert marith(monkeypatch, "explain", "child - 0.6*adult", "--terms", terms) == 0
    shown = capsys.readouterr().out
    assert "You are a child." in shown
    assert "-1.5" in shown  # divided by the sum of weights, 0.4


def test_explain_knows_presets_and_requests(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "calm.yaml").write_text("terms: {loud: {system: Shout.}}\nformula: base - 0.5*loud\n")
    assert marith(monkeypatch, "explain", "calm", "--presets", str(tmp_path)) == 0
    assert "Shout." in capsys.readouterr().out
    request = {"formula": "loud + base", "normalize": "none"}
    assert marith(monkeypatch, "explain", json.dumps(request), "--presets", str(tmp_path)) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "child - *adult"], "  child - *adult\n          ^"),
        (["explain", "a - b"], "sum to 0"),
        (["explain", "a", "--terms", "[1"], "--terms is not JSON"),
        (["explain", "a", "--terms", "[1]"], "must be a JSON object"),
        (["explain", "a", "--terms", '{"a": {"sistem": "x"}}'], "sistem"),
        (["explain", "a", "--normalize", "max"], "normalize must be"),
        (["explain", "a", "--presets", "/nowhere"], "/nowhere: no such file or directory"),
        (["explain", '{"formula": "a"}', "--normalize", "sum"], "do not apply"),
        (["models", "--only", "bigger"], "no artefact 'bigger'"),
    ],
)
def test_a_mistake_is_a_sentence(monkeypatch, capsys, arguments: list[str], said: str) -> None:
    assert marith(monkeypatch, *arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("marith: ")
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_wrong_usage_has_its_own_code(monkeypatch, capsys) -> None:
    assert marith(monkeypatch, "explain") == 2
    assert marith(monkeypatch, "no-such-command") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_interrupting_is_quiet(monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "ensure", interrupted)
    assert marith(monkeypatch, "models") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_installed_script_runs_without_torch() -> None:
    code = (
        "import sys; from vllm_marith.cli import main; sys.argv = ['marith', 'explain', '2*a - b']\n"
        "try: main()\n"
        "except SystemExit as stopped: assert not stopped.code\n"
        "for heavy in ('torch', 'vllm', 'transformers'): assert heavy not in sys.modules, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_list_says_what_is_there(monkeypatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "manifest.json").write_text(json.dumps({"recipe": "old", "seconds": 98.0}))
    assert marith(monkeypatch, "models", "--list", "--home", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"big +outdated +98", shown)
    assert re.search(r"referee +missing", shown)


def test_check_fails_with_the_environment(monkeypatch, capsys) -> None:
    plugin = pytest.importorskip("vllm_marith.engine.plugin")
    monkeypatch.setattr(plugin, "environment_report", lambda: [("vllm", False, "is not the supported one")])
    assert marith(monkeypatch, "check") == 1
    assert "is not the supported one" in capsys.readouterr().out
    monkeypatch.setattr(plugin, "environment_report", lambda: [("vllm", True, "fine")])
    assert marith(monkeypatch, "check") == 0


def test_bench_passes_arguments_and_exit_code_on(monkeypatch) -> None:
    called: list[list[str]] = []

    def call(command: list[str]) -> int:
        called.append(command)
        return 3

    monkeypatch.setattr(cli.subprocess, "call", call)
    monkeypatch.setattr(cli.Path, "is_file", lambda _: True)
    assert marith(monkeypatch, "bench", "--rows", "4", "fusion") == 3
    assert called[0][-3:] == ["--rows", "4", "fusion"]


def test_bench_without_a_checkout_says_where_it_is(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli.Path, "is_file", lambda _: False)
    assert marith(monkeypatch, "bench") == 1
    assert "scripts/bench.py" in capsys.readouterr().err


# The demo


def measured(name: str, perplexity: float = 100.0, count: int = 100, **rates: float) -> Measured:
    shares = dict.fromkeys(demo.LABELS, 0.0) | rates
    return Measured(name, "how", ["text"] * count, shares, perplexity)


def closing(**changed: Measured) -> str:
    results = {
        PLAIN.name: measured(PLAIN.name, code=0.4, legal=0.2),
        WITHOUT.name: measured(WITHOUT.name, code=0.02),
        PROMPTED.name: measured(PROMPTED.name, legal=0.6),
        GUIDED.name: measured(GUIDED.name, legal=0.9),
    }
    return demo.closing(results | changed)


def test_the_closing_says_what_moved() -> None:
    said = closing()
    assert "took the share of code text from 40% to 2%" in said
    assert "took the share of legal text from 60% to 90%" in said
    assert "No formula more than doubled" in said


def test_the_closing_claims_nothing_that_chance_does() -> None:
    said = closing(**{WITHOUT.name: measured(WITHOUT.name, count=20, code=0.3)})
    assert "took the share of code" not in said
    assert "within what chance does to 20 texts" in said


def test_the_closing_admits_lost_fluency() -> None:
    said = closing(**{UNION.name: measured(UNION.name, perplexity=4000.0)})
    assert f"less fluent: {UNION.name} (4000)" in said
    assert "No formula" not in said


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
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(demo.side_by_side(["[bold]x[/nope]\n" + "long line " * 20] * len(CASES), width))
    shown = console.export_text()
    assert shown.count("[bold]x[/nope]") == len(CASES)
    assert max(map(len, shown.splitlines())) <= width

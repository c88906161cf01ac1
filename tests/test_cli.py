"""The command: sentences and exit codes instead of tracebacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.saved_formulas import model, saved
from vllm_marith import cli


def marith(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["marith", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


@pytest.mark.parametrize("command", ["models", "demo", "chat", "explain", "import", "check", "bench"])
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


def test_import_writes_a_preset_that_explain_reads(monkeypatch, capsys, tmp_path: Path) -> None:
    file, preset = tmp_path / "saved.json", tmp_path / "less adult.yaml"
    file.write_text((model("child", "x/one") - 0.5 * model("adult", "y/two")).text())
    assert marith(monkeypatch, "import", str(file)) == 0
    shown = capsys.readouterr().out
    assert "name: saved\n" in shown
    assert "formula: child - 0.5*adult\n" in shown
    assert marith(monkeypatch, "import", str(file), "--output", str(preset), "--base", "y/two") == 0
    assert capsys.readouterr().out == ""
    assert "model: one" in preset.read_text()
    assert marith(monkeypatch, "explain", "less_adult", "--presets", str(tmp_path)) == 0
    assert "child - 0.5*adult" in capsys.readouterr().out


def test_import_says_what_is_wrong(monkeypatch, capsys, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    file.write_text((model("child") + saved("Abs", formula=model("adult"))).text())
    for arguments, said in (
        ([str(file)], f"marith: {file}: $.terms[1]: Abs has no counterpart"),
        ([str(tmp_path)], f"marith: {tmp_path} cannot be read: "),
        ([str(tmp_path / "nothing")], "nothing cannot be read: "),
    ):
        assert marith(monkeypatch, "import", *arguments) == 1
        assert said in capsys.readouterr().err
    file.write_text(model("child").text())
    assert marith(monkeypatch, "import", str(file), "--base", "x") == 1
    assert "no model is called 'x'; the models of the file are: hub/big" in capsys.readouterr().err
    assert marith(monkeypatch, "import", str(file), "--output", str(tmp_path)) == 1
    assert "cannot be written" in capsys.readouterr().err


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
        (["chat", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["chat", "--url", "nowhere"], "no server answers at nowhere"),
        (["chat", "--formula", "{"], "--formula is not JSON"),
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


def test_the_demo_without_vllm_says_so_at_once(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda _: None)
    assert marith(monkeypatch, "demo") == 1
    assert "the demo needs vLLM" in capsys.readouterr().err


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

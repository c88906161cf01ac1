"""The command on a model that is not ours: engine, classifier as judge, the plain model as referee."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support import judges
from vllm_marith import cli
from vllm_marith.evaluation import Results, Scenario, ScenarioError, Sizes, evaluate
from vllm_marith.evaluation.judging import classifier, repetition
from vllm_marith.evaluation.scenario import Arm
from vllm_marith.evaluation.writing import Writer

SMALL = {
    "name": "small",
    "about": "A random model.",
    "requests": ["Who?", "What is it?"],
    "tokens": 8,
    "engine": {
        "model": None,
        "constituents": {"expert": None},
        "options": {"max_model_len": 256, "block_size": 32},
    },
    "terms": {"rude": {"system": "You are rude."}, "expert": {"model": "expert"}},
    "judges": {"tone": None},
    "referee": "model",
    "control": {
        "axis": "tone",
        "unwanted": "toxic",
        "requests": ["Why?"],
        "methods": {
            "linear": {"formula": "base - strength*rude", "strengths": [0.3, 0.6]},
            "DExperts": {"formula": "base + strength*(expert - base)", "strengths": [1]},
        },
    },
    "stress": {"start": "base", "operands": ["rude", "base"], "depths": [0, 2], "tokens": 12},
    "speculation": {
        "tokens": 7,
        "requests": ["Who?", "What is it?"],
        "formulas": {
            "lagging": {"formula": "base + 0.5*rude", "factors": {"rude": 3}},
            "small": {"formula": "superseded(expert, base)", "factors": {"base": 3}},
        },
    },
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.make(tmp_path_factory.mktemp("judge"), sharpness=4)


def test_a_model_of_ones_own(
    file: Path, judge: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `eval` brings it")
    report, kept = tmp_path / "report.html", tmp_path / "results.json"
    models = ["--model", str(tiny_model), "--judge", f"tone={judge}"]
    sizes = ["--samples", "4", "--seeds", "3,5"]
    files = ["--report", str(report), "--results", str(kept)]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_marith.cli", "eval", "--scenario", str(file), *models, *sizes, *files],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    results = Results.read(kept)
    assert set(results.arms) == {
        "plain",
        "control/plain",
        "control/linear/0.3",
        "control/linear/0.6",
        "stress/0",
        "stress/2",
    }
    for key, arm in results.arms.items():
        assert arm.seeds == [3] * 4 + [5] * 4
        longest = 12 if key.startswith("stress") else 8
        assert max(arm.tokens) == longest
        assert all(loss > 0 for loss, tokens in zip(arm.losses, arm.tokens, strict=True) if tokens)
        assert arm.labels["tone"] == classifier("tone", str(judge), [])(arm.texts)
    (drafts,) = results.drafts.values()
    assert [len(turns) for turns in drafts.turns.values()] == [6, 6, 6]
    assert drafts.calls("off") == 2.0  # both terms, for every token
    assert 1.0 < drafts.calls("fixed") < 3.0
    assert sum(turn.drafted for turn in drafts.turns["fixed"]) > 0
    assert drafts.answers["off"] == drafts.answers["fixed"] == drafts.answers["auto"]
    assert [len(answer) for answer in drafts.answers["off"]] == [7, 7]
    assert "lagging: base + 0.5*rude" in report.read_text()
    assert "small was left out: nobody named the constituent" in report.read_text()
    assert "DExperts was left out: nobody named the constituent 'expert'." in done.stdout
    assert "DExperts was left out" in report.read_text()
    again = tmp_path / "again.html"
    monkeypatch.setattr(sys, "argv", ["marith", "eval", "--from", str(kept), "--report", str(again)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert again.read_text() == report.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "FILE"], "'small' has no model of its own; --model names one"),
        (
            ["--scenario", "FILE", "--model", "x"],
            "nobody judges 'tone'; --judge tone=CLASSIFIER names who does",
        ),
        (["--report", "/nowhere/report.html"], "there is no folder /nowhere to write report.html to"),
        (["--judge", "tone"], "--judge is NAME=MODEL"),
        (["--seeds", "1,x"], "--seeds are whole numbers"),
        (["--seeds", "1,1"], "--seeds has a seed twice"),
        (["--scenario", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (["--from", "/nowhere.json"], "/nowhere.json cannot be read"),
    ],
)
def test_a_mistake_is_a_sentence(
    arguments: list[str], said: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `eval` brings it")
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["marith", "eval", *given])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert said in capsys.readouterr().err


def test_an_engine_that_does_not_start_is_a_sentence(
    file: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(scenario: Scenario, paths: object) -> None:
        raise ValueError("1 validation error for ModelConfig\n  Invalid repository ID: '/nowhere'")

    monkeypatch.setattr(Writer, "start", refused)
    scenario = Scenario.load(file).with_models("/nowhere", judges={"tone": str(judge)})
    with pytest.raises(
        ScenarioError, match=r"the engine does not start: .* ModelConfig Invalid repository ID"
    ):
        evaluate(scenario, Sizes(2))


def test_a_missing_package_is_said_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "matplotlib" else SimpleNamespace())
    monkeypatch.setattr(sys, "argv", ["marith", "eval"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the report needs matplotlib; pip install 'vllm-marith[eval]' brings it" in capsys.readouterr().err


def test_a_judge_without_the_label_is_refused(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"has no label 'rude'; it has plain, toxic, legal"):
        classifier("tone", str(judge), ["toxic", "rude"])
    with pytest.raises(ScenarioError, match="cannot be loaded"):
        classifier("tone", str(tmp_path), [])


def test_labels_that_go_together_need_to_be_likely(tmp_path: Path) -> None:
    path = judges.make(tmp_path / "multi", problem_type="multi_label_classification", sharpness=4)
    texts = ["The", "Permission is granted", "x = 1", "It is what it is"] * 3
    found = classifier("tone", str(path), [])(texts)
    names = judges.labels(path)
    for text, label in zip(texts, found, strict=True):
        p = [judges.probability(path, text, i) for i in range(len(names))]
        best = max(range(len(names)), key=lambda i: p[i])
        assert label == (names[best] if p[best] > 0.5 else "other")


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(0.25)
    assert repetition([7] * 10) == pytest.approx(7 / 8)
    assert repetition([1, 2]) == 0.0


class FakeLLM:
    """Answers with the request and its seed, and says a log-probability for every token of a prompt."""

    def chat(self, conversations: Any, params: Any, use_tqdm: bool) -> list[Any]:
        return [
            SimpleNamespace(
                prompt_token_ids=[1, len(messages[-1]["content"])],
                outputs=[SimpleNamespace(text=f"{messages[-1]['content']} {p.seed}", token_ids=[5, 6])],
            )
            for messages, p in zip(conversations, params, strict=True)
        ]

    def generate(self, prompts: Any, params: Any, use_tqdm: bool) -> list[Any]:
        return [
            SimpleNamespace(
                prompt_logprobs=[None]
                + [{token: SimpleNamespace(logprob=-float(token))} for token in p["prompt_token_ids"][1:]]
            )
            for p in prompts
        ]


def test_requests_are_answered_in_turn_and_losses_are_of_the_answer_alone(file: Path) -> None:
    pytest.importorskip("vllm")
    writer = Writer(FakeLLM(), Scenario.load(file).with_models("x"))  # type: ignore[arg-type]
    written = writer.write(Arm("a", "base - 0.3*rude"), (1, 2), 3)
    assert [text.request for text in written] == ["Who?", "What is it?", "Who?"] * 2
    assert len({text.text for text in written}) == 6
    own = writer.write(Arm("b", None, requests=("Why?",)), (1,), 2)
    assert {text.request for text in own} == {"Why?"}
    prompts = {"Why?": [1, 2, 3], "Who?": [1], "What is it?": [1]}
    assert writer.losses(own, prompts) == [(11.0, 2)] * 2

"""`ensure`: whole or absent, made once, the same for the same seed, quick when there is nothing to do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from vllm_marith.models import ARTEFACTS, DEMO, RECIPE, ModelsError, Paths, Recipe, ensure
from vllm_marith.models.recipe import NEEDS
from vllm_marith.models.store import UNFINISHED, is_made, manifest
from vllm_marith.models.workshop import Workshop


def test_everything_is_made_and_reported(made: Paths, recipe: Recipe) -> None:
    assert all(is_made(name, made.home, recipe) for name in ARTEFACTS)
    report = json.loads(made.report.read_text())
    assert set(report) == set(ARTEFACTS)
    assert report["big"]["held_out"]["perplexity"].keys() == {"prose", "code", "legal"}
    assert not list(made.home.glob(f"{UNFINISHED}*"))
    assert not list(made.home.rglob("*.pt"))
    assert not list(made.home.rglob("*.bin"))


def test_a_second_run_is_quick_and_imports_no_torch(made: Paths, recipe: Recipe) -> None:
    script = (
        "import sys, time\n"
        "from vllm_marith.models import ensure\n"
        "from vllm_marith.models.recipe import *\n"
        f"recipe = {recipe!r}\n"
        "started = time.monotonic()\n"
        f"ensure({str(made.home)!r}, recipe=recipe)\n"
        "assert time.monotonic() - started < 0.5\n"
        "for heavy in ('torch', 'transformers', 'numpy', 'vllm'): assert heavy not in sys.modules, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_same_seed_makes_the_same_bytes(begun: Path, made: Paths, recipe: Recipe) -> None:
    ensure(begun, only=["tokenizer"], force=True, progress=False, recipe=recipe)
    told = [(place / "tokenizer" / "tokenizer.json").read_bytes() for place in (begun, made.home)]
    assert told[0] == told[1]
    ensure(begun, only=["big", "judge"], progress=False, recipe=recipe)
    for name in ("big", "judge"):
        again = (begun / name / "model.safetensors").read_bytes()
        assert again == (made.home / name / "model.safetensors").read_bytes()


def test_another_seed_makes_another_model(begun: Path, made: Paths, recipe: Recipe) -> None:
    other = replace(recipe, seed=1)
    for name in ("corpus", "tokenizer"):  # pretend that these come out the same, to save the time
        told = manifest(begun / name) | {"recipe": other.fingerprint(name)}
        (begun / name / "manifest.json").write_text(json.dumps(told))
    ensure(begun, only=["big"], progress=False, recipe=other)
    again = (begun / "big" / "model.safetensors").read_bytes()
    assert again != (made.big / "model.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_where_it_stopped(
    begun: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Workshop.make
    attempts: list[str] = []

    def interrupted(self: Workshop, name: str, folder: Path, tick) -> dict:
        attempts.append(name)
        measured = make(self, name, folder, tick)
        if attempts == ["big", "judge"]:
            raise KeyboardInterrupt  # all files written, the artefact not yet in its place
        return measured

    monkeypatch.setattr(Workshop, "make", interrupted)
    wanted = ["big", "judge", "referee"]
    with pytest.raises(KeyboardInterrupt):
        ensure(begun, only=wanted, progress=False, recipe=recipe)
    assert is_made("big", begun, recipe)
    assert not (begun / "judge").exists()
    ensure(begun, only=wanted, progress=False, recipe=recipe)
    assert attempts == ["big", "judge", "judge", "referee"]
    assert not list(begun.glob(f"{UNFINISHED}*"))


def test_force_makes_only_what_is_named(begun: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(begun, only=["judge"], progress=False, recipe=recipe)
    remade: list[str] = []
    make = Workshop.make

    def noted(self: Workshop, name: str, *rest) -> dict:
        remade.append(name)
        return make(self, name, *rest)

    monkeypatch.setattr(Workshop, "make", noted)
    ensure(begun, only=["judge"], progress=False, recipe=recipe)
    assert remade == []
    ensure(begun, only=["judge"], force=True, progress=False, recipe=recipe)
    assert remade == ["judge"]
    assert is_made("judge", begun, recipe)


def test_a_changed_recipe_remakes_exactly_what_depends_on_it() -> None:
    changed = replace(RECIPE, big=replace(RECIPE.big, course=replace(RECIPE.big.course, steps=7)))
    outdated = {name for name in ARTEFACTS if changed.fingerprint(name) != RECIPE.fingerprint(name)}
    assert outdated == {"big", "draft", "expert", "anti", "lora_legal", "files", "network"}
    assert all(replace(RECIPE, seed=9).fingerprint(name) != RECIPE.fingerprint(name) for name in ARTEFACTS)


def test_needs_come_first() -> None:
    for index, name in enumerate(ARTEFACTS):
        assert set(NEEDS[name]) <= set(ARTEFACTS[:index])
    assert set(DEMO) <= set(ARTEFACTS)


def test_two_processes_do_not_make_models_at_once(begun: Path, recipe: Recipe) -> None:
    with FileLock(begun / ".lock"):
        waiting = threading.Thread(
            target=ensure, args=(begun,), kwargs={"only": ["judge"], "progress": False, "recipe": recipe}
        )
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        assert not (begun / "judge").exists()
    waiting.join(timeout=60)
    assert is_made("judge", begun, recipe)


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match="no artefact 'bigger'; there are corpus, tokenizer, big"):
        ensure(tmp_path, only=["bigger"])


def test_a_home_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelsError, match=r"cannot create .*MARITH_HOME"):
        ensure(tmp_path / "file" / "home", progress=False)

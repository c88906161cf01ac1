"""Exchanging the presets of a running server: all or nothing, on every API server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support import api_server
from vllm_marith.language import Presets
from vllm_marith.serving import reload as reloading
from vllm_marith.serving.reload import Reloader

SHY = "formula: base - 0.1*loud\nterms: {loud: {system: Shout.}}\n"


def names(http: TestClient) -> list[str]:
    """The presets in force, as both lists tell them."""
    listed = [model["id"] for model in http.get("/v1/models").json()["data"]]
    formulas = [preset["name"] for preset in http.get("/v1/marith/formulas").json()["data"]]
    assert listed == ["tiny", "wizard", *formulas]
    return formulas


def serves(http: TestClient, model: str) -> bool:
    return "error" not in http.post("/v1/completions", json={"prompt": "x", "model": model}).json()


def test_new_changed_and_removed_presets(http: TestClient, presets: Path) -> None:
    (presets / "shy.yaml").write_text(SHY)
    (presets / "plain.yaml").unlink()
    steer = presets / "steer.yaml"
    steer.write_text(steer.read_text().replace("0.5*", "0.25*"))
    assert not serves(http, "shy")
    answer = http.post("/v1/marith/reload")
    assert answer.status_code == 200
    assert [preset["name"] for preset in answer.json()["data"]] == names(http) == ["shy", "steer"]
    assert serves(http, "shy")
    assert not serves(http, "plain")
    found = {preset["name"]: preset for preset in answer.json()["data"]}
    assert found["steer"]["formula"] == "child - 0.25*adult"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("bad.yaml", "formula: base - *steer\n", "bad.yaml:1: expected a term or a number"),
        ("bad.yaml", "description: x\nformual: base\n", "bad.yaml:2:"),
        ("bad.yaml", "formula: [\n", "bad.yaml:2: not valid YAML"),
        ("tiny.yaml", "formula: base\n", "the preset 'tiny' has the name of the served model"),
        ("wizard.yaml", "formula: base\n", "the preset 'wizard' has the name of a LoRA adapter"),
    ],
)
def test_a_bad_file_changes_nothing(
    http: TestClient, presets: Path, file: str, text: str, reason: str
) -> None:
    before = http.get("/v1/marith/formulas").json()
    (presets / "another.yaml").write_text(SHY)
    (presets / file).write_text(text)
    answer = http.post("/v1/marith/reload")
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"marith: {reason}")
    assert str(presets.parent) not in message
    assert "the presets stay as they are" in message
    assert http.get("/v1/marith/formulas").json() == before
    assert not serves(http, "another")
    (presets / file).unlink()
    assert http.post("/v1/marith/reload").status_code == 200
    assert serves(http, "another")


def test_a_vanished_folder_changes_nothing(http: TestClient, presets: Path) -> None:
    presets.rename(presets.with_name("gone"))
    answer = http.post("/v1/marith/reload")
    assert answer.status_code == 400
    assert "no such file or directory" in answer.json()["error"]["message"]
    assert names(http) == ["plain", "steer"]


def test_admitted_formulas_stay_compiled_as_they_were(presets: Path) -> None:
    """The same text may mean another formula after a reload: nothing of the old one is remembered."""
    from vllm_marith.engine.frontend.admission import Admission

    engine = api_server.FakeEngineClient(presets)
    admission = Admission(engine.renderer)
    compiled = admission._compiler("steer")
    assert (str(compiled.asked.formula), compiled.label) == ("child - 0.5*adult", "steer")
    steer = presets / "steer.yaml"
    steer.write_text(steer.read_text().replace("0.5*", "0.25*"))
    admission.use(Presets.load(presets))
    again = admission._compiler("steer")
    assert str(again.asked.formula) == "child - 0.25*adult"


def test_labels_of_figures_are_presets_or_one_word(presets: Path) -> None:
    from vllm_marith.engine.frontend.admission import Admission

    compiler = Admission(api_server.FakeEngineClient(presets).renderer)._compiler
    for value, label in [
        ("steer", "steer"),
        (" (steer) ", "steer"),
        ('{"formula": "steer"}', "steer"),
        ("2*steer", "custom"),
        ("child", "custom"),
        ('{"formula": "x", "terms": {"x": {}}}', "custom"),
    ]:
        assert compiler(value)[2] == label, value


def test_long_requests_are_not_remembered(presets: Path) -> None:
    """A client could otherwise fill the server's memory with a thousand of the longest."""
    from vllm_marith.engine.frontend.admission import Admission

    compiler = Admission(api_server.FakeEngineClient(presets).renderer)._compiler
    for length, kept in ((10, 1), (1 << 14, 1), (10, 1)):
        compiler(json.dumps({"formula": "x", "terms": {"x": {"system": length * "y"}}}))
        assert compiler._remembered.cache_info().currsize == kept


def test_a_signal_reloads_and_survives_a_bad_file(presets: Path) -> None:
    app = api_server.make_app(presets)
    before = signal.getsignal(signal.SIGHUP)

    async def scenario() -> None:
        await api_server.start(app)
        for text, in_force in [
            (SHY, "base - 0.1*loud"),
            ("formula: base - *", "base - 0.1*loud"),
            ("formula: base", "base"),
        ]:
            (presets / "shy.yaml").write_text(text)
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.2)
            assert str(app.state.marith_admission.presets.formulas["shy"]) == in_force
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    try:
        asyncio.run(scenario())
    finally:
        signal.signal(signal.SIGHUP, before)


def reloader(presets: Path, bell: Path | None) -> tuple[Any, Reloader]:
    """One API server's part."""
    from vllm_marith.engine.frontend.admission import Admission

    admission = Admission(api_server.FakeEngineClient(presets).renderer)
    return admission, Reloader(admission, lambda: Presets.load(presets), lambda: (["tiny"], []), bell)


def test_several_api_servers(presets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reloading, "_POLL_SECONDS", 0.01)
    bell = tmp_path / "bell"
    servers = [reloader(presets, bell) for _ in range(3)]

    def in_force() -> list[bool]:
        return ["shy" in admission.presets.formulas for admission, _ in servers]

    async def until(wanted: list[bool]) -> None:
        for _ in range(1000):
            if in_force() == wanted:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(in_force())

    async def scenario() -> None:
        listening = [asyncio.create_task(reloader.listen()) for _, reloader in servers]
        (presets / "shy.yaml").write_text("formula: base - *")
        with pytest.raises(ValueError, match=r"shy\.yaml:1"):
            servers[0][1].reload_all()
        assert not bell.exists(), "a bad file is nothing to tell the others"
        (presets / "shy.yaml").write_text(SHY)
        servers[1][1].reload_all()
        assert in_force() == [False, True, False]
        await until([True, True, True])
        (presets / "shy.yaml").unlink()
        reloading.ring(bell)  # what their parent does on SIGHUP
        await until([False, False, False])
        for task in listening:
            task.cancel()

    asyncio.run(scenario())


def test_a_server_by_itself_has_nobody_to_tell(presets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert reloading.shared_bell() is None
    admission, alone = reloader(presets, None)
    (presets / "shy.yaml").write_text(SHY)
    assert "shy" in alone.reload_all().formulas
    assert "shy" in admission.presets.formulas

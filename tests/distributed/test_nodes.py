"""Which nodes may run workers, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_marith.distributed import executor
from vllm_marith.distributed.nodes import Software, here
from vllm_marith.engine.plugin import UnsupportedError

HERE = Software("1.2.0", "abc", "0.32.0+cpu")


@pytest.mark.parametrize(
    ("there", "objection"),
    [
        (HERE, ""),
        (Software("1.2.0", "abc", "0.32.0+cu130"), ""),  # builds for other devices are one version
        (Software(None, None, "0.32.0"), "has no vllm-marith"),
        (Software("1.1.0", "abd", "0.32.0"), "has vllm-marith 1.1.0"),
        (Software("1.2.0", "abd", "0.32.0"), "has a vllm-marith 1.2.0 whose files differ"),
        (Software("1.2.0", "abc", None), "has no vLLM"),
        (Software("1.2.0", "abc", "0.33.0"), "has vLLM 0.33.0 (here it is 0.32.0+cpu)"),
    ],
)
def test_objections(there: Software, objection: str) -> None:
    assert HERE.objection(there) == objection


def test_this_environment_agrees_with_itself() -> None:
    found = here()
    assert None not in (found.marith, found.files, found.vllm)
    assert found == here()


def worker(**changed: Any) -> dict[str, Any]:
    return {"node": "f00", "address": "10.0.0.7", "serves": True, "settings": "{}", **changed}


def test_workers_that_disagree_are_named() -> None:
    assert executor.disagreement([worker(), worker()], "{}") == ""
    assert executor.disagreement([worker(), worker(serves=False)], "{}") == (
        "the workers of this engine disagree: rank 1 on the Ray node 10.0.0.7 (node id f00) "
        "does not serve formulas"
    )
    assert "rank 0" in executor.disagreement([worker(settings='{"a": 1}'), worker()], "{}")


def test_a_refusal_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executor.refuse("")
    with pytest.raises(UnsupportedError, match="why"):
        executor.refuse("why")
    process = SimpleNamespace(name="EngineCore_DP0")
    monkeypatch.setattr(executor.multiprocessing, "current_process", lambda: process)
    with pytest.raises(SystemExit, match="78"):
        executor.refuse("why")
    assert capsys.readouterr().err == "marith: why\n"

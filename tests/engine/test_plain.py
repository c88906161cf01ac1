"""A request without a formula is served bit for bit as vLLM without this package serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines, plain
from vllm_marith import Formula

ENTRY = "vllm.engine.arg_utils:EngineArgs.create_engine_config"
FORMULA = Formula.parse(
    "2*a - 0.5*b + union(a, c)", {"b": {"system": "No."}, "c": {"prompt": "Yes. {input}"}}
)
PLUGIN = ["vllm_marith.engine.patches", "vllm_marith.engine.plugin"]


@pytest.fixture(scope="module")
def absent(tiny_model: Path) -> dict[str, Any]:
    """vLLM that loads no plugins."""
    return plain.in_its_own_process(tiny_model, VLLM_PLUGINS="")


@pytest.fixture(scope="module")
def unnamed(tiny_model: Path) -> dict[str, Any]:
    """The package is installed; nobody has asked for it."""
    return plain.in_its_own_process(tiny_model)


@pytest.fixture(scope="module", params=["named", "unnamed_after"])
def llm(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Any]:
    """An engine that serves formulas, and one that does not in a process where another did."""
    with engines.engine(tiny_model, formulas=request.param == "named") as llm:
        yield llm
        engines.assert_all_returned(llm)


def as_json(outputs: list[Any]) -> Any:
    # JSON keeps every bit of a float; tuples and such become what the other process sent.
    return json.loads(json.dumps(outputs))


def test_absent_is_absent(absent: dict[str, Any]) -> None:
    assert absent["modules"] == []
    assert absent["patched"] == []
    assert absent["scheduler"] == "Scheduler"
    assert len(absent["outputs"]) == 3 + len(plain.ASKED) * len(plain.TEXTS)


def test_unnamed_touches_one_function(unnamed: dict[str, Any]) -> None:
    assert unnamed["patched"] == [ENTRY]
    assert unnamed["scheduler"] == "Scheduler"
    assert set(PLUGIN) <= set(unnamed["modules"])
    assert not [m for m in unnamed["modules"] if m.startswith(("marith_kernels", "vllm_marith.plan"))]
    rooms = tuple(f"vllm_marith.engine.{room}" for room in ("frontend", "core", "worker", "processor"))
    assert not [m for m in unnamed["modules"] if m.startswith(rooms)]


def test_unnamed_is_identical(absent: dict[str, Any], unnamed: dict[str, Any]) -> None:
    assert unnamed["outputs"] == absent["outputs"]


def test_named_is_identical(llm: Any, absent: dict[str, Any]) -> None:
    """Before and after formulas were served."""
    assert set(plain.patched()) > {ENTRY}  # here, then, there is something to leave no trace
    assert as_json(plain.serve(llm)) == absent["outputs"]
    llm.generate(list(plain.TEXTS), FORMULA.sampling_params(temperature=0.9, max_tokens=4), use_tqdm=False)
    assert as_json(plain.serve(llm)) == absent["outputs"]


def test_tokens_beside_formulas_are_identical(llm: Any, absent: dict[str, Any]) -> None:
    """Other rows change a matrix product's last bits, so floats may differ here as in any batch of vLLM's."""
    texts, params = plain.requests()
    beside = FORMULA.sampling_params(temperature=0.9, max_tokens=20)
    mixed = [
        (text, p)
        for text, own in zip(texts, params, strict=True)
        for text, p in ((text, own), (text, beside))
    ]
    outputs = llm.generate([text for text, _ in mixed], [p for _, p in mixed], use_tqdm=False)
    found = as_json([plain.contents(output) for output in outputs[::2]])
    for ours, theirs in zip(found, absent["outputs"][3:], strict=True):
        assert ours[1] == theirs[1]
        assert [completion[:2] for completion in ours[3]] == [completion[:2] for completion in theirs[3]]

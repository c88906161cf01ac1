"""The figures of engines on an API server's /metrics, and who counts them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from vllm_marith.engine.core.figures import CoreFigures
from vllm_marith.engine.group import FIGURES, Cause, GroupSpec
from vllm_marith.engine.worker.figures import ClassifierFigures, WorkerFigures
from vllm_marith.serving import metrics as metrics_module

CORE = {
    "running": 2,
    "waiting": 3,
    "preempted": 1,
    "failed": [("logits", 2)],
    "members": [(2, 1), (3, 4)],
    "fused_rows": [(6, 10)],
    "tokens": [("custom", 7), ("steer", 50)],
    "steps": [("steer", 20)],
    "calls": [(("steer", "base"), 20), (("steer", "mild"), 20)],
    "drafted": [("steer", 60)],
    "accepted": [("steer", 30)],
}
READ: dict[str, Any] = {"texts": 40, "hits": 5, "batches": 2, "seconds": 0.125}
WORKERS: list[dict[str, Any]] = [
    {"fusion_seconds": 0.5, "calls": [(("steer", "mild"), 60)], "classifiers": {"tone": READ}},
    {"fusion_seconds": 0.25, "calls": [(("steer", "mild"), 60)], "classifiers": {"tone": READ}},
]


@pytest.fixture(autouse=True)
def fresh_metrics() -> Iterator[None]:
    """The registry is the process's: every test has metrics that start at nothing."""
    from prometheus_client import REGISTRY

    from vllm_marith.engine.frontend import admission

    def forget() -> None:
        for collector in {c for c in REGISTRY._collector_to_names if "marith" in getattr(c, "_name", "")}:
            REGISTRY.unregister(collector)
        metrics_module.metrics.cache_clear()
        admission.on_refusal.clear()

    forget()
    yield
    forget()


def scrape(http: TestClient) -> dict[str, float]:
    """Our samples, by name and labels; without the times at which they were made."""
    answer = http.get("/metrics")
    assert answer.status_code == 200
    found = re.findall(r"^vllm_marith:(\S+) (\S+)$", answer.text, re.MULTILINE)
    return {name: float(value) for name, value in found if "_created" not in name}


def test_a_scrape_asks_every_engine(http: TestClient) -> None:
    core = http.app.state.engine_client.engine_core
    core.answers = [[[CORE, *WORKERS], [{**CORE, "running": 9}, *WORKERS]], [[CORE, *WORKERS]] * 2]
    found = scrape(http)
    assert core.calls == [("collective_rpc", FIGURES, None, (), {})]
    assert found['num_groups_running{engine="0"}'] == 2
    assert found['num_groups_running{engine="1"}'] == 9
    assert found['num_groups_waiting{engine="1"}'] == 3
    assert found['group_preemptions_total{engine="0"}'] == 1
    assert found['requests_failed_total{cause="logits",engine="0"}'] == 2
    assert found['requests_failed_total{cause="torn",engine="1"}'] == 0
    assert found['group_members_count{engine="0"}'] == 5
    assert found['group_members_sum{engine="0"}'] == 14
    assert found['fused_rows_bucket{engine="0",le="4.0"}'] == 0
    assert found['fused_rows_bucket{engine="0",le="8.0"}'] == 10
    assert found['fusion_seconds_total{engine="0"}'] == 0.5
    for what, value in READ.items():
        assert found[f'classifier_{what}_total{{classifier="tone",engine="0"}}'] == value
    assert found['generation_tokens_total{engine="0",formula="steer"}'] == 50
    assert found['formula_steps_total{engine="0",formula="steer"}'] == 20
    assert found['term_calls_total{engine="0",formula="steer",term="base"}'] == 20
    assert found['term_calls_total{engine="0",formula="steer",term="mild"}'] == 80
    assert found['draft_tokens_total{engine="0",formula="steer"}'] == 60
    assert found['accepted_draft_tokens_total{engine="0",formula="steer"}'] == 30
    again = scrape(http)
    assert again['generation_tokens_total{engine="0",formula="steer"}'] == 100
    assert again['fused_rows_count{engine="1"}'] == 20
    assert again['num_groups_running{engine="1"}'] == 2


def test_a_dead_engine_does_not_hide_the_page(http: TestClient) -> None:
    assert scrape(http)['requests_refused_total{reason="formula"}'] == 0


def test_a_busy_engine_does_not_hold_the_page(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late answer is not lost, and nobody asks again before it has come."""
    monkeypatch.setattr(metrics_module, "_SCRAPE_SECONDS", 0.01)
    into = metrics_module.metrics()

    async def scenario() -> None:
        done, calls = asyncio.Event(), []

        class Busy:
            async def call_utility_all_async(self, *call: Any) -> Any:
                calls.append(call)
                await done.wait()
                return [[CORE, *WORKERS]]

        http = type("Client", (), {"engine_core": Busy()})()
        scraper = metrics_module.Scraper(http, into)
        await scraper.refresh()
        await scraper.refresh()
        assert len(calls) == 1
        done.set()
        await scraper.refresh()
        assert len(calls) == 1
        assert into.tokens.labels("0", "steer")._value.get() == 50

    asyncio.run(scenario())


def test_refusals_are_counted_by_reason(http: TestClient) -> None:
    for value in ("nonsense", '{"formula": "x"}'):
        body = {"prompt": "x", "model": "steer", "vllm_xargs": {"marith": value}}
        assert http.post("/v1/completions", json=body).status_code == 400
    found = scrape(http)
    assert found['requests_refused_total{reason="formula"}'] == 2
    assert found['requests_refused_total{reason="size"}'] == 0


def test_the_core_counts_and_forgets() -> None:
    figures = CoreFigures()
    figures.arrive("r1", GroupSpec([[1], [2]], "", label="steer", names=["base", "mild", "late"]))
    figures.arrive("r2", GroupSpec([], ""))
    figures.arrive("r3", GroupSpec([], "", names=["base"]), alone=True)
    figures.step("r1")
    figures.step("r1")
    figures.check("r1", 5, 3)
    figures.check("plain", 4, 4)
    figures.end("plain", 100)
    figures.end("r1", 7)
    figures.end("r3", 5)
    figures.fused_rows[3] += 7
    figures.failed[Cause.TORN] += 1
    first = figures.drain()
    assert first == {
        "members": [(1, 2), (3, 1)],
        "fused_rows": [(3, 7)],
        "tokens": [("custom", 5), ("steer", 7)],
        "preempted": 0,
        "failed": [("torn", 1)],
        "steps": [("custom", 5), ("steer", 2)],
        "calls": [
            (("custom", "base"), 5),
            (("steer", "base"), 2),
            (("steer", "late"), 2),
            (("steer", "mild"), 2),
        ],
        "drafted": [("steer", 5)],
        "accepted": [("steer", 3)],
    }
    figures.end("r1", 7)
    figures.end("r2", 2)
    assert figures.drain()["tokens"] == [("custom", 2)], "a request that lived on is still known"
    assert figures.drain()["members"] == []


def test_the_worker_times_the_fusion() -> None:
    figures = WorkerFigures()
    with pytest.raises(RuntimeError, match="fails"), figures.fusing():
        raise RuntimeError("fails")
    assert figures.drain()["fusion_seconds"] > 0
    figures.calls["steer", "mild"] += 3
    assert figures.drain()["calls"] == [(("steer", "mild"), 3)]
    assert figures.drain() == {"fusion_seconds": 0.0, "calls": [], "classifiers": {}}


def test_the_worker_counts_for_its_classifiers() -> None:
    figures = WorkerFigures()
    tone = figures.classifiers["tone"] = ClassifierFigures()
    tone.texts, tone.hits, tone.batches, tone.seconds = READ.values()
    assert figures.drain()["classifiers"] == {"tone": READ}
    assert figures.drain()["classifiers"] == {"tone": dict.fromkeys(READ, 0)}


def test_the_core_answers_in_front_of_the_workers() -> None:
    from vllm.v1.engine.core import EngineCore

    from vllm_marith.engine.core import figures

    figures.install()

    class Executor:
        def collective_rpc(self, method: str, *args: Any) -> list[Any]:
            return [f"worker {method}"]

    class Scheduler:
        figures = CoreFigures()

        def take_figures(self) -> str:
            return "core"

    core = EngineCore.__new__(EngineCore)
    core.model_executor, core.scheduler = Executor(), Scheduler()
    assert core.collective_rpc(FIGURES) == ["core", f"worker {FIGURES}"]
    assert core.collective_rpc("other", None, (), {}) == ["worker other"]
    core.scheduler = object()  # a plain engine in the same process
    assert core.collective_rpc(FIGURES) == [f"worker {FIGURES}"]


def test_the_dashboard_shows_metrics_that_there_are(http: TestClient) -> None:
    file = Path(__file__).parents[2] / "configs" / "grafana" / "formulas.json"
    dashboard = json.loads(file.read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    http.app.state.engine_client.engine_core.answers = [[[CORE, *WORKERS]]]
    there = {name.partition("{")[0] for name in scrape(http)}
    wanted = set(re.findall(r"vllm_marith:(\w+)", asked))
    assert wanted <= there
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in there}
    assert families == {re.sub("_(bucket|sum|count)$", "", name) for name in wanted}, "every figure is shown"

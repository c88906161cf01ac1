"""The parts of a replica, without Ray's processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

pytest.importorskip("ray.serve", reason="needs Ray with Serve: pip install 'vllm-marith[ray]'")

from vllm_marith.distributed import preset_files
from vllm_marith.distributed.everywhere import Answer, Everywhere, Question, answer, merged_figures, together
from vllm_marith.distributed.preset_files import PresetFolder
from vllm_marith.distributed.replica import Doorway
from vllm_marith.language import PresetError, Presets

CONFIGS = Path(__file__).parents[2] / "configs"


def page(tokens: int) -> bytes:
    registry = CollectorRegistry()
    Counter("vllm:tokens", "Tokens.", ["engine"], registry=registry).labels("0").inc(tokens)
    Gauge("vllm:running", "Requests.", registry=registry).set(tokens / 4)
    Histogram("vllm_marith:members", "Terms.", registry=registry, buckets=[1, 2]).observe(2)
    return generate_latest(registry)


def samples(text: bytes) -> dict[tuple[Any, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_figures_of_all_replicas_are_on_one_page() -> None:
    """Every sample of every page is there once, with its replica; every family is introduced once."""
    pages = {"one": page(8), "two": page(20)}
    merged = merged_figures(Answer(name, 200, "text/plain", text) for name, text in pages.items())
    wanted = {
        (name, *sorted([*labels, ("replica", replica)])): value
        for replica, text in pages.items()
        for (name, *labels), value in samples(text).items()
    }
    assert samples(merged) == wanted
    assert merged.count(b"# TYPE vllm:tokens_total counter") == 1
    assert merged.count(b"# HELP vllm_marith:members Terms.") == 1


@pytest.mark.parametrize(
    ("statuses", "told"), [([200, 200], 200), ([200, 404], 404), ([503, 404], 503), ([404, 500, 200], 500)]
)
def test_an_error_of_one_is_the_answer(statuses: list[int], told: int) -> None:
    answers = [Answer(str(i), status, "text/plain", b"") for i, status in enumerate(statuses)]
    for path in ("/v1/marith/reload", "/metrics"):
        method = "GET" if path == "/metrics" else "POST"
        assert together(Question(method, path, (), b""), answers).status == told


def ask(app: Any, method: str, path: str, **options: Any) -> httpx.Response:
    async def asking() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asking())


def replica(name: str, heard: list[tuple[str, str, bytes]]) -> Starlette:
    async def load(request: Request) -> Response:
        heard.append((name, request.headers["authorization"], await request.body()))
        return JSONResponse({"loaded": name})

    async def other(request: Request) -> Response:
        return PlainTextResponse(name)

    return Starlette(
        routes=[Route("/v1/load_lora_adapter", load, methods=["POST"]), Route("/v1/models", other)]
    )


def test_what_all_must_hear_goes_to_all_and_the_rest_to_one() -> None:
    heard: list[tuple[str, str, bytes]] = []
    apps = {name: replica(name, heard) for name in ("one", "two")}

    async def all_of_them(question: Question) -> list[Answer]:
        return [await answer(app, name, question) for name, app in apps.items()]

    app = Everywhere(apps["one"], all_of_them)
    body, key = b'{"lora_name": "x"}', {"authorization": "Bearer secret"}
    assert ask(app, "POST", "/v1/load_lora_adapter", content=body, headers=key).json() == {"loaded": "one"}
    assert heard == [("one", "Bearer secret", body), ("two", "Bearer secret", body)]
    assert ask(app, "GET", "/v1/models").text == "one"
    assert ask(app, "POST", "/v1/marith/reload").status_code == 404  # the replicas' own answer


def test_a_replica_that_goes_away_meanwhile_is_an_error() -> None:
    async def gone(question: Question) -> list[Answer]:
        raise ConnectionError("actor died")

    found = ask(Everywhere(Starlette(), gone), "GET", "/metrics")
    assert found.status_code == 503
    assert "ask again" in found.json()["error"]["message"]


def test_a_replica_without_an_engine_lets_nobody_in() -> None:
    """Whoever is inside is counted until the answer has gone; whoever comes later waits."""
    shut = False

    async def exercise() -> None:
        nonlocal shut
        leave = asyncio.Event()

        async def inside(scope: Any, receive: Any, send: Any) -> None:
            await leave.wait()

        door = Doorway(inside, lambda: shut)

        def call() -> asyncio.Task[None]:
            return asyncio.create_task(door({"type": "http"}, None, None))  # type: ignore[arg-type]

        first = call()
        await asyncio.sleep(0)
        assert door.inside == 1
        shut = True
        late = call()
        leave.set()
        await first
        assert door.inside == 0
        done, _ = await asyncio.wait([late], timeout=0.05)
        assert not done
        late.cancel()

    asyncio.run(exercise())


def test_presets_are_the_same_after_the_way() -> None:
    """All that come with us, from several folders with files of one name."""
    folders = [CONFIGS / "presets", CONFIGS / "presets" / "experts"]
    contents = preset_files.read(folders)
    assert sum(name.endswith("terms.yaml") for name in contents) == 2
    folder = PresetFolder()
    try:
        folder.write(contents)
        assert Presets.load(folder.path) == Presets.load(*folders)
    finally:
        folder.remove()
    assert not folder.path.exists()


def test_a_wrong_file_leaves_the_presets_as_they_were() -> None:
    folder = PresetFolder()
    try:
        folder.write({"calm.yaml": "formula: base\n"})
        with pytest.raises(PresetError, match=r"^loud\.yaml:1: "):
            folder.write({"loud.yaml": "formula: 'base +'\n"})
        with pytest.raises(ValueError, match="not the name of a preset file"):
            folder.write({"../loud.yaml": "formula: base\n"})
        assert folder.contents() == {"calm.yaml": "formula: base\n"}
    finally:
        folder.remove()

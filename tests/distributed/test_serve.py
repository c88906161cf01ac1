"""One deployment on a real Ray cluster, made by the command and asked by the unmodified openai client."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import openai
import pytest

from tests.support import ray_serve
from tests.support.ray_serve import Deployed, Job, Ray, client_of, jobs, wait_for

pytest.importorskip("ray.serve", reason="needs Ray with Serve: pip install 'vllm-marith[ray]'")

TOKENS = 16


@pytest.fixture(scope="module")
def deployed(ray: Ray, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return ray_serve.deploy(ray, tiny_model, ray_serve.presets(tmp_path_factory.mktemp("presets")))


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[Job, str]:
    """The answers of an engine in this process."""
    return ray_serve.single_process(tiny_model, jobs(TOKENS))


def test_answers_are_those_of_a_single_process(deployed: Deployed, expected: dict[Job, str]) -> None:
    """Plain requests, formulas and presets, whole and streamed."""
    client = client_of(deployed.url)
    assert {job: job.ask(client) for job in expected} == expected
    assert len(set(expected.values())) > len(expected) // 4  # and not all the same


def test_a_server_like_any_other(deployed: Deployed) -> None:
    """Presets as models, refusals, the page, our routes."""
    client = client_of(deployed.url)
    assert [model.id for model in client.models.list().data] == ["tiny", "steer"]
    with pytest.raises(openai.BadRequestError, match=r"(?s)not defined.*\^"):
        client.completions.create(model="tiny", prompt="a", extra_body={"vllm_xargs": {"marith": "a - *b"}})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="absent", prompt="a")
    assert "<html" in httpx.get(f"{deployed.url}/marith/").text
    raw = httpx.post(
        f"{deployed.url}/v1/completions",
        json={"model": "steer", "prompt": "a", "max_tokens": 2, "vllm_xargs": {"marith_explain": 1}},
        timeout=60,
    )
    assert raw.headers["x-marith-members"] == "3"
    assert len(raw.json()["marith"]["tokens"]) == 2


def test_figures_name_their_replica(deployed: Deployed) -> None:
    client_of(deployed.url).completions.create(model="steer", prompt="a", max_tokens=3)
    page = httpx.get(f"{deployed.url}/metrics", timeout=60).text
    found = re.search(
        r'^vllm_marith:generation_tokens_total\{engine="0",formula="steer",replica="(\w+)"\} (\S+)',
        page,
        re.M,
    )
    assert found is not None
    assert float(found[2]) >= 3
    assert f'replica="{found[1]}"' in next(
        x for x in page.splitlines() if x.startswith("vllm:prompt_tokens_total{")
    )


def test_other_presets_without_a_restart(deployed: Deployed) -> None:
    before = [process.pid for process in deployed.replicas()]
    (deployed.presets / "calmer.yaml").write_text(
        "terms: {calm: {system: Stay calm.}}\nformula: base + 2*calm\n"
    )
    printed = deployed.again()
    assert "answers at" in printed
    client = client_of(deployed.url)

    def names() -> list[str]:
        return [model.id for model in client.models.list().data]

    wait_for(lambda: names() == ["tiny", "calmer", "steer"], 60, "the new preset")
    assert client.completions.create(model="calmer", prompt="a", max_tokens=2).model == "calmer"
    assert [process.pid for process in deployed.replicas()] == before

"""Two replicas under a mixed load, while processes are killed and replicas exchanged."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.support import ray_serve
from tests.support.ray_serve import Deployed, Job, Load, Ray, client_of, jobs, wait_for

pytest.importorskip("ray.serve", reason="needs Ray with Serve: pip install 'vllm-marith[ray]'")
pytestmark = pytest.mark.several

TOKENS = 64
CLIENTS = 8
OPTIONS = ("--replicas", "2", "--sticky")
BACK_SECONDS = 300


@pytest.fixture(scope="module")
def deployed(ray: Ray, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    presets = ray_serve.presets(tmp_path_factory.mktemp("presets"))
    return ray_serve.deploy(ray, tiny_model, presets, *OPTIONS)


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[Job, str]:
    return ray_serve.single_process(tiny_model, jobs(TOKENS))


@pytest.fixture
def load(deployed: Deployed, expected: dict[Job, str]) -> Load:
    return Load(deployed.url, list(expected), expected)


def requests(url: str) -> Counter[str]:
    """Requests that each replica has answered."""
    page = httpx.get(f"{url}/metrics", timeout=60).text
    counts: Counter[str] = Counter()
    for replica, count in re.findall(r'^vllm:request_success_total\{.*replica="(\w+)"\} (\S+)', page, re.M):
        counts[replica] += int(float(count))
    return counts


def serving(url: str) -> set[str]:
    """Names of the replicas that have answered something."""
    return {replica for replica, count in requests(url).items() if count}


def test_a_session_stays_on_one_replica(deployed: Deployed) -> None:
    for session in ("mine", "yours", "theirs"):
        before = requests(deployed.url)
        client = client_of(deployed.url, default_headers={"x-session-id": session})
        for _ in range(6):
            client.completions.create(model="tiny", prompt="a", max_tokens=2)
        after = requests(deployed.url)
        assert sorted(after[replica] - before[replica] for replica in after) == [0, 6]


@pytest.mark.parametrize("victim", ["replica", "engine"])
def test_a_killed_process_is_told_and_replaced(deployed: Deployed, load: Load, victim: str) -> None:
    """Every request has its whole answer or an error; a new replica takes the place of the dead one's."""
    with load.running(CLIENTS):
        load.until("complete", 20)
        before = serving(deployed.url)
        assert len(before) == 2
        processes = deployed.replicas() if victim == "replica" else deployed.engines()
        assert len(processes) == 2
        killed = processes[0].pid
        load.until("complete", 5)  # looking around held the clients up: they are at work again
        processes[0].kill()
        load.until("complete", 20)  # the other one goes on
        wait_for(lambda: len(new(deployed.url, before)) == 2, BACK_SECONDS, "the new replica to serve")
        load.until("complete", 20)
    print(f"killed the {victim}: {dict(load.outcomes)} {dict(load.errors)}")
    assert load.outcomes["silent"] == 0, load.silent
    # At most what was in flight there, and what came in the moment until Serve knew.
    assert load.outcomes["error"] <= 5 * CLIENTS
    left = [process.pid for process in (*deployed.replicas(), *deployed.engines())]
    assert len(left) == 4  # two of each: nothing is left of the dead one
    assert killed not in left


def new(url: str, before: set[str]) -> set[str]:
    """The replicas that serve, once one of them is none of `before`."""
    try:
        now = serving(url)
    except httpx.HTTPError:
        return set()
    return now if now - before else set()


def test_a_redeployment_loses_nothing(deployed: Deployed, load: Load) -> None:
    """Replicas that are replaced finish what they have begun, streams included."""
    before = {process.pid for process in deployed.replicas()}
    with load.running(CLIENTS):
        load.until("complete", 10)
        printed = deployed.again(*OPTIONS, "--env", "MARITH_TEST=1")  # other processes are needed
        load.until("complete", 10)
    assert "2 of 2 replicas" in printed
    assert not before & {process.pid for process in deployed.replicas()}
    assert set(load.outcomes) == {"complete"}, (load.errors, load.silent)

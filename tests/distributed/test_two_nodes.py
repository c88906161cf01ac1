"""`vllm serve` on Ray, its two tensor-parallel workers on two nodes: the answers of a single process."""

from __future__ import annotations

import random
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from tests.support import completions, exactness, ray_cluster, server, tiny, workload
from tests.support.ray_cluster import Nodes

pytestmark = pytest.mark.ray
SEED = random.randrange(2**32)
LENGTH = 10
PRESET = "terms: {child: {system: You are a child.}}\nformula: child - 0.5*base\n"


@dataclass
class Served:
    url: str
    base: str
    constituents: dict[str, str]
    log: Path


@pytest.fixture(scope="module")
def served(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("two-nodes")
    base = tiny.make(folder / "base", hidden=128, kv_heads=2, sharpness=4.0)
    small = tiny.make(folder / "small", seed=1, kv_heads=2, sharpness=4.0)
    (folder / "youth.yaml").write_text(PRESET)
    settings = {
        "constituents": {"small": str(small)},
        "presets": str(folder / "youth.yaml"),
        "max_speculative_tokens": 3,
    }
    options = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]
    log = folder / "log"
    with server.serve(base, log, settings, *options, variables=nodes.environment, folder=folder) as url:
        yield Served(url, str(base), {"small": str(small)}, log)


def test_the_workers_are_on_two_nodes(served: Served) -> None:
    found = re.findall(r"Formulas: rank (\d) on the Ray node (\w+) ", served.log.read_text())
    assert [rank for rank, _ in found] == ["0", "1"]
    assert found[0][1] != found[1][1]


def test_answers_are_those_of_a_single_process(served: Served) -> None:
    """Tokens and log-probabilities, against Hugging Face in float32; all requests at the same time."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    jobs = [workload.job(rng, size, "", 14, ["small"]) for size in (3, 0, 2, 4, 1)]
    jobs += workload.operator_jobs(rng)[:6]
    assert any(job.models for job in jobs)
    expected = exactness.references(served.base, jobs, LENGTH, served.constituents)
    client = completions.client_of(served.url)
    exactness.assert_greedy(jobs, completions.ask_all(client, jobs, LENGTH), expected)


def test_drafted_answers_are_the_same(served: Served) -> None:
    """A formula whose small term drafts for it; in every rank the same drafts stand."""
    rng = random.Random(SEED)
    terms = {"a": {"speculative_factor": 3}, "s": {"model": "small"}}
    formula = workload.Formula.parse("s + 0.5*a", terms)
    texts = [workload.words(rng, 3, 8) for _ in range(3)]
    jobs = [workload.Job(text, formula, {"s": text, "a": text}, models={"s": "small"}) for text in texts]
    expected = exactness.references(served.base, jobs, LENGTH, served.constituents)
    client = completions.client_of(served.url)
    exactness.assert_greedy(jobs, completions.ask_all(client, jobs, LENGTH, speculative=3), expected)
    with urllib.request.urlopen(f"{served.url}/metrics") as figures:
        (accepted,) = re.findall(
            r"^vllm_marith:accepted_draft_tokens_total\S+ (\S+)$", figures.read().decode(), re.MULTILINE
        )
    assert float(accepted) > 0


def test_a_preset_is_a_model(served: Served) -> None:
    formula = workload.Formula.parse("child - 0.5*base", {"child": {"system": "You are a child."}})
    text = "The value of"
    job = workload.Job(text, formula, {"child": f"You are a child.\n{text}", "base": text})
    (expected,) = exactness.references(served.base, [job], LENGTH)
    found = completions.client_of(served.url).completions.create(
        model="youth",
        prompt=text,
        max_tokens=LENGTH,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert found.choices[0].token_ids == expected.tokens


def test_an_abort_ends_all_members_in_every_rank(served: Served) -> None:
    """A client that goes away in the middle of its answer; afterwards nothing of it is left."""
    client = completions.client_of(served.url)
    rng = random.Random(SEED)
    asked = workload.job(rng, 3, "", 14)
    body = completions.body_of(asked)
    for _ in range(3):
        stream = client.completions.create(
            model="tiny", prompt=asked.text, max_tokens=400, stream=True, extra_body=body
        )
        for _, _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
    (expected,) = exactness.references(served.base, [asked], LENGTH)
    exactness.assert_greedy([asked], completions.ask_all(client, [asked], LENGTH), [expected])
    with urllib.request.urlopen(f"{served.url}/metrics") as figures:
        told = figures.read().decode()
    running = re.findall(r"^vllm:num_requests_(?:running|waiting)\{\S+ (\S+)$", told, re.MULTILINE)
    assert running
    assert sum(map(float, running)) == 0


def test_a_node_without_the_package_or_with_another_is_named(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real nodes, whose Python environments have all that this one has but this package, or another of it."""
    import ray
    from ray.util import placement_group, remove_placement_group

    from vllm_marith.distributed import nodes as found

    monkeypatch.chdir(tmp_path)  # which a worker could import from
    without = ray_cluster.environment(tmp_path / "without")
    older = ray_cluster.environment(tmp_path / "older", "0.0.9")
    with (
        ray_cluster.node(without, nodes, tmp_path / "without.log", "without"),
        ray_cluster.node(older, nodes, tmp_path / "older.log", "older"),
    ):
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            group = placement_group([{"without": 1}, {"older": 1}, {"node:__internal_head__": 0.1}])
            ray.get(group.ready(), timeout=120)
            said = found.objection([group])
            good = placement_group([{"node:__internal_head__": 0.1}])
            ray.get(good.ready(), timeout=120)
            assert found.objection([good]) == ""
            remove_placement_group(group)
            remove_placement_group(good)
        finally:
            ray.shutdown()
    expected = found.here()
    assert said.startswith(
        f"formulas need vllm-marith {expected.marith} on every Ray node that runs a worker"
    )
    assert re.search(r"the node [\d.]+ \(host \S+, node id \w+\) has no vllm-marith;", said), said
    assert re.search(r"the node [\d.]+ \(host \S+, node id \w+\) has vllm-marith 0\.0\.9:", said), said
    assert said.count("node id") == 2, said


def test_a_node_that_dies_leaves_no_client_waiting(served: Served, nodes: Nodes) -> None:
    """The last of this module, for it ends the server: as vLLM does it, an engine lives and dies as one."""
    client = completions.client_of(served.url, timeout=120)
    rng = random.Random(SEED)
    jobs = [workload.job(rng, size, "", 14) for size in (3, 0, 2)]
    started = threading.Barrier(len(jobs) + 1)

    def ask(job: workload.Job) -> str:
        """How a long answer ended."""
        stream = client.completions.create(
            model="tiny", prompt=job.text, max_tokens=480, stream=True, extra_body=completions.body_of(job)
        )
        next(iter(stream))
        started.wait(120)
        try:
            for event in stream:
                if event.choices and event.choices[0].finish_reason:
                    return event.choices[0].finish_reason
        except Exception as error:  # the client's own errors, and those of what it reads streams with
            return type(error).__name__
        return "closed without an error"

    with ThreadPoolExecutor(len(jobs)) as threads:
        asked = [threads.submit(ask, job) for job in jobs]
        started.wait(120)
        nodes.kill_second()
        ended = [answer.result(timeout=150) for answer in asked]
    print(ended)
    assert set(ended) <= {
        "length",
        "APIError",
        "InternalServerError",
        "APIConnectionError",
        "RemoteProtocolError",
    }
    assert set(ended) != {"length"}
    with pytest.raises(openai.APIError):
        client.completions.create(model="tiny", prompt="So", max_tokens=2)

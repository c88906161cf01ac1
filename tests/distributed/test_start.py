"""`vllm serve` over a node that cannot serve formulas ends, and says which node in one sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import ray_cluster, server

pytestmark = pytest.mark.several


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "has no vllm-marith"), ("0.0.9", "has vllm-marith 0.0.9")]
)
def test_a_bad_node_is_named(version: str | None, reason: str, tiny_model: Path, tmp_path: Path) -> None:
    other = ray_cluster.environment(tmp_path / "environment", version)
    options = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]
    with (
        ray_cluster.cluster(second=False) as nodes,
        ray_cluster.node(other, nodes, tmp_path / "node.log"),
    ):
        found = subprocess.run(
            server.command(tiny_model, server.free_port(), None, *options),
            env={**server.environment(), **nodes.environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    told = found.stdout + found.stderr
    (sentence,) = [line for line in told.splitlines() if line.startswith("marith:")]
    assert found.returncode == 1
    assert "formulas need vllm-marith" in sentence
    assert "the node " in sentence
    assert f") {reason}:" in sentence
    assert "Traceback" not in told

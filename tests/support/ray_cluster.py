"""Ray clusters of several nodes on this machine, and Python environments for nodes that have other software.

A node's "GPUs" are numbers that Ray counts; with VLLM_MARITH_CPU_RAY=1 a worker takes one and computes on the
CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import marith_kernels
import pytest

import vllm_marith

SWITCH = {"VLLM_MARITH_CPU_RAY": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
START_SECONDS = 180
_NODE: dict[str, Any] = dict(num_cpus=4, num_gpus=1, object_store_memory=80 << 20)


class Nodes:
    """A head and perhaps a second node, each with one "GPU"."""

    def __init__(self, cluster: Any, second: Any) -> None:
        self._cluster = cluster
        self._second = second
        self.address: str = cluster.address

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use this cluster."""
        return {**SWITCH, "RAY_ADDRESS": self.address}

    def has(self, resource: str) -> bool:
        """Whether a living node has some of this."""
        table = self._cluster.global_state.node_table()
        return any(node["Alive"] and resource in node["Resources"] for node in table)

    def kill_second(self) -> None:
        """As when a machine loses its power."""
        self._cluster.remove_node(self._second, allow_graceful=False)


@contextmanager
def cluster(*, second: bool = True) -> Iterator[Nodes]:
    """second: whether there is a node beside the head."""
    from ray.cluster_utils import Cluster

    # Ray makes sockets there, whose names may have 107 characters: pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in SWITCH.items():
            patch.setenv(name, value)
        head = dict(_NODE, include_dashboard=False, temp_dir=folder)
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            other = made.add_node(**_NODE) if second else None
            patch.undo()  # the nodes have it; a vLLM in this process does not want it
            yield Nodes(made, other)
        finally:
            made.shutdown()


@contextmanager
def node(python: Path, nodes: Nodes, log: Path, resource: str = "other") -> Iterator[None]:
    """Another node of the cluster, whose workers run in the environment of `python`.

    resource: what Ray calls it, so that a test can place something there.
    """
    own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    command = [
        *(str(python), "-m", "ray.scripts.scripts", "start", f"--address={nodes.address}", "--block"),
        *("--num-cpus=4", "--num-gpus=1", f"--object-store-memory={80 << 20}"),
        *("--resources", json.dumps({resource: 1})),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *("--disable-usage-stats", "--include-log-monitor=false"),
    ]

    def start() -> subprocess.Popen[bytes]:
        with log.open("a") as output:
            return subprocess.Popen(
                command,
                env={k: v for k, v in os.environ.items() if k not in own} | SWITCH,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=log.parent,
            )

    process = start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not nodes.has(resource):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            if process.poll() is not None:  # Ray chooses ports first and takes them later: too late, at times
                process = start()
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def environment(path: Path, version: str | None = None) -> Path:
    """A Python environment with all that this one has, but vllm-marith; returns its interpreter.

    version: of the vllm-marith that it has all the same, with the files of this one.
    """
    venv.create(path, symlinks=True)
    (site,) = path.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "marith" not in entry.name.lower() and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    if version is not None:
        for package in (vllm_marith, marith_kernels):
            assert package.__file__ is not None
            shutil.copytree(
                Path(package.__file__).parent,
                site / package.__name__,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        about = site / f"vllm_marith-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-marith\nVersion: {version}\n")
        (about / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nmarith = vllm_marith.engine.plugin:register\n"
            "[vllm.platform_plugins]\nmarith_cpu_ray = vllm_marith.distributed.cpu_ray:platform\n"
        )
    return path / "bin" / "python"

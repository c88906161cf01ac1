"""A real `vllm serve`, in its ordinary processes, for the end-to-end tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support import engines

START_SECONDS = 400


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(model: Path, port: int, settings: dict[str, Any] | None = None, *options: str) -> list[str]:
    """The command line of a small server on this machine."""
    line = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "tiny"),
        *("--logits-processor", "marith"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "24"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--block-size", str(engines.BLOCK_SIZE)),
        *options,
    ]
    if settings is not None:
        line += ["--additional-config", json.dumps({"marith": settings})]
    return line


def environment() -> dict[str, str]:
    # The server has processes of its own, whatever the in-process engines of this test run use.
    ours = {k: v for k, v in engines.ENVIRONMENT.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return {**inherited, **ours, "VLLM_LOGGING_LEVEL": "INFO"}


@contextmanager
def serve(
    model: Path,
    log: Path,
    settings: dict[str, Any] | None = None,
    *options: str,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[str]:
    """The base URL of a running server; its output is in `log`.

    variables: what its environment has beside this one's.
    folder: where it is started, by default where this process was.
    """
    with serve_process(model, log, settings, *options, variables=variables, folder=folder) as (url, _):
        yield url


@contextmanager
def serve_process(
    model: Path,
    log: Path,
    settings: dict[str, Any] | None = None,
    *options: str,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator[tuple[str, int]]:
    """As `serve`, with the id of the process that was started."""
    port = free_port()
    with log.open("w") as output:
        process = subprocess.Popen(
            command(model, port, settings, *options),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment(), **(variables or {})},
            cwd=folder,
            start_new_session=True,
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"the server did not answer within {START_SECONDS} s:\n{log.read_text()[-4000:]}")

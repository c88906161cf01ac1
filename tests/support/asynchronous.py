"""Asynchronous scheduling on a CPU, for tests.

vLLM switches asynchronous scheduling off on CPUs because the model runner's copies use CUDA streams
and events.  Everything else of it is ordinary code: with streams and events that do nothing the same
scheduler, batch queue and model-runner path run here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

import torch


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def query(self) -> bool:
        return True


class _Stream:
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


def force(monkeypatch: Any) -> None:
    """Until `monkeypatch` is undone, CPU engines schedule asynchronously."""
    from vllm.platforms.cpu import CpuPlatform

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        # It puts a stream of its own in place when it is imported, which undoing must not take away.
        importlib.import_module("vllm.v1.worker.cpu.shm")
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        check(cls, config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))

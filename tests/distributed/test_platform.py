"""vLLM's platform is vLLM's choice, but for the one variable that tests of Ray set."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from vllm import platforms
from vllm.platforms import current_platform

THEIRS = "vllm.platforms.cpu.CpuPlatform"
OURS = "vllm_marith.distributed.cpu_ray_platform.RayCpuPlatform"

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM does not run on the CPU here")


def test_the_platform_is_registered() -> None:
    (found,) = [e for e in entry_points(group="vllm.platform_plugins") if e.name == "marith_cpu_ray"]
    assert found.load().__module__ == "vllm_marith.distributed.cpu_ray"


def test_without_the_variable_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{type(current_platform).__module__}.{type(current_platform).__name__}" == THEIRS
    for value in (None, "", "0", "true"):
        monkeypatch.delenv("VLLM_MARITH_CPU_RAY", raising=False)
        if value is not None:
            monkeypatch.setenv("VLLM_MARITH_CPU_RAY", value)
        assert platforms.resolve_current_platform_cls_qualname() == THEIRS


def test_with_it_a_worker_takes_what_ray_calls_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MARITH_CPU_RAY", "1")
    assert platforms.resolve_current_platform_cls_qualname() == OURS
    from vllm_marith.distributed.cpu_ray_platform import RayCpuPlatform

    assert RayCpuPlatform.ray_device_key == "GPU"
    assert type(current_platform).ray_device_key == ""
    assert RayCpuPlatform().is_cpu()

"""The class that `cpu_ray` names; apart from it, since vLLM's platforms may not be imported to choose one."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """vLLM's CPU platform, on which a worker takes a logical "GPU" of Ray's."""

    ray_device_key = "GPU"

"""A machine without accelerators as a node of a Ray cluster, for tests.

vLLM refuses Ray on its CPU platform, which names no Ray resource that a worker would take.  With
``VLLM_MARITH_CPU_RAY=1``, and never by itself, the platform plugin below takes the CPU platform's place: one
worker then takes one logical "GPU" of its node, so that nodes are started with ``--num-gpus``.  The variable
must be set for the driver and for every node.
"""

from __future__ import annotations

import os

SWITCH = "VLLM_MARITH_CPU_RAY"


def platform() -> str | None:
    """Entry point of the group ``vllm.platform_plugins``: a class name, or None to leave vLLM's choice."""
    if os.environ.get(SWITCH) != "1":
        return None
    return "vllm_marith.distributed.cpu_ray_platform.RayCpuPlatform"

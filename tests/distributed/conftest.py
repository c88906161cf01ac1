"""Ray clusters on this machine, one for each test module that asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import ray_cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[ray_cluster.Nodes]:
    """Two nodes, one of which may be killed."""
    with ray_cluster.cluster() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `tests.support.ray_serve.Ray`, for Ray Serve."""
    from tests.support import ray_serve  # which needs Serve

    with ray_serve.cluster(tmp_path_factory.mktemp("ray") / "log") as ray:
        yield ray

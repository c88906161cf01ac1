"""A two-node Ray cluster on this machine, of which a test module may kill one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import ray_cluster


@pytest.fixture(scope="module")
def nodes() -> Iterator[ray_cluster.Nodes]:
    with ray_cluster.cluster() as nodes:
        yield nodes

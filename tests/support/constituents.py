"""Engines with several base models: small random ones of different shapes, made on the spot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import Qwen2Config

from tests.support import engines, tiny
from vllm_marith.engine.group import constituent_of


def make(path: Path, sharpness: float = 4.0) -> tuple[str, dict[str, str]]:
    """A base model and its constituents by name.

    A token takes keys of 5 x 2 x 32, 2 x 1 x 32 and 1 x 3 x 32 numbers: the last model's blocks do not come
    out even, and a tenth of each is left over.
    """
    base = tiny.make(path / "base", hidden=128, layers=5, kv_heads=2, sharpness=sharpness)
    small = tiny.make(path / "small", seed=1, hidden=64, layers=2, sharpness=sharpness)
    qwen = tiny.make(
        path / "qwen", seed=2, hidden=96, layers=1, kv_heads=3, sharpness=sharpness, config=Qwen2Config
    )
    return str(base), {"small": str(small), "qwen": str(qwen)}


def settings(constituents: dict[str, Any], **others: Any) -> dict[str, Any]:
    """The engine option that names them."""
    return {"marith": {"constituents": constituents, **others}}


def owners(scheduler: Any) -> dict[str, int]:
    """Living request -> its constituent."""
    return {
        name: constituent_of(request.sampling_params.extra_args)
        for name, request in scheduler.requests.items()
    }


def held(scheduler: Any) -> list[dict[str, list[int]]]:
    """For each constituent's KV-cache group: request -> the ids of its blocks there."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [
        {name: [b.block_id for b in blocks] for name, blocks in manager.req_to_blocks.items() if blocks}
        for manager in managers
    ]


def assert_own_blocks(scheduler: Any) -> int:
    """Every request has blocks of its own constituent's group only, and no two groups share one.

    Returns the number of groups in which anything is held.
    """
    found, owner = held(scheduler), owners(scheduler)
    for j, requests in enumerate(found):
        assert all(owner.get(name, j) == j for name in requests), "blocks in another constituent's group"
    ids = [{i for blocks in requests.values() for i in blocks} for requests in found]
    assert sum(map(len, ids)) == len(set().union(*ids)), "two constituents hold one block"
    return sum(map(bool, found))


def watch(llm: Any) -> None:
    """From now on `assert_own_blocks` at every step."""
    scheduler = engines.scheduler(llm)
    scheduler.most_groups = 0
    schedule = scheduler.schedule

    @wraps(schedule)
    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        scheduler.most_groups = max(scheduler.most_groups, assert_own_blocks(scheduler))
        return output

    scheduler.schedule = watched


def most_groups(llm: Any) -> int:
    """In how many groups any step since `watch` held blocks."""
    return engines.scheduler(llm).most_groups


@contextmanager
def engine(base: str, constituents: dict[str, Any], **options: Any) -> Iterator[Any]:
    """An engine every step of which is watched; all is returned at the end."""
    marith = options.pop("marith", {})
    with engines.engine(base, additional_config=settings(constituents, **marith), **options) as llm:
        watch(llm)
        yield llm
        engines.assert_all_returned(llm)

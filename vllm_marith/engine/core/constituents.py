"""KV-cache blocks of requests that run on different base models.

Every constituent has a KV-cache group of its own (see `engine.constituents.memory`), and a request holds
blocks in its constituent's group and in no other: a member on a small model costs a small model's memory.
vLLM's coordinator gives every request blocks in every group; `ConstituentCoordinator` stands in front of it.

The prefix cache is each constituent's own: vLLM keys cached blocks by KV-cache group, and hits are as long as
the request's own group has them, in whole blocks of its own size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, replay_boundaries

from ..constituents.memory import ConstituentSpec
from ..group import constituent_of
from .capacity import report

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

Blocks = tuple[Sequence["KVCacheBlock"], ...]


def install(scheduler: Scheduler) -> None:
    """Gives a scheduler a coordinator by constituents, where its KV-cache groups are constituents'."""
    manager = scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    if managers and isinstance(managers[0].kv_cache_spec, ConstituentSpec):
        manager.coordinator = ConstituentCoordinator(manager.coordinator, scheduler.requests)
        report(scheduler.vllm_config, scheduler.kv_cache_config)


class ConstituentCoordinator(KVCacheCoordinator):
    """A `KVCacheCoordinator` under which each request has blocks of one group.

    What is not here is vLLM's own: freeing, which goes through all groups, finds a request's blocks in one.
    """

    def __init__(self, coordinator: KVCacheCoordinator, requests: Mapping[str, Request]) -> None:
        # vLLM's coordinator was made with arguments that nobody kept; this one has its state.
        self.__dict__.update(coordinator.__dict__)
        self._requests = requests
        self._asking: int | None = None
        specs: list[Any] = [manager.kv_cache_spec for manager in self.single_type_managers]
        found = [spec.constituent for spec in specs]
        if found != list(range(len(found))):
            raise ValueError(
                f"marith: every constituent needs one KV-cache group of its own, found {found}; "
                "set block_sizes in the settings such that blocks of no two constituents have equal pages"
            )
        for manager in self.single_type_managers:
            manager.cache_hit_alignment_tokens = manager.block_size

    def constituent(self, request_id: str) -> int:
        """The constituent of a living request."""
        return _owner(self._requests[request_id])

    @contextmanager
    def on_behalf_of(self, request: Request) -> Iterator[None]:
        """Within, `find_longest_cache_hit` is asked for this request."""
        self._asking = _owner(request)
        try:
            yield
        finally:
            self._asking = None

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        if self._asking is None:
            raise RuntimeError("a prefix was looked up for nobody's constituent")
        hit: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        manager = self.single_type_managers[self._asking]
        if not manager.enable_caching:
            return tuple(hit), 0, 0
        (hit[self._asking],), length = manager.find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_cache_hit_length,
            kv_cache_group_ids=[self._asking],
            block_pool=self.block_pool,
            kv_cache_spec=manager.kv_cache_spec,
            drop_eagle_block=False,
            alignment_tokens=manager.block_size,
        )
        return tuple(hit), length, 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Blocks,
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        own = self.constituent(request_id)
        return self.single_type_managers[own].get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks[own],
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
        )

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Blocks,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> None:
        own = self.constituent(request_id)
        manager = self.single_type_managers[own]
        if request_id in manager.num_cached_block:  # running: nothing new can have been hit
            assert not any(new_computed_blocks)
            return
        assert not num_external_computed_tokens, "KV connectors are refused at the start"
        manager.add_local_computed_blocks(request_id, new_computed_blocks[own], num_local_computed_tokens, 0)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int, num_encoder_tokens: int = 0
    ) -> tuple[list[KVCacheBlock], ...]:
        own = self.constituent(request_id)
        blocks: list[list[KVCacheBlock]] = [[] for _ in self.single_type_managers]
        manager = self.single_type_managers[own]
        blocks[own] = manager.allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        return tuple(blocks)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        manager = self.single_type_managers[_owner(request)]
        if manager.enable_caching:
            whole = num_computed_tokens // manager.block_size * manager.block_size
            boundaries = replay_boundaries(request.num_prompt_tokens, manager.block_size, use_eagle=False)
            manager.cache_blocks(request, whole, retention_interval=None, replay_boundaries=boundaries)

    def get_num_cacheable_tokens(self, num_computed_tokens: int, kv_cache_group_id: int) -> int:
        size = self.single_type_managers[kv_cache_group_id].block_size
        return num_computed_tokens // size * size


def _owner(request: Request) -> int:
    """The constituent that a request runs on."""
    params = request.sampling_params
    return constituent_of(params.extra_args) if params else 0


def lookup(coordinator: Any, request: Request) -> AbstractContextManager[None]:
    """A context in which a request's prefix may be looked up, whatever the coordinator."""
    return (
        coordinator.on_behalf_of(request)
        if isinstance(coordinator, ConstituentCoordinator)
        else nullcontext()
    )

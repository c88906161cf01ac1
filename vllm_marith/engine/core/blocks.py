"""KV-cache blocks: what a step, an admission or a whole group needs of the pool.

All answers are upper bounds built from vLLM's own predictor, so a "yes" is safe: vLLM's loop will
not have to preempt.  Prefix-cache hits can only make the need smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from .group_state import Group, remaining

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class BlockAccount:
    """Reads a scheduler's block pool."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def _manager(self) -> Any:
        return self._scheduler.kv_cache_manager

    def free(self) -> int:
        return self._manager.block_pool.get_num_free_blocks()

    def can_ever_hold(self, members: Iterable[Request]) -> bool:
        """Whether the members fit at their full length with the whole pool to themselves."""
        need = sum(self._to_reach(m, m.num_prompt_tokens + m.max_tokens) for m in members)
        return need <= self._manager.block_pool.num_gpu_blocks - 1  # one block is vLLM's null block

    def can_admit(self, members: Iterable[Request], promised: Iterable[Request]) -> bool:
        """Whether the members' prompts and first token fit beside what others were promised."""
        scheduler = self._scheduler
        wanted = [*members, *promised]
        need = sum(scheduler._request_remaining_blocks(r) for r in wanted) + len(wanted)
        need += scheduler._inflight_prefill_reserved_blocks()
        return need + self._manager.watermark_blocks <= self.free()

    def can_step(self, decodes: Callable[[Request], bool], group_of: Mapping[str, Group]) -> bool:
        """Whether the blocks of every row that this step may schedule are free."""
        scheduler, free = self._scheduler, self.free()
        running = scheduler.running
        budget = scheduler.max_num_scheduled_tokens
        # A decoding row takes one new block at most, a prefill one more than its tokens fill.
        if len(running) * len(self._managers) + self._blocks_of(budget) <= free:
            return True
        need = len(scheduler.kv_holding_waiting)
        for request in running:
            if decodes(request):
                num_tokens = 1
            else:
                held = request.request_id in group_of
                num_tokens = min(max(0, remaining(request) - held), budget)
            budget -= num_tokens
            if num_tokens:
                need += self._to_reach(request, request.num_computed_tokens + num_tokens)
                if need > free:
                    return False
        return True

    @property
    def _managers(self) -> Any:
        return self._manager.coordinator.single_type_managers

    def _blocks_of(self, num_tokens: int) -> int:
        return sum(cdiv(num_tokens, manager.block_size) for manager in self._managers)

    def _to_reach(self, request: Request, num_tokens: int) -> int:
        """Blocks still to be allocated for a request to hold ``num_tokens`` tokens."""
        return self._manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=num_tokens,
            new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=request.num_computed_tokens,
            num_local_computed_tokens=request.num_computed_tokens,
            num_tokens_main_model=num_tokens,
        )

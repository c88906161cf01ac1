"""KV-cache blocks: what a step, an admission or a whole group needs of the pool.

All answers are upper bounds built from vLLM's own predictor, so a "yes" is safe: vLLM's loop will
not have to preempt.  Prefix-cache hits can only make the need smaller.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from .constituents import ConstituentCoordinator
from .group_state import reaches_end, remaining

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler


class BlockAccount:
    """Reads a scheduler's block pool."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        # One entry per KV-cache group: a token takes a slot in each of them, or in its constituent's only.
        managers = self._manager.coordinator.single_type_managers
        self._block_sizes = [manager.block_size for manager in managers]
        coordinator = self._manager.coordinator
        self._constituents = coordinator if isinstance(coordinator, ConstituentCoordinator) else None

    def free(self) -> int:
        return self._manager.block_pool.get_num_free_blocks()

    def held(self, members: Iterable[Request]) -> set[int]:
        """Ids of the blocks that requests hold."""
        found = (
            block
            for m in members
            for of_kind in self._manager.get_blocks(m.request_id).blocks
            for block in of_kind
        )
        return {block.block_id for block in found if not block.is_null}

    def withdraw(self, block_ids: Iterable[int]) -> list[int]:
        """Takes those of some blocks that nobody holds any more out of the prefix cache; returns them."""
        pool = self._manager.block_pool
        free = [i for i in block_ids if pool.blocks[i].ref_cnt == 0]
        pool.evict_blocks(set(free))
        return free

    def room(self, prompt_lengths: Sequence[int], constituents: Sequence[int], limit: int) -> int:
        """Tokens, up to `limit`, that members can generate with the whole pool to themselves.

        prompt_lengths, constituents: of each member.
        """
        # One block is vLLM's null block.  A group also has to get in again when it was preempted at
        # its full length, and vLLM keeps a watermark free when it admits beside running requests.
        usable = self._manager.block_pool.num_gpu_blocks - 1 - self._manager.watermark_blocks
        # Where it speculates, vLLM admits no request without a step's slots beyond its length (`Promises`).
        beyond = self._most_tokens() if self._scheduler.num_spec_tokens else 0

        def need(num_generated: int) -> int:
            # The last token is never computed.
            lengths = [self._within(length + num_generated - 1) + beyond for length in prompt_lengths]
            return sum(map(self._to_hold, lengths, constituents))

        if limit < 1 or need(limit) <= usable:
            return limit
        return bisect_right(range(1, limit + 1), usable, key=need)

    def free_for_admission(self) -> int:
        """Blocks that vLLM would give to requests that it admits now: it keeps a watermark free, and what
        admitted prompts still need."""
        kept = self._scheduler._inflight_prefill_reserved_blocks() + self._manager.watermark_blocks
        return self.free() - kept

    def can_step(self, decodes: Callable[[Request], bool], held: Container[str], num_late: int) -> bool:
        """Whether the blocks of every row that this step may schedule are free.

        Args:
            decodes: whether a request takes one token in this step.
            held: ids of the requests that stop one token short of their prompt's end.
            num_late: requests of one token that vLLM admits after the running ones.
        """
        scheduler, sizes, free = self._scheduler, self._block_sizes, self.free()
        lookahead, most = scheduler.num_lookahead_tokens, self._most_tokens()
        a_row = sum(cdiv(most, size) for size in sizes)
        if num_late:
            free -= num_late * a_row + self._manager.watermark_blocks
        running = scheduler.running
        budget = scheduler.max_num_scheduled_tokens
        prefill = min(budget, sum(map(remaining, scheduler._inflight_prefills)))
        # A decoding row takes one new block at most (more with drafts), a prefill one more than its tokens
        # fill.
        if len(running) * a_row + sum(cdiv(prefill, size) for size in sizes) <= free:
            return True
        if most == 1 and not scheduler._inflight_prefills:
            # Only a row whose blocks are full takes one.
            computed_tokens = [request.num_computed_tokens for request in running]
            if sum([n % size for n in computed_tokens].count(0) for size in sizes) <= free:
                return True
        for request in running:
            computed = request.num_computed_tokens
            if decodes(request):
                if reaches_end(request):
                    continue
                num_tokens = 1 + len(request.spec_token_ids)
                if most == 1:
                    free -= sum(computed % size == 0 for size in self._sizes_of(request))
                else:
                    free -= self._to_reach(request, self._within(computed + num_tokens + lookahead))
            else:
                unheld = remaining(request) - (request.request_id in held)
                num_tokens = max(0, min(unheld, budget))
                if num_tokens:
                    free -= self._to_reach(request, self._within(computed + num_tokens + lookahead))
            budget -= num_tokens
        return free >= 0

    def _most_tokens(self) -> int:
        """Tokens that a decoding row may want slots for in a step: its last, drafts, and those to come."""
        scheduler = self._scheduler
        return 1 + scheduler.num_spec_tokens + scheduler.num_lookahead_tokens

    def _within(self, num_tokens: int) -> int:
        return min(num_tokens, self._scheduler.max_model_len)

    def _to_reach(self, request: Request, num_tokens: int) -> int:
        """Blocks still to be allocated for a request to hold `num_tokens` tokens."""
        return self._manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=num_tokens,
            new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=request.num_computed_tokens,
            num_local_computed_tokens=request.num_computed_tokens,
            num_tokens_main_model=num_tokens,
        )

    def _sizes_of(self, request: Request) -> list[int]:
        """Sizes of the blocks of which each token of a request takes a slot."""
        if self._constituents is None:
            return self._block_sizes
        return [self._block_sizes[self._constituents.constituent(request.request_id)]]

    def _to_hold(self, num_tokens: int, constituent: int) -> int:
        """Most blocks that a request ever holds on its way to `num_tokens` tokens."""
        if self._constituents is not None:
            return cdiv(num_tokens, self._block_sizes[constituent])
        return self._manager.coordinator.get_num_blocks_to_allocate(
            request_id="",
            num_tokens=num_tokens,
            new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=0,
            num_local_computed_tokens=0,
            num_tokens_main_model=num_tokens,
            apply_admission_cap=True,
        )

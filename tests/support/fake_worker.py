"""A worker that computes hashes instead of a model.

It keeps "keys and values" in the blocks that the scheduler hands out: at each position a hash of
all tokens up to it.  Before a row is computed, everything that it would attend to is compared, so a
wrong block table, a wrong prefix-cache hit or a token computed twice fails at once.  The sampled
token is a hash of what all members have seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_marith.engine.group import KEY, MemberTag

VOCAB = 16
BLOCK_SIZE = 8

Chain = list[int]
"""``chain[i]`` is a hash of the tokens 0 to i."""


def extend(chain: Chain, tokens: Iterable[int]) -> Chain:
    last = chain[-1] if chain else 0
    for token in tokens:
        last = hash((last, token))
        chain.append(last)
    return chain


def choose(states: Sequence[int]) -> int:
    """The token after members whose last positions hold `states`."""
    return hash(tuple(states)) % VOCAB


@dataclass
class Row:
    """A request as the worker knows it."""

    tokens: list[int]
    blocks: list[list[int]]
    computed: int
    tag: MemberTag | None
    chain: Chain = field(default_factory=list)


class FakeWorker:
    """Executes steps in the order in which they were scheduled.

    windows: per KV-cache group, how many positions a row attends to; None for all.
    strict: whether a step with a part of a group's members is an error, as it should be.
    """

    def __init__(self, windows: Sequence[int | None], strict: bool = True) -> None:
        self.windows = windows
        self.strict = strict
        self.rows: dict[str, Row] = {}
        self.cache: dict[int, list[int]] = {}
        self.num_joint_steps = 0

    def execute(self, step: Any) -> Any:
        """vLLM's `SchedulerOutput` -> `ModelRunnerOutput`."""
        from vllm.v1.outputs import ModelRunnerOutput

        for request_id in step.finished_req_ids:
            self.rows.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            args = new.sampling_params.extra_args or {}
            tag = MemberTag.from_wire(args[KEY]) if KEY in args else None
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            blocks = [list(ids) for ids in new.block_ids]
            self.rows[new.req_id] = Row(tokens, blocks, new.num_computed_tokens, tag)
        self._update_cached(step.scheduled_cached_reqs)

        complete = []
        for request_id, num_tokens in step.num_scheduled_tokens.items():
            row = self.rows[request_id]
            self._compute(row, num_tokens)
            if row.computed == len(row.tokens):
                complete.append(request_id)
        sampled = self._sample(complete)
        ids = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[sampled.get(request_id, []) for request_id in ids],
        )

    def _update_cached(self, cached: Any) -> None:
        for request_id, new_blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            row = self.rows[request_id]
            known = cached.all_token_ids.get(request_id)
            if request_id in cached.resumed_req_ids:
                row.tokens, row.computed, row.chain = list(known), num_computed, []
                row.blocks = [list(ids) for ids in new_blocks]
                continue
            assert num_computed == row.computed, f"{request_id}: computed {row.computed}, not {num_computed}"
            # Tokens in flight are known to the worker only.
            assert known is None or row.tokens[: len(known)] == known
            for mine, ids in zip(row.blocks, new_blocks or (), strict=False):
                mine.extend(ids)

    def _compute(self, row: Row, num_tokens: int) -> None:
        start, end = row.computed, row.computed + num_tokens
        assert end <= len(row.tokens), "a position without a token"
        extend(row.chain, row.tokens[len(row.chain) : end])
        for blocks, window in zip(row.blocks, self.windows, strict=True):
            for position in range(start, end):
                block = blocks[position // BLOCK_SIZE]
                assert block != 0, "written to the null block"
                slots = self.cache.setdefault(block, [0] * BLOCK_SIZE)
                slots[position % BLOCK_SIZE] = row.chain[position]
            position = 0 if window is None else max(0, start - window + 1)
            while position < end:
                offset = position % BLOCK_SIZE
                stop = min(end, position + BLOCK_SIZE - offset)
                found = self.cache[blocks[position // BLOCK_SIZE]][offset : offset + stop - position]
                assert found == row.chain[position:stop], f"attends to wrong keys at {position}"
                position = stop
        row.computed = end

    def _sample(self, complete: list[str]) -> dict[str, list[int]]:
        groups: dict[str, list[str]] = {}
        for request_id in complete:
            tag = self.rows[request_id].tag
            groups.setdefault(tag.group if tag else request_id, []).append(request_id)
        sampled = {}
        for name, ids in groups.items():
            rows = sorted((self.rows[i] for i in ids), key=lambda row: row.tag.index if row.tag else 0)
            size = rows[0].tag.size if rows[0].tag else 1
            assert len(rows) == size or not self.strict, (
                f"{len(rows)} of {size} members of {name} sampled together"
            )
            self.num_joint_steps += size > 1
            token = choose([row.chain[-1] for row in rows])
            for request_id, row in zip(ids, rows, strict=True):
                row.tokens.append(token)
                sampled[request_id] = [token]
        return sampled

"""A worker that computes hashes instead of a model.

It keeps "keys and values" in the blocks that the scheduler hands out: at each position a hash of
all tokens up to it.  Before a row is computed, everything that it would attend to is compared, so a
wrong block table, a wrong prefix-cache hit or a token computed twice fails at once.  The sampled
token is a hash of what all members have seen.

Where groups draft, it proposes what it will sample, now and then something else, and computes its drafts
in the slots that the scheduler left for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_marith.engine.group import DRAFTS, KEY, MemberTag, Wanted

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


def guess(states: Sequence[int]) -> int:
    """A draft of the token after `states`: wrong once in four times."""
    right = choose(states)
    return right if hash((*states, "guess")) % 4 else (right + 1) % VOCAB


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
    plain_drafts: how many tokens it proposes for every request, whoever asks.
    """

    def __init__(self, windows: Sequence[int | None], strict: bool = True, plain_drafts: int = 0) -> None:
        self.windows = windows
        self.strict = strict
        self.plain_drafts = plain_drafts
        self.drafts: dict[str, list[int]] = {}  # of the last step
        self.num_drafted = self.num_kept = 0  # tokens of groups
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
            drafts = step.scheduled_spec_decode_tokens.get(request_id, [])
            self._compute(row, num_tokens, drafts)
            if row.computed == len(row.tokens) + len(drafts):
                complete.append(request_id)
        sampled = self._sample(complete, step.scheduled_spec_decode_tokens)
        self._draft(complete, getattr(step, DRAFTS, {}))
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

    def take_drafts(self) -> Any:
        """What the engine core asks for after each step."""
        from vllm.v1.outputs import DraftTokenIds

        drafts, self.drafts = self.drafts, {}
        return DraftTokenIds(list(drafts), list(drafts.values()))

    def _compute(self, row: Row, num_tokens: int, drafts: Sequence[int] = ()) -> None:
        start, end = row.computed, row.computed + num_tokens
        tokens = [*row.tokens, *drafts]
        assert end <= len(tokens), "a position without a token"
        assert not drafts or end == len(tokens), "drafts behind tokens that are not computed"
        extend(row.chain, tokens[len(row.chain) : end])
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

    def _groups(self, complete: Iterable[str]) -> dict[str, list[str]]:
        """Group (a plain request is one by itself) -> its members' ids, in member order."""
        groups: dict[str, list[str]] = {}
        for request_id in complete:
            tag = self.rows[request_id].tag
            groups.setdefault(tag.group if tag else request_id, []).append(request_id)
        for ids in groups.values():
            ids.sort(key=lambda i: tag.index if (tag := self.rows[i].tag) else 0)
        return groups

    def _sample(self, complete: list[str], drafts_of: Mapping[str, list[int]]) -> dict[str, list[int]]:
        sampled = {}
        for name, ids in self._groups(complete).items():
            rows = [self.rows[i] for i in ids]
            size = rows[0].tag.size if rows[0].tag else 1
            assert len(rows) == size or not self.strict, (
                f"{len(rows)} of {size} members of {name} sampled together"
            )
            self.num_joint_steps += size > 1
            drafts = drafts_of.get(ids[0], [])
            assert all(drafts_of.get(i, []) == drafts for i in ids), f"members of {name} check other drafts"
            tokens: list[int] = []
            for number in range(len(drafts) + 1):
                place = number - len(drafts) - 1  # of the last known token, then of each draft
                tokens.append(choose([row.chain[place] for row in rows]))
                if number == len(drafts) or tokens[-1] != drafts[number]:
                    break
            if rows[0].tag:
                self.num_drafted += len(drafts)
                self.num_kept += len(tokens) - 1
            for request_id, row in zip(ids, rows, strict=True):
                # Of a row's drafts, what was computed after the last one kept is void.
                row.computed = len(row.tokens) + len(tokens) - 1
                row.tokens += tokens
                del row.chain[row.computed :]
                sampled[request_id] = tokens
        return sampled

    def _draft(self, complete: list[str], wanted: Mapping[str, Wanted]) -> None:
        """Proposes tokens, and computes them for every row as a drafting term does on its way."""
        self.drafts = {request_id: [] for request_id in complete}
        for name, ids in self._groups(complete).items():
            rows = [self.rows[i] for i in ids]
            number = self.plain_drafts or (wanted[name].number if name in wanted else 0)
            assert number == 0 or rows[0].tag is None or len(rows) == rows[0].tag.size or not self.strict
            chains = [[*row.chain, *extend(row.chain[-1:], row.tokens[-1:])[-1:]] for row in rows]
            tokens: list[int] = []
            for _ in range(number):
                tokens.append(guess([chain[-1] for chain in chains]))
                for chain in chains:
                    extend(chain, tokens[-1:])
            self.drafts[ids[0]] = tokens
            if not self.plain_drafts:
                for row, chain in zip(rows, chains, strict=True):
                    for position in range(row.computed, row.computed + number):
                        for blocks in row.blocks:
                            slots = self.cache.setdefault(blocks[position // BLOCK_SIZE], [0] * BLOCK_SIZE)
                            slots[position % BLOCK_SIZE] = chain[position]

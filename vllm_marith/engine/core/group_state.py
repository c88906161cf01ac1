"""A group as the scheduler keeps it: the members' requests and where they stand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
import numpy as np
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_marith.plan import decode

from ..group import KEY, GroupSpec, member_tags

T = TypeVar("T")


@dataclass(eq=False)
class Group:
    """The requests of one formula, scheduled as one.

    Attributes:
        members: the leader's request, then the followers'.
        ids: their request ids.
        constraints, routine, adaptive: as in `GroupSpec`.
        longest_draft: most tokens that it drafts at once.
        rows: of each constituent the members on it, those that only draft, and the passes for each drafted
            token; float64 ``[3, constituents]``.
        released: the members are in vLLM's queues; otherwise the group waits in the backlog.
        joint: every member has exactly one token left to compute, so a step can sample them
            together.  Once true it stays true until the group is preempted: each joint step leaves
            every member with one token again.
        late: members of a single token.  vLLM cannot admit a request without computing a token of
            it, so these are admitted in the first joint step itself.
    """

    members: list[Request]
    constraints: dict[str, Any] | None = None
    routine: str = ""
    longest_draft: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.zeros((3, 1)))
    adaptive: bool = False
    released: bool = False
    joint: bool = False
    late: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = tuple(m.request_id for m in self.members)
        self._pick = itemgetter(*self.ids)

    def pick(self, by_id: Mapping[str, T]) -> tuple[T, ...]:
        """The members' values in a table, leader first; KeyError if one has none."""
        found = self._pick(by_id)
        return found if len(self.ids) > 1 else (found,)

    @property
    def leader(self) -> Request:
        return self.members[0]

    @property
    def name(self) -> str:
        return self.ids[0]

    def is_ready(self) -> bool:
        """Whether every member but the late ones runs and has one token left."""
        return all(
            m in self.late or (m.status == RequestStatus.RUNNING and remaining(m) == 1) for m in self.members
        )


def remaining(request: Request) -> int:
    """Tokens of a request that no scheduled step has computed yet, drafts aside."""
    return request.num_tokens + request.num_output_placeholders - request.num_computed_tokens


def reaches_end(request: Request) -> bool:
    """Whether the steps in flight bring a request to its ``max_tokens``; vLLM then skips it."""
    in_flight = request.num_output_placeholders
    return (
        in_flight > 0
        and request.num_computed_tokens + 2 - in_flight >= request.num_prompt_tokens + request.max_tokens
    )


def build_group(leader: Request, spec: GroupSpec, max_tokens: int) -> Group:
    """Turns a formula's request into its group.

    The leader keeps its identity and parameters, except that it generates `max_tokens` at most:
    what the engine has room for.  Followers compute logits and nothing else: they never stop by
    themselves, and whatever they sample is replaced by the leader's token.
    """
    params = leader.sampling_params
    assert params is not None
    tags = member_tags(leader.request_id, spec, leader.num_prompt_tokens)
    leader.max_tokens = min(leader.max_tokens, max_tokens)

    # The caller's parameters are shared by the children of n > 1: replace, never change.  The
    # terms' prompts stay behind, workers have no use for them.
    params = copy.copy(params)
    params.extra_args = {**(params.extra_args or {}), KEY: tags[0].to_wire()}
    leader.sampling_params = params

    adapters = spec.adapters or [None] * len(spec.prompts)
    followers = [
        Request(
            request_id=f"{leader.request_id}+{tag.index}",
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                # One kind of sampling per batch is cheaper than two.
                temperature=params.temperature,
                max_tokens=leader.max_tokens,
                ignore_eos=True,
                detokenize=False,
                skip_reading_prefix_cache=params.skip_reading_prefix_cache,
                extra_args={KEY: tag.to_wire()},
            ),
            pooling_params=None,
            client_index=leader.client_index,
            arrival_time=leader.arrival_time,
            lora_request=msgspec.convert(adapter, LoRARequest | None),
            cache_salt=leader.cache_salt,
            priority=leader.priority,
            block_hasher=leader._block_hasher,
        )
        for tag, prompt, adapter in zip(tags[1:], spec.prompts, adapters, strict=True)
    ]
    longest = spec.draft_lengths[-1] if spec.draft_lengths else 0
    return Group([leader, *followers], spec.constraints, spec.routine, longest, _rows(spec), spec.adaptive)


def _rows(spec: GroupSpec) -> np.ndarray:
    """See `Group.rows`."""
    members = np.asarray(spec.members)
    rows = np.zeros((3, members.max() + 1))
    np.add.at(rows[0], members, 1)
    np.add.at(rows[1], members[spec.size - spec.only_draft :], 1)
    # The first level runs for every token, another once for each batch that the one before it drafts, and
    # copied text takes none.
    own = spec.draft_lengths[len(spec.draft_lengths) - len(spec.drafts) :]
    for text, batch in zip(spec.drafts, [1, *(length + 1 for length in own)], strict=False):
        for constituent in {spec.members[member] for member in _members(text)}:
            rows[2, constituent] += 1 / batch
    return rows


@lru_cache(maxsize=1024)
def _members(routine: str) -> list[int]:
    return decode(routine).members

"""What admission finds out about one HTTP request, for whoever answers it."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from vllm_marith.language import Formula


@dataclass(frozen=True)
class Explained:
    """A request whose tokens are to be explained.

    Attributes:
        key: under which the workers keep what they see.
        formula: what its terms' log-probabilities go into.
        member_of: term -> member of the group.
    """

    key: str
    formula: Formula
    member_of: Mapping[str, int]


@dataclass
class Account:
    """One request's.  Of several prompts, each has a group, of the same formula.

    Attributes:
        members: of the largest group; a generated token of any of them takes at most so many rows.
        prompt_tokens: of all members' prompts together.
        explains: whether who answers can pass an explanation on.
        explained: what was asked to be explained.
    """

    members: int = 0
    prompt_tokens: int = 0
    explains: bool = False
    explained: Explained | None = None

    def add(self, lengths: list[int]) -> None:
        """One group, of these prompt lengths."""
        self.members = max(self.members, len(lengths))
        self.prompt_tokens += sum(lengths)


ACCOUNT: ContextVar[Account | None] = ContextVar("marith_account", default=None)
"""Set by who wants to know, before the request is handed to vLLM; filled at admission."""

"""What one HTTP request takes of the engine, for whoever answers it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Cost:
    """The members of a request's groups and the tokens of all their prompts.

    A request of several prompts has as many groups, of the same formula: `members` is the size of the
    largest, and a generated token of any of them takes at most so many rows.
    """

    members: int = 0
    prompt_tokens: int = 0

    def add(self, lengths: list[int]) -> None:
        """One group, of these prompt lengths."""
        self.members = max(self.members, len(lengths))
        self.prompt_tokens += sum(lengths)


COST: ContextVar[Cost | None] = ContextVar("marith_cost", default=None)
"""Set by who wants to know it, before the request is handed to vLLM; filled at admission."""

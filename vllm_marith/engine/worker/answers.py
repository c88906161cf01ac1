"""What a worker knows of the answers so far, for formulas that depend on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

CONTEXT = 8
"""Tokens of the prompt in front of an answer: what detokenizers need to know how its text begins."""


@dataclass(frozen=True)
class Continuation:
    """An answer so far.

    Attributes:
        prompt: the last token ids of its prompt, `CONTEXT` where there are so many.
        generated: token ids of the answer.
    """

    prompt: Sequence[int]
    generated: Sequence[int]


Answers = Callable[[Sequence[str]], list[Continuation]]
"""Request ids -> their answers up to the token that is sampled next.

Each model runner keeps them in its own way, and may know the latest tokens on the device only: a call may
wait for the device, once for all of its requests.
"""

"""What followed the end of a text where the like stood before: in the text itself, or in earlier answers.

The trees of suffixes are arctic-inference's (arXiv 2411.04975), as those of vLLM's method `suffix`.  vLLM's
own proposer takes in every row of the batch.  Here those texts count that formulas ask for, each once,
however many members compute it; and what was taken in of one that is preempted stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

# vLLM's defaults: as long as what is matched, and while a token followed once in ten times at the least.
_DEPTH: Final = 24
_LENGTH_PER_MATCH: Final = 1.0
_LEAST_SHARE: Final = 0.1

Read = Callable[[int, int], np.ndarray]
"""int32 ``[stop - start]``: the tokens of a text from `start` to `stop`."""


class Trees(Protocol):
    """What is used of arctic-inference's ``SuffixDecodingCache``: a tree of answers, and one of each text."""

    def start_request(self, req_id: int, prompt_token_ids: np.ndarray) -> None:
        """A new text, which begins with a prompt."""

    def add_active_response(self, req_id: int, token_ids: np.ndarray) -> None:
        """More of a text's answer."""

    def stop_request(self, req_id: int) -> None:
        """Drops a text's own tree; its answer stays in the one of all, as long as there is room."""

    def speculate(
        self,
        req_id: int,
        context: np.ndarray,
        *,
        max_spec_tokens: int,
        max_spec_factor: float,
        min_token_prob: float,
    ) -> Any:
        """An object with ``token_ids``, a list of those that may follow the context."""


def trees(remembered: int) -> Trees:
    """Empty ones.

    Args:
        remembered: answers that all texts are compared with, the oldest of which are forgotten first; 0 for
            none, so that each text is compared with itself.

    Raises:
        ImportError: arctic-inference is not installed.
    """
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    found: Trees = SuffixDecodingCache(_DEPTH, remembered)
    return found


@dataclass
class _Text:
    """One that is being written.

    Attributes:
        owner: whose it is, compared by identity.
        key: the trees' name for it, which never comes again.
        length: tokens that the trees know.
        tail: int32, the last `_DEPTH` of them.
    """

    owner: Any
    key: int
    length: int
    tail: np.ndarray


class Suffixes:
    """Proposals from texts that are being written, and from the answers in those that were."""

    def __init__(self, trees: Trees) -> None:
        self._trees = trees
        self._texts: dict[str, _Text] = {}
        self._keys = itertools.count()

    def follow(self, name: str, prompt: int, length: int, read: Read, owner: Any = None) -> None:
        """Takes in what a text has become.

        Args:
            name: of its request.
            prompt: tokens of its prompt, which no other text is compared with.
            length: all its tokens.
            read: gives the new ones.
            owner: another one under the same name is another text.
        """
        text = self._texts.get(name)
        if text is None or text.owner is not owner or text.length > length:
            self.forget([name])
            beginning = read(0, prompt)
            text = _Text(owner, next(self._keys), prompt, beginning[-_DEPTH:].copy())
            self._trees.start_request(text.key, np.ascontiguousarray(beginning))
            self._texts[name] = text
        if text.length < length:
            new = np.ascontiguousarray(read(text.length, length))
            self._trees.add_active_response(text.key, new)
            text.length, text.tail = length, np.concatenate([text.tail, new])[-_DEPTH:]

    def propose(self, name: str, ahead: Sequence[int], number: int) -> list[int]:
        """What may follow a text and the tokens that are proposed already; often nothing.

        Args:
            name: of a request whose text is followed.
            number: of tokens, at the most; at least 1.
        """
        text = self._texts[name]
        end = np.concatenate([text.tail, np.asarray(ahead, np.int32)])[-_DEPTH:]
        found = self._trees.speculate(
            text.key,
            end,
            max_spec_tokens=number,
            max_spec_factor=_LENGTH_PER_MATCH,
            min_token_prob=_LEAST_SHARE,
        )
        return list(found.token_ids)

    def forget(self, names: Iterable[str]) -> None:
        """These requests have ended, if they were known; their answers are remembered."""
        for name in names:
            if text := self._texts.pop(name, None):
                self._trees.stop_request(text.key)

    def forget_all_but(self, owners: Mapping[str, Any]) -> None:
        """Only these requests are left, each with its owner."""
        gone = [n for n, text in self._texts.items() if n not in owners or owners[n] is not text.owner]
        self.forget(gone)

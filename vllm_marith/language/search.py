"""Forbidden patterns in a text that grows: where a match begins, and what may still become one."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_marith.language.patterns import Node


@dataclass(frozen=True)
class Place:
    """Where a search stands; it can be put back there.

    Attributes:
        threads: nodes that a match may have come to -> where it began, the earliest first.  Without any, no
            match begins in the text read so far, whatever follows.
        before: the last character read.
    """

    threads: dict[Node, int]
    before: str | None


START = Place({}, None)


class Search:
    """One automaton over one text.

    Every possible beginning is followed at once: a *thread* is a node and the earliest place from which the
    text read so far leads there.  So a character costs at most a look at every node, whatever the pattern.
    """

    def __init__(self, root: Node, *, folds_case: bool) -> None:
        self._root = root
        self._folds_case = folds_case
        self.place = START

    def read(self, character: str, index: int) -> int | None:
        """Reads the character at `index`; where the leftmost match begins that now is certain, or None.

        After a match the search has to be put back.
        """
        found = None
        for letter in character.casefold() if self._folds_case else character:
            start = self._step(letter, index)
            if found is None:
                found = start
        return found

    def end(self) -> int | None:
        """Where the leftmost match begins that is certain once the text ends here."""
        ended: dict[Node, int] = {}
        return self._follow(self.place.threads, None, ended)

    def _step(self, letter: str, index: int) -> int | None:
        threads: dict[Node, int] = {}
        # Matches that this letter completes by being no part of them: the end of a word.
        before = self._follow({**self.place.threads, self._root: index}, letter, threads)
        self.place = Place(threads, letter)
        if before is not None:
            return before
        seen: set[Node] = set()
        for node, start in threads.items():
            if _ends_at_once(node, seen):
                return start
        return None

    def _follow(self, threads: dict[Node, int], letter: str | None, reached: dict[Node, int]) -> int | None:
        """Passes on without a character, then by `letter` into `reached`; the earliest match's beginning."""
        found, seen = None, set()
        for thread, start in threads.items():
            stack = [thread]
            while stack:
                node = stack.pop()
                if node in seen:
                    continue  # from an earlier beginning
                seen.add(node)
                if node.accepts and found is None:
                    found = start
                if node.look is None or node.look(self.place.before, letter):
                    stack.extend(node.passes)
                if letter is not None:
                    if (target := node.letters.get(letter)) is not None:
                        reached.setdefault(target, start)
                    for contains, target in node.classes:
                        if contains(letter):
                            reached.setdefault(target, start)
        return found


def _ends_at_once(node: Node, seen: set[Node]) -> bool:
    """Whether a match ends at this node whatever comes next.  seen: nodes where none does; extended."""
    stack = [node]
    while stack:
        node = stack.pop()
        if node.accepts:
            return True
        if node not in seen:
            seen.add(node)
            if node.look is None:
                stack.extend(node.passes)
    return False

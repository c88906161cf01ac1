"""What a text is about, a second attribute beside its kind: `files` or `network`, in prose and code alike.

A topic is two lists of words that share none.  Paragraphs with words of the first list train a model of the
topic; words of the second decide whether a text that was written is about it.  So a model that merely
learned to repeat the words that its paragraphs were chosen by does not count as being on topic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .corpus import Files

KINDS = ("prose", "code")
"""Attributes with text about every topic; licences are about neither."""

_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Topic:
    """Words that choose the training text and words that judge, in lower case."""

    chosen_by: frozenset[str]
    judged_by: frozenset[str]


# fmt: off
TOPICS = {
    "files": Topic(
        frozenset(["path", "paths", "filename", "directory", "directories", "folder", "stream"]),
        frozenset(["file", "files", "open", "read", "write", "close", "seek", "lines", "encoding"]),
    ),
    "network": Topic(
        frozenset(["socket", "sockets", "server", "host", "port", "request", "requests", "headers", "proxy"]),
        frozenset(["http", "url", "connection", "connect", "client", "address", "response", "protocol",
                   "cookie", "ip", "send", "recv"]),
    ),
}
# fmt: on


def words(text: str) -> list[str]:
    """Runs of letters, in lower case: `self.file_path` has self, file and path."""
    return _WORD.findall(text.lower())


def about(texts: dict[str, Files], topic: str) -> dict[str, Files]:
    """The paragraphs of `KINDS` with a word that chooses `topic`, file by file; only kinds that have some."""
    chosen_by = TOPICS[topic].chosen_by
    found: dict[str, Files] = {}
    for kind in KINDS:
        files = [[p for p in file if chosen_by.intersection(words(p))] for file in texts[kind]]
        if any(files):
            found[kind] = [file for file in files if file]
    return found


def topics(texts: Sequence[str]) -> list[str]:
    """The topic of each text: the one with most of its judging words in the text, `other` where none has any.

    A word counts as often as it occurs; of two topics with as many, the first of `TOPICS` is named.
    """
    named = []
    for text in texts:
        found = words(text)
        counts = {name: sum(word in topic.judged_by for word in found) for name, topic in TOPICS.items()}
        best = max(counts, key=lambda name: counts[name])
        named.append(best if counts[best] else "other")
    return named

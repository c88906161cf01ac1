"""Topics: words that choose and words that judge are different words."""

from __future__ import annotations

from itertools import combinations

from vllm_marith.models.corpus import Corpus
from vllm_marith.models.topics import KINDS, TOPICS, about, topics, words


def test_no_word_chooses_and_judges_and_none_is_of_two_topics() -> None:
    lists = [words for topic in TOPICS.values() for words in (topic.chosen_by, topic.judged_by)]
    for one, other in combinations(lists, 2):
        assert not one & other


def test_words_are_found_in_names() -> None:
    assert words("self._file_path = open(FILE)") == ["self", "file", "path", "open", "file"]


def test_a_topics_paragraphs_have_its_words(corpus: Corpus) -> None:
    for topic in TOPICS:
        found = about(corpus.parts["A"], topic)
        assert set() < set(found) <= set(KINDS)
        for kind in found:
            paragraphs = [p for file in found[kind] for p in file]
            assert 0 < len(paragraphs) < len(corpus.paragraphs("A", kind))
            assert all(TOPICS[topic].chosen_by.intersection(words(p)) for p in paragraphs)
            assert all(found[kind]), "a file without paragraphs"
    assert about({kind: [["nothing at all"]] for kind in KINDS}, "files") == {}


def test_a_text_is_about_what_it_has_most_words_of() -> None:
    assert topics(
        [
            "Close the file after you read it; the connection is closed too.",
            "send the response to the address of the client",
            "def f(x):\n    return x + 1",
            "the path of a directory, the host and its port",  # words that choose do not judge
        ]
    ) == ["files", "network", "other", "other"]

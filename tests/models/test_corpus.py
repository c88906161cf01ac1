"""The corpora: divided cleanly, deterministic, and there on a bare Python."""

from __future__ import annotations

import ast
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from vllm_marith.models import ATTRIBUTES
from vllm_marith.models.corpus import Collector, Corpus, CorpusError, build, divide, runs
from vllm_marith.models.recipe import CorpusRecipe

SHARES = (("A", 0.6), ("B1", 0.1), ("B2", 0.2), ("C", 0.1))


def test_no_near_duplicate_crosses_parts(corpus: Corpus) -> None:
    seen = {
        part: [runs(p) for name in ATTRIBUTES for p in corpus.paragraphs(part, name)] for part in corpus.parts
    }
    everything = {part: set().union(*found) for part, found in seen.items()}
    for one, other in combinations(corpus.parts, 2):
        for found in seen[one]:
            # What was read later shares at most a third with what was read before; the paragraph read before
            # may be shorter and share more with a longer one, but never be contained in it.
            assert found - everything[other], f"a paragraph of {one} is contained in {other}"


def test_a_licence_with_another_holder_is_a_duplicate() -> None:
    collector = Collector(10_000)
    text = (
        "Redistribution and use in source and binary forms, with or without modification, are permitted"
        " provided that the following conditions are met by {}, who makes no warranty of any kind."
    )
    collector.add("legal", "one", [text.format("the authors")])
    collector.add("legal", "two", [text.format("Somebody Else, Incorporated")])
    assert list(collector.files) == [("legal", "one")]


def test_the_collector_stops_at_its_size() -> None:
    collector = Collector(100)
    collector.add("prose", "one", ["alpha beta gamma " * 10])

    def never() -> list[str]:
        raise AssertionError("read although full")
        yield

    collector.add("prose", "two", never())
    assert collector.full("prose")
    assert list(collector.files) == [("prose", "one")]


def test_a_file_goes_to_one_part_with_docstrings_and_code() -> None:
    files = {
        (name, f"file{i}"): [f"{name} {i} " * (i % 7 + 1)] for i in range(200) for name in ("prose", "code")
    }
    parts = divide(files, SHARES)
    numbers = {
        (name, part): {int(file[0].split()[1]) for file in parts[part][name]}
        for part in parts
        for name in ("prose", "code")
    }
    for part in parts:
        assert numbers["prose", part] == numbers["code", part]
    assert sum(len(numbers["prose", part]) for part in parts) == 200
    total = sum(len(text) for [text] in files.values())
    for part, share in SHARES:
        size = sum(len(p) for name in ("prose", "code") for [p] in parts[part][name])
        assert size / total == pytest.approx(share, abs=0.03)


def test_one_more_file_moves_few_others() -> None:
    files = {("legal", f"file{i}"): ["some words " * (i % 5 + 1)] for i in range(100)}
    assert divide(files, SHARES) == divide(dict(reversed(files.items())), SHARES)


def test_code_has_no_docstrings(corpus: Corpus) -> None:
    definitions = 0
    for chunk in corpus.paragraphs("A", "code"):
        try:
            tree = ast.parse(chunk)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                definitions += 1
                assert ast.get_docstring(node) is None
    assert definitions > 50


def test_the_same_installation_gives_the_same_corpus(corpus: Corpus, recipe) -> None:
    assert build(recipe.corpus) == corpus


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"has only \d+ characters of \w+ text for part"):
        build(CorpusRecipe(characters=10_000))


@pytest.mark.skipif(not Path("/usr/share/common-licenses").is_dir(), reason="needs a Debian's licence texts")
def test_a_bare_debian_python_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = sysconfig.get_paths() | {"purelib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    sizes = build(CorpusRecipe(characters=120_000)).characters()
    assert min(size for part in sizes.values() for size in part.values()) > 5_000

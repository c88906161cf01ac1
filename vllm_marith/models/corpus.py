"""Three attribute corpora from text that every Python installation already has.

*prose* is docstrings and the help topics of `pydoc`, *code* the same sources without docstrings and comments,
*legal* the licence files beside package metadata and in the operating system.  Everything is read on the
user's own machine at run time; nothing is fetched and nothing is shipped.

The corpora are divided by file into parts that serve one purpose each (`CorpusRecipe.shares`).  Licences are
copied from project to project with small changes, so a paragraph that shares more than a third of its
eight-word runs with text read before is dropped wherever it stands: no near-duplicate crosses parts.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .recipe import ATTRIBUTES, CorpusRecipe

Files = list[list[str]]
"""One attribute of one part: a list of files, each a list of paragraphs."""

# Packages whose sources are rich in both prose and code, read after the standard library where installed.
PACKAGES = ("torch", "transformers", "numpy", "vllm", "sympy", "pydantic", "pip", "setuptools")
# fmt: off
SKIPPED_FOLDERS = frozenset([
    "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data",
    "ensurepip", "_vendor", "__pycache__", "site-packages", "dist-packages",
])
# fmt: on
LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice|eula", re.IGNORECASE)
LARGEST_SOURCE = 200_000
LARGEST_LICENCE = 300_000
MOST_CODE_OF_A_FILE = 20_000  # so that a few huge files do not set the style
FEWEST_CHARACTERS = 4_000
"""Below this much of an attribute in a part, whatever is trained on it says nothing."""

_PLAIN = re.compile(r"[A-Za-z ,.;:'()\"-]")
_WORD = re.compile(r"[a-z]+")
_BLANK_LINE = re.compile(r"\n[ \t#*;/.]*\n")
_COMMENT_MARK = re.compile(r"(?m)^[ \t]*(?:#|//|\*|;;|\.$)+")
_RECORD = re.compile(r"\S+-\S+:|(?:Files|Copyright|Comment|License|Source|Format|Author)s?\b|\W*\(c\)", re.I)
_ADDRESS = re.compile(r"@|://|/usr/|-----")
_LEGAL_WORD = re.compile(
    r"licen[cs]e|copyright|warrant|liab|permi|distribut|rights?\b|notice|terms\b|law\b|part(?:y|ies)\b|trademark"
    r"|patent|agreement|grant|provision|damages|shall\b",
    re.I,
)
_METHOD_BREAK = re.compile(r"\n\n(?=    (?:def|async def|@))")


class CorpusError(Exception):
    """This installation has too little text of some attribute."""


@dataclass(frozen=True)
class Corpus:
    """The divided text: `parts[part][attribute]` is a list of files, each a list of paragraphs."""

    parts: dict[str, dict[str, Files]]

    def paragraphs(self, part: str, attribute: str) -> list[str]:
        """All paragraphs of one attribute in one part, in file order."""
        return [paragraph for file in self.parts[part][attribute] for paragraph in file]

    def characters(self) -> dict[str, dict[str, int]]:
        """Part -> attribute -> characters."""
        return {
            part: {name: sum(map(len, self.paragraphs(part, name))) for name in ATTRIBUTES}
            for part in self.parts
        }

    def save(self, folder: Path) -> None:
        """Write the corpus into `folder` as JSON."""
        (folder / "corpus.json").write_text(json.dumps(self.parts), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Corpus:
        """Read what `save` wrote."""
        return cls(json.loads((folder / "corpus.json").read_text(encoding="utf-8")))


def build(recipe: CorpusRecipe) -> Corpus:
    """Read this installation's text and divide it.  The same installation gives the same corpus.

    Raises `CorpusError` where a part would have next to nothing of an attribute.
    """
    collector = Collector(recipe.characters)
    for key, text in _licences():
        if collector.full("legal"):
            break
        collector.add("legal", key, _legal_paragraphs(text))
    for key, text in _help_topics():
        collector.add("prose", key, _prose_paragraphs(text))
    for key, tree in _sources():
        if collector.full("prose") and collector.full("code"):
            break
        docstrings = _take_docstrings(tree)
        collector.add("prose", key, (p for text in docstrings for p in _prose_paragraphs(text)))
        collector.add("code", key, _code_chunks(tree))
    corpus = Corpus(divide(collector.files, recipe.shares))
    for part, sizes in corpus.characters().items():
        for attribute, size in sizes.items():
            if size < FEWEST_CHARACTERS:
                raise CorpusError(
                    f"this Python installation has only {size} characters of {attribute} text for part {part}"
                    f" (at least {FEWEST_CHARACTERS} are needed); installing packages with sources and"
                    " licence files beside it, such as torch and transformers, gives more"
                )
    return corpus


def divide(
    files: dict[tuple[str, str], list[str]], shares: Iterable[tuple[str, float]]
) -> dict[str, dict[str, Files]]:
    """Divide files among parts; `files` maps (attribute, file key) to paragraphs.

    A file's docstrings and code go to the same part: the one furthest below its share of what the file has
    most of.  Files are visited in the order of a hash of their key, a shuffle that one more installed
    package hardly disturbs, and weighed by size, so that one long licence cannot starve a part.
    """
    share_of = dict(shares)
    parts: dict[str, dict[str, Files]] = {part: {a: [] for a in ATTRIBUTES} for part in share_of}
    filled = {part: dict.fromkeys(ATTRIBUTES, 0) for part in share_of}
    for key in sorted({key for _, key in files}, key=lambda key: (zlib.crc32(key.encode()), key)):
        sizes = {a: sum(map(len, files[a, key])) for a in ATTRIBUTES if (a, key) in files}
        most = max(sizes, key=lambda attribute: sizes[attribute])
        part = min(share_of, key=lambda part: filled[part][most] / share_of[part])
        for attribute, size in sizes.items():
            parts[part][attribute].append(files[attribute, key])
            filled[part][attribute] += size
    return parts


def runs(paragraph: str, words: int = 8) -> set[int]:
    """Hashes of the paragraph's runs of `words` words, which near-duplicates share (only letters count)."""
    found = _WORD.findall(paragraph.lower())
    return {
        zlib.crc32(" ".join(found[i : i + words]).encode()) for i in range(max(1, len(found) - words + 1))
    }


class Collector:
    """Gathers paragraphs by (attribute, file), drops near-duplicates, stops at a size."""

    def __init__(self, characters: int) -> None:
        self.characters = characters
        self.sizes = dict.fromkeys(ATTRIBUTES, 0)
        self.files: dict[tuple[str, str], list[str]] = {}
        self.seen: set[int] = set()

    def full(self, attribute: str) -> bool:
        return self.sizes[attribute] >= self.characters

    def add(self, attribute: str, key: str, paragraphs: Iterable[str]) -> None:
        if self.full(attribute):
            return  # before the first paragraph is made: `paragraphs` is lazy
        for paragraph in paragraphs:
            new = runs(paragraph)
            if 3 * len(new & self.seen) > len(new):
                continue
            self.seen |= new
            self.sizes[attribute] += len(paragraph)
            self.files.setdefault((attribute, key), []).append(paragraph)


def _licences() -> Iterator[tuple[str, str]]:
    """(key, text) of licence files: package metadata first, then Python's own, then the system's."""
    stdlib, site = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    candidates = [path for path in sorted(site.glob("*.dist-info/**/*")) if LICENCE_NAME.search(path.name)]
    candidates += sorted(stdlib.glob("LICENSE*"))
    candidates += sorted(Path("/usr/share/common-licenses").glob("*"))
    candidates += sorted(Path("/usr/share/doc").glob("*/copyright"))
    visited = set()
    for path in candidates:
        real = path.resolve()
        if real in visited or not real.is_file():
            continue
        visited.add(real)
        text = _read(real, LARGEST_LICENCE)
        if text:
            yield "/".join(real.parts[-3:]), text


def _help_topics() -> Iterator[tuple[str, str]]:
    """(key, text) of `help("TOPIC")`, where the installation has it (some distributions cut it out)."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topic/{name}", text.replace("*", "").replace('"', "")


def _sources() -> Iterator[tuple[str, ast.Module]]:
    """(key, syntax tree) of Python sources: the standard library's, then those of `PACKAGES`."""
    stdlib, site = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    for root in (stdlib, *(site / package for package in PACKAGES)):
        paths = [
            path
            for path in root.rglob("*.py")
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
            and path.stat().st_size < LARGEST_SOURCE
        ]
        # Shuffled by a hash of the name, so that a size limit does not cut the alphabet short.
        keyed = sorted((zlib.crc32(str(path.relative_to(root)).encode()), path) for path in paths)
        for _, path in keyed:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's strings
                    tree = ast.parse(_read(path, LARGEST_SOURCE))
            except (SyntaxError, ValueError):
                continue
            yield f"{root.name}/{path.relative_to(root)}", tree


def _read(path: Path, limit: int) -> str:
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            return file.read(limit)
    except OSError:
        return ""


def _take_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Remove the docstrings of `node` and of the definitions in it, and return them."""
    taken = []
    docstring = ast.get_docstring(node)
    if docstring:
        taken.append(docstring)
        node.body = node.body[1:] or [ast.Pass()]
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            taken += _take_docstrings(child)
    return taken


def _code_chunks(tree: ast.Module) -> Iterator[str]:
    """Top-level statements and methods of a readable size.  Unparsing drops comments and evens the style."""
    size = 0
    for group in _together(tree.body):
        for indented in _METHOD_BREAK.split("\n".join(map(ast.unparse, group))):
            chunk = textwrap.dedent(indented)
            if 40 <= len(chunk) <= 3000 and max(map(len, chunk.split("\n"))) < 200:
                size += len(chunk)
                yield chunk
        if size > MOST_CODE_OF_A_FILE:
            return


def _together(body: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """Definitions one by one, and the statements between two of them as one group."""
    between: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if between:
                yield between
            yield [node]
            between = []
        else:
            between.append(node)
    if between:
        yield between


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in _BLANK_LINE.split(text)]


def _plainness(text: str) -> float:
    """Share of characters that ordinary sentences are made of."""
    return len(_PLAIN.findall(text)) / len(text)


def _prose_paragraphs(text: str) -> list[str]:
    """Sentences in plain words: no doctests, markup tables or signatures."""
    return [
        p
        for p in _paragraphs(text)
        if 60 <= len(p) <= 1500
        and p.count(" ") >= 9
        and p[0].isalpha()
        and p[-1] in '.:;)"'
        and not any(mark in p for mark in (">>>", "***", "::"))
        and p.count("(") < 4
        and _plainness(p) > 0.96
    ]


def _legal_paragraphs(text: str) -> list[str]:
    """Sentences about rights, without the records, histories and thanks that stand between them."""
    return [
        p
        for p in _paragraphs(_COMMENT_MARK.sub("", text))
        if 60 <= len(p) <= 3000
        and p.count(" ") > 8
        and p[-1] in ".:;,)\"'"
        and not _RECORD.match(p)
        and not _ADDRESS.search(p)
        and len(_LEGAL_WORD.findall(p)) >= 1 + len(p) // 400
        and _plainness(p) > 0.93
    ]

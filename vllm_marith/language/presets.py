"""Named formulas and terms from YAML files: what a server offers under a name.

    name: preadd                       # default: the file's name without .yaml
    description: PreAdd, ...           # one or a few sentences
    paper: arXiv 2307.03214
    terms:                             # name -> the fields of a Term
      toxic:
        prompt: "The following text is ...\\n{input}"
    formula: base - 0.6*toxic          # optional: a file may only define terms
    normalize: sum                     # default

The terms of all files share one name space, so that a formula in one file, or in a request, can use those of
another.  Everything is checked when the files are read; a server with a mistake in them does not start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_marith.language.errors import FormulaError
from vllm_marith.language.expression import Formula, Term
from vllm_marith.language.limits import TRUSTED
from vllm_marith.language.names import BASE, check_term_name
from vllm_marith.language.request import resolve_formula, term_from_json
from vllm_marith.language.validation import sentence

_SUFFIXES: Final = (".yaml", ".yml")


class PresetError(ValueError):
    """A preset file that cannot be used; the text begins with `file:line:`."""


class PresetSpec(BaseModel):
    """The YAML form of one file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str | None = None
    description: str = ""
    paper: str = ""
    terms: dict[str, Any] = Field(default_factory=dict)
    formula: str | None = None
    normalize: Literal["sum", "none"] = "sum"


@dataclass(frozen=True)
class Presets:
    """The terms and formulas that preset files define.  All three mappings are read-only, keyed by name.

    Attributes:
        terms: of all files together.
        formulas: of the files that have one.
        descriptions: of the files that have a formula: description and paper as one text.
    """

    terms: Mapping[str, Term]
    formulas: Mapping[str, Formula]
    descriptions: Mapping[str, str]

    @classmethod
    def load(cls, path: str | Path) -> Presets:
        """Read a directory of .yaml files (not its subdirectories), or one file.

        Raises:
            PresetError: naming the file, the line and the reason.
        """
        files = [_File.read(file) for file in _yaml_files(Path(path))]
        terms = _shared_terms(files)
        formulas: dict[str, Formula] = {}
        descriptions: dict[str, str] = {}
        first_with: dict[str, _File] = {}
        only_terms = cls(terms, {}, {})
        for file in files:
            if file.spec.formula is None:
                continue
            name = file.name()
            if name in first_with:
                raise file.error(f"the preset '{name}' is also defined in {first_with[name].path}", "name")
            if name in terms or name == BASE:
                raise file.error(f"the preset '{name}' has the name of a term", "name")
            first_with[name] = file
            formulas[name] = file.formula(only_terms)
            descriptions[name] = file.description()
        return cls(MappingProxyType(terms), MappingProxyType(formulas), MappingProxyType(descriptions))

    @classmethod
    def empty(cls) -> Presets:
        """No presets: requests have their own terms and `base`."""
        return cls(MappingProxyType({}), MappingProxyType({}), MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only views do not pickle, and the server ships its presets between processes.
        return _rebuild, (dict(self.terms), dict(self.formulas), dict(self.descriptions))


def _rebuild(terms: dict[str, Term], formulas: dict[str, Formula], descriptions: dict[str, str]) -> Presets:
    return Presets(MappingProxyType(terms), MappingProxyType(formulas), MappingProxyType(descriptions))


@dataclass(frozen=True)
class _File:
    """One file: what it says, and on which line it says it (1-based, by path of keys)."""

    path: Path
    spec: PresetSpec
    lines: Mapping[tuple[str, ...], int]

    @classmethod
    def read(cls, path: Path) -> _File:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PresetError(f"{path}: cannot be read: {error}") from None
        lines: dict[tuple[str, ...], int] = {}
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            if root is not None:
                _note_lines(path, root, (), lines)
            value = yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise PresetError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise PresetError(f"{path}:1: not valid YAML: {error}") from None
        except RecursionError:
            raise PresetError(f"{path}:1: nested too deep") from None
        try:
            return cls(path, PresetSpec.model_validate({} if value is None else value), lines)
        except ValidationError as error:
            keys = tuple(PresetSpec.model_fields)
            where = tuple(str(part) for part in error.errors()[0]["loc"] if part != "[key]")
            raise PresetError(f"{path}:{_line(lines, where)}: {sentence(error, 'a preset', keys)}") from None

    def name(self) -> str:
        """The preset's name; an identifier, because formulas can use it like a term's."""
        try:
            return check_term_name(self.spec.name if self.spec.name is not None else self.path.stem)
        except FormulaError as error:
            raise self.error(error.message.replace("a term", "a preset"), "name") from None

    def terms(self) -> Iterator[tuple[str, Term]]:
        for name, value in self.spec.terms.items():
            try:
                yield check_term_name(name), term_from_json(name, {} if value is None else value, TRUSTED)
            except FormulaError as error:
                raise self.error(error.message, "terms", name) from None

    def formula(self, shared: Presets) -> Formula:
        assert self.spec.formula is not None
        try:
            return resolve_formula(self.spec.formula, {}, shared, self.spec.normalize, TRUSTED)
        except FormulaError as error:
            raise self.error(str(error), "formula") from None

    def description(self) -> str:
        said = " ".join(self.spec.description.split())
        return f"{said} ({self.spec.paper})" if said and self.spec.paper else said or self.spec.paper

    def error(self, reason: str, *where: str) -> PresetError:
        return PresetError(f"{self.path}:{_line(self.lines, where)}: {reason}")


def _yaml_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise PresetError(f"{path}: no such file or directory")
    return sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())


def _shared_terms(files: list[_File]) -> dict[str, Term]:
    terms: dict[str, Term] = {}
    first_with: dict[str, _File] = {}
    for file in files:
        for name, term in file.terms():
            if terms.setdefault(name, term) != term:
                raise file.error(
                    f"the term '{name}' is defined differently in {first_with[name].path}; "
                    "the terms of all files share one name space",
                    "terms",
                    name,
                )
            first_with.setdefault(name, file)
    return terms


def _note_lines(
    path: Path, node: yaml.Node, where: tuple[str, ...], lines: dict[tuple[str, ...], int]
) -> None:
    """Lines of the keys of a mapping and of the mappings in it; refuses keys that appear twice."""
    lines.setdefault(where, node.start_mark.line + 1)
    if not isinstance(node, yaml.MappingNode) or len(where) > 2:
        return
    for key, value in node.value:
        inside = (*where, str(key.value))
        line = key.start_mark.line + 1
        if inside in lines:
            raise PresetError(
                f"{path}:{line}: the key '{key.value}' appears twice (first on line {lines[inside]})"
            )
        lines[inside] = line
        _note_lines(path, value, inside, lines)


def _line(lines: Mapping[tuple[str, ...], int], where: tuple[str, ...]) -> int:
    """The line of a path of keys, or of the nearest mapping around it that is in the file."""
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)

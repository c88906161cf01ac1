"""Named formulas and terms from YAML files: what a server offers under a name.

    name: preadd                       # default: the file's name without .yaml
    description: PreAdd, ...           # one or a few sentences
    paper: arXiv 2307.03214
    terms:                             # name -> the fields of a Term
      toxic:
        prompt: "The following text is ...\\n{input}"
    parameters:                        # numbers that the formula names, and that a request may change
      strength: 0.6
    formula: base - strength*toxic     # optional: a file may only define terms
    normalize: sum                     # default
    speculative: auto                  # or off, or a number of tokens; default: as the server does

The terms of all files share one name space, so that a formula in one file, or in a request, can use those of
another.  A folder is read without the folders in it: what needs more than the base model, such as experts or
classifiers, stands in folders of its own, which a server that has them names in addition.  Everything is
checked when the files are read; a server with a mistake in them does not start.
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
from vllm_marith.language.request import check_parameters, resolve_formula, term_from_json
from vllm_marith.language.speculative import Speculative, check_speculative
from vllm_marith.language.validation import sentence, shown

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
    parameters: dict[str, Any] = Field(default_factory=dict)
    formula: str | None = None
    normalize: Literal["sum", "none"] = "sum"
    speculative: Any = None


@dataclass(frozen=True)
class Preset:
    """A named formula.

    Attributes:
        name: what requests call it.
        formula: with the parameters' default values.
        text: the formula as written, in which the parameters are names.
        parameters: name -> default value.
        description: what it does, in a sentence or a few.
        paper: where it comes from.
        speculative: what requests for the preset get that do not say it themselves.
    """

    name: str
    formula: Formula
    text: str
    parameters: Mapping[str, float]
    description: str = ""
    paper: str = ""
    speculative: Speculative | None = None


@dataclass(frozen=True)
class Presets:
    """The terms and formulas that preset files define, by name.

    Attributes:
        terms: of all files together.
        presets: of the files that have a formula.
    """

    terms: Mapping[str, Term]
    presets: Mapping[str, Preset]

    @property
    def formulas(self) -> Mapping[str, Formula]:
        """Name -> formula with the parameters' default values."""
        return {name: preset.formula for name, preset in self.presets.items()}

    def formula(self, name: str, parameters: Mapping[str, float]) -> Formula:
        """The formula of the preset `name` with some of its parameters changed.

        Raises:
            KeyError: no such preset.
            FormulaError: a parameter it does not have, or values that leave no distribution.
        """
        preset = self.presets[name]
        unknown = [parameter for parameter in parameters if parameter not in preset.parameters]
        if unknown:
            known = ", ".join(preset.parameters) or "none"
            raise FormulaError(
                f"the preset '{name}' has no parameter '{shown(unknown[0])}'; its parameters are: {known}"
            )
        if not parameters:
            return preset.formula
        values = {**preset.parameters, **parameters}
        normalize = preset.formula.normalize
        return resolve_formula(preset.text, {}, Presets(self.terms, {}), normalize, TRUSTED, values)

    @classmethod
    def load(cls, *paths: str | Path) -> Presets:
        """Read directories of .yaml files (not their subdirectories), and single files, as one name space.

        A file that is named twice, say by itself and by its directory, is read once.

        Raises:
            PresetError: naming the file, the line and the reason.
        """
        found = {file.resolve(): file for path in paths for file in _yaml_files(Path(path))}
        files = [_File.read(file) for file in found.values()]
        terms = _shared_terms(files)
        presets: dict[str, Preset] = {}
        first_with: dict[str, _File] = {}
        only_terms = cls(terms, {})
        for file in files:
            if file.spec.formula is None:
                continue
            name = file.name()
            if name in first_with:
                raise file.error(f"the preset '{name}' is also defined in {first_with[name].path}", "name")
            if name in terms or name == BASE:
                raise file.error(f"the preset '{name}' has the name of a term", "name")
            first_with[name] = file
            presets[name] = file.preset(name, only_terms)
        return cls(MappingProxyType(terms), MappingProxyType(presets))

    @classmethod
    def empty(cls) -> Presets:
        """No presets: requests have their own terms and `base`."""
        return cls(MappingProxyType({}), MappingProxyType({}))

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only views do not pickle, and the server ships its presets between processes.
        return _rebuild, (dict(self.terms), dict(self.presets))


def _rebuild(terms: dict[str, Term], presets: dict[str, Preset]) -> Presets:
    return Presets(MappingProxyType(terms), MappingProxyType(presets))


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

    def parameters(self) -> dict[str, float]:
        try:
            return check_parameters(self.spec.parameters)
        except FormulaError as error:
            raise self.error(error.message, "parameters") from None

    def preset(self, name: str, shared: Presets) -> Preset:
        text, values = self.spec.formula, self.parameters()
        assert text is not None
        taken = [parameter for parameter in values if parameter in shared.terms or parameter == BASE]
        if taken:
            raise self.error(f"the parameter '{taken[0]}' has the name of a term", "parameters", taken[0])
        try:
            formula = resolve_formula(text, {}, shared, self.spec.normalize, TRUSTED, values)
        except FormulaError as error:
            raise self.error(str(error), "formula") from None
        try:
            asked = self.spec.speculative
            speculative = None if asked is None else check_speculative(asked)
        except FormulaError as error:
            raise self.error(error.message, "speculative") from None
        description = " ".join(self.spec.description.split())
        return Preset(name, formula, text, values, description, self.spec.paper, speculative)

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

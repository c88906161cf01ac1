"""A file of the reference implementation -> a preset."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from vllm_marith.importing.saved import Saved, SavedFormulaError, read_file
from vllm_marith.importing.terms import NGRAMS, Source, name_terms
from vllm_marith.importing.translation import Translation
from vllm_marith.language.algebra import distributions, simplify, weight_bounds
from vllm_marith.language.checks import SMALLEST_N
from vllm_marith.language.expression import Formula
from vllm_marith.language.names import BASE, FUNCTIONS, UNIFORM, Normalize
from vllm_marith.language.nodes import Node, rename
from vllm_marith.language.validation import shown

_PAPER: Final = "arXiv 2311.14479"
_WIDTH: Final = 110


@dataclass(frozen=True)
class Imported:
    """A formula from the reference implementation.

    Attributes:
        formula: checked; its terms have names of their own.
        notes: what it needs of a server, and what is different here; sentences for a reader.
    """

    formula: Formula
    notes: tuple[str, ...]

    def to_yaml(self, name: str) -> str:
        """The text of a preset file; `preset_name` makes a name of any text."""
        terms = {key: term.to_dict() for key, term in self.formula.terms.items() if key != BASE}
        preset: dict[str, Any] = {"name": name}
        preset["description"] = "A formula saved by the paper's reference implementation."
        preset["paper"] = _PAPER
        if terms:
            preset["terms"] = terms
        preset["formula"] = str(self.formula)
        if self.formula.normalize != "sum":
            preset["normalize"] = self.formula.normalize
        lines = [line for note in self.notes for line in textwrap.wrap(note, _WIDTH)]
        body = yaml.dump(preset, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)
        return "".join(f"# {line}\n" for line in lines) + body


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as one line with escapes, as our own files have them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # The other styles fold line breaks, of which YAML has more than one.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def preset_name(text: str) -> str:
    """An identifier made of any text, for a preset: `my formula.json` -> my_formula_json."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[:48] or "imported"
    return f"f_{name}" if name[0].isdigit() or name in {*FUNCTIONS, UNIFORM, BASE} else name


def read_saved(text: str, *, base: str | None = None, name: str = "") -> Imported:
    """The formula of a file that the reference implementation wrote.

    Args:
        text: the file.
        base: the file's name of the model that the server serves; by default the file's default model, or
            the model of the formula's leader.
        name: of the preset to be made; no term is called so.

    Raises:
        SavedFormulaError: naming the place in the file and the reason.
    """
    try:
        return _read(text, base, name)
    except RecursionError:  # MAX_DEPTH is far from Python's limit, unless the caller is near it
        raise SavedFormulaError("$: nested too deep") from None


def _read(text: str, base: str | None, name: str) -> Imported:
    whole, default = read_file(text)
    translation = Translation(whole)
    models = {source.model for source in translation.sources.values() if not source.is_classifier}
    if base is not None and base not in models | {default}:
        known = ", ".join(sorted(shown(model) for model in models if model)) or "none"
        raise SavedFormulaError(f"$: no model is called '{shown(base)}'; the models of the file are: {known}")
    normalize = _normalize(whole, translation.root)
    if base is None:
        base = default or whole.build(lambda: _model_of_leader(translation.root, translation.sources))
    named = name_terms(translation.sources, base, {name})
    root = rename(translation.root, dict(named.names))
    notes = [
        "Imported from a file of eth-sri/language-model-arithmetic. The prompts are its templates as saved: "
        "what a template computed from the input, beyond placing it, was lost when the file was written.",
        *named.notes,
        *translation.notes,
    ]
    if normalize == "none":
        notes.append("The weights sum to 0, where the reference takes softmax(E) as it is: normalize none.")
    formula = whole.build(lambda: Formula(root, named.terms, normalize).check())
    return Imported(formula, tuple(notes))


def _normalize(whole: Saved, root: Node) -> Normalize:
    """The reference does not divide where N is 0; normalize "none" does not divide anywhere."""
    simple = simplify(root)
    if max(map(abs, weight_bounds(simple, "sum"))) >= SMALLEST_N:
        return "sum"
    if any(weight_bounds(inner, "sum") != (1.0, 1.0) for inner in distributions(simple)):
        raise whole.refusal(
            "the weights of the formula sum to 0 and those of a part, which is normalised on its own, do not "
            "sum to 1: the reference divides by the one sum and not by the other"
        )
    return "none"


def _model_of_leader(root: Node, sources: Mapping[str, Source]) -> str | None:
    for name in Formula(root, {key: source.term for key, source in sources.items()}).terms:
        if sources[name] != NGRAMS and not sources[name].is_classifier:
            return sources[name].model
    return None

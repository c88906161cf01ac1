"""Writes docs/presets.md: a table of every preset under configs/presets, from the files themselves.

    python scripts/document_presets.py

A test compares the page with what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_marith.language import Preset, Presets
from vllm_marith.language.text import format_number

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "presets"
PAGE = ROOT / "docs" / "presets.md"
FOLDERS = {
    "": (
        "On the base model alone",
        "The terms differ in what they are prompted with; any server can have these.",
    ),
    "experts": (
        "With other models",
        "The terms `draft`, `expert` and `anti` are constituent models of the server, by the names of the "
        "small embedded ones (`marith models`); `configs/presets/experts/terms.yaml` is where to put others.",
    ),
    "classifiers": (
        "With a classifier",
        "`judge` is a classifier of the server, by the name of the small embedded one; "
        "`configs/presets/classifiers/terms.yaml` is where to put another, and the classes that it has.",
    ),
}
OPENING = """\
# Named methods

<!-- Written by scripts/document_presets.py from configs/presets. -->

A preset is a formula that a server offers under a name, with a request's own terms beside it or without:

    {"marith": "cfg"}
    {"marith": "{\\"formula\\": \\"cfg\\", \\"parameters\\": {\\"guidance\\": 3}}"}
    {"marith": "0.5*preadd + 0.5*formal"}

`parameters` are numbers that a request may change; the tables have their defaults. What needs more than the
base model has a folder of its own, which an operator names in addition:

    --additional-config '{"marith": {"presets": ["configs/presets", "configs/presets/experts"]}}'

The terms of all folders share one name space, and so do the presets. The numbers of every preset are tested
against a plain computation of its paper's formula, at the defaults and at other values
(`tests/language/test_preset_methods.py`).

## Formulas of the reference implementation

    marith import formula.json --output formula.yaml

makes a preset of a file that the paper's reference implementation wrote (`save`, or `save_pretrained`).
Prompts become `prompt` templates, as the file has them; a model other than the one served (`--base` says
which) becomes a constituent by the last part of its name, and comments in the YAML say what the server must
provide. Refused, with the place in the file: what has no counterpart with the same values (`Abs`,
`Functional`, `HardConstraint`, an `Autocomplete` that does more than draft, and operators whose weight the
reference takes from elsewhere). Where an `Autocomplete` drafts, n-grams do. Nothing in a file is executed.
"""


def page() -> str:
    """The text of docs/presets.md."""
    presets = Presets.load(*(FOLDER / name for name in FOLDERS))
    sections = [OPENING]
    for name, (title, explanation) in FOLDERS.items():
        files = {file.stem for file in (FOLDER / name).glob("*.yaml")}
        rows = [row for preset in presets.presets.values() if preset.name in files for row in _row(preset)]
        table = [
            "| preset | what it does | formula | parameters | paper | needs |",
            "|---|---|---|---|---|---|",
        ]
        sections.append("\n".join([f"## {title}", "", explanation, "", *table, *rows, ""]))
    return "\n".join(sections)


def _row(preset: Preset) -> Iterator[str]:
    parameters = ", ".join(f"{key} {format_number(value)}" for key, value in preset.parameters.items())
    needs = dict.fromkeys(
        f"{field} `{getattr(term, field)}`" for term in preset.formula.terms.values() for field in term.needs
    )
    formula = f"`{preset.text}`" + (", normalize: none" if preset.formula.normalize == "none" else "")
    cells = [
        f"`{preset.name}`", preset.description, formula, parameters or "-", preset.paper,
        ", ".join(needs).replace("speculative_factor", "speculative factor") or "-",
    ]  # fmt: skip
    yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Formulas of the paper's public reference implementation (eth-sri/language-model-arithmetic) as presets.

    imported = read_saved(Path("formula.json").read_text())
    Path("formula.yaml").write_text(imported.to_yaml("formula"))

Reads what its `save` writes (a formula) and its `save_pretrained` (a formula and a default model).  The file
is data from a stranger: it is bounded, nothing in it is executed or unpickled, and what cannot be translated
with the same meaning is refused with its place in the file.

    saved.py        JSON -> saved objects, with their paths
    translation.py  saved objects -> a formula's tree
    terms.py        the models and classifiers of the file -> terms with names
    preset.py       formula and terms -> YAML
"""

from vllm_marith.importing.preset import Imported, preset_name, read_saved
from vllm_marith.importing.saved import SavedFormulaError

__all__ = ["Imported", "SavedFormulaError", "preset_name", "read_saved"]

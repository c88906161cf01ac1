"""docs/presets.md says what configs/presets has."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location(
        "document_presets", ROOT / "scripts" / "document_presets.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/document_presets.py"
    folders = {folder.name for folder in script.FOLDER.iterdir() if folder.is_dir()}
    assert folders == set(script.FOLDERS) - {""}

"""Preset files on their way to machines that do not have them.

They travel as text, ``{file name: contents}``, in the deployment's `user_config`, which Serve hands to every
replica when it starts and again, without a restart, when it changes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_marith.language import PresetError, Presets

SUFFIXES = (".yaml", ".yml")


def read(paths: Sequence[Path]) -> dict[str, str]:
    """The contents of preset files and folders, as `Presets.load` reads them.

    Files of the same name in different folders are told apart by a number; that is safe, since such files
    define no preset under their file's name (two presets of one name are refused).

    Raises:
        PresetError: a file is wrong; the sentence names file, line and reason.
    """
    Presets.load(*paths)
    files = [
        file
        for path in paths
        for file in (sorted(path.iterdir()) if path.is_dir() else [path])
        if file.is_file() and (path.is_file() or file.suffix in SUFFIXES)
    ]
    found: dict[str, str] = {}
    for file in {file.resolve(): file for file in files}.values():
        name = file.name
        while name in found:
            name = f"{len(found)}-{file.name}"
        found[name] = file.read_text(encoding="utf-8")
    return found


class PresetFolder:
    """A folder of this machine that holds what has travelled."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="marith-presets-"))

    def write(self, contents: Mapping[str, str]) -> None:
        """Exchanges the files, or leaves them as they are.

        Raises:
            PresetError: a file is wrong; the sentence names file, line and reason.
            ValueError: a name that is no plain file name.
        """
        for name in contents:
            if Path(name).name != name or Path(name).suffix not in SUFFIXES:
                raise ValueError(
                    f"'{name}' is not the name of a preset file: it ends in .yaml and has no folder"
                )
        with tempfile.TemporaryDirectory(prefix="marith-presets-") as new:
            _fill(Path(new), contents)
            try:
                Presets.load(new)
            except PresetError as error:
                raise PresetError(str(error).replace(f"{new}/", "")) from None
        for file in self.path.iterdir():
            file.unlink()
        _fill(self.path, contents)

    def contents(self) -> dict[str, str]:
        """What is in it."""
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(self.path.iterdir())}

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _fill(folder: Path, contents: Mapping[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")

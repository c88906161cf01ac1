"""Where made models are kept, and the one door to them: `ensure`.

An artefact is a folder under the home (`~/.cache/vllm-marith`, or MARITH_HOME).  It is made in a temporary
folder and renamed when complete, with a manifest that carries its recipe's fingerprint.  So a home never
holds half an artefact, an interrupted run goes on where it stopped, and a changed recipe remakes what it
touches.  When all is there only the manifests are read; torch is imported only to make something.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .progress import Progress, duration
from .recipe import ARTEFACTS, NEEDS, RECIPE, Recipe

if TYPE_CHECKING:
    from .workshop import Workshop

MANIFEST = "manifest.json"
UNFINISHED = ".making-"


class ModelsError(Exception):
    """The models cannot be made or named; the message says what to do."""


@dataclass(frozen=True)
class Paths:
    """The folders of the artefacts.  `ensure` says which of them exist."""

    home: Path
    corpus: Path
    tokenizer: Path
    big: Path
    judge: Path
    referee: Path
    draft: Path
    expert: Path
    anti: Path
    lora_legal: Path
    judge_bert: Path
    files: Path
    network: Path
    report: Path
    """A JSON file: what each artefact measured on held-out text, and how long it took."""

    @classmethod
    def under(cls, home: Path) -> Paths:
        """The paths of a home."""
        return cls(home=home, report=home / "report.json", **{name: home / name for name in ARTEFACTS})


def default_home() -> Path:
    """MARITH_HOME, or `~/.cache/vllm-marith`."""
    named = os.environ.get("MARITH_HOME")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "vllm-marith"


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest in an artefact's folder; empty where there is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_made(name: str, home: Path, recipe: Recipe = RECIPE) -> bool:
    """Whether the artefact `name` is there as `recipe` makes it."""
    return manifest(home / name).get("recipe") == recipe.fingerprint(name)


def ensure(
    home: Path | str | None = None,
    *,
    only: Iterable[str] | None = None,
    progress: bool = True,
    force: bool = False,
    recipe: Recipe = RECIPE,
) -> Paths:
    """Make what is missing of the embedded models and return where they are.

    home: the folder to keep them in; by default `default_home()`.
    only: the artefacts wanted (see `recipe.ARTEFACTS`; what they are made from comes along); by default all.
    progress: whether to show on stderr what is being made.
    force: make the wanted artefacts again even if they are there (not what they are made from).

    The same recipe on the same machine and installation makes the same weights.  Only one process makes
    models in a home at a time; others wait for it.  Raises `ModelsError`.
    """
    paths = Paths.under(Path(home).expanduser().resolve() if home else default_home().resolve())
    named = list(ARTEFACTS) if only is None else list(only)
    wanted = _with_needs(named)
    if not force and all(is_made(name, paths.home, recipe) for name in wanted):
        return paths
    # By default threads spin while they wait for each other, and where anything else runs they spin away
    # the time that the others need: 8 s a step instead of 1.5 s was seen.  Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from .workshop import Workshop
    except ImportError as error:
        raise ModelsError(
            f"making the models needs the package {error.name!r}; pip install 'vllm-marith[cpu]' brings it"
        ) from error
    try:
        paths.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelsError(f"cannot create {paths.home}: {error.strerror}; MARITH_HOME moves it") from error
    with _only_process(paths.home, progress):
        again = set(named) if force else set()
        missing = [name for name in wanted if name in again or not is_made(name, paths.home, recipe)]
        if missing:
            _make(Workshop(paths, recipe), missing, progress)
    return paths


@contextmanager
def _only_process(home: Path, shown: bool) -> Iterator[None]:
    """Wait until no other process makes models in `home`, and keep others waiting meanwhile."""
    from filelock import FileLock, Timeout

    lock = FileLock(home / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with Progress([], shown=shown) as bar:
            bar.say(f"Another process is making models in {home}; waiting for it.")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _with_needs(names: Iterable[str]) -> list[str]:
    """`names` and what they are made from, in the order of making."""
    wanted: set[str] = set()
    for name in names:
        if name not in NEEDS:
            raise ModelsError(f"there is no artefact {name!r}; there are {', '.join(ARTEFACTS)}")
        wanted |= {name, *_with_needs(NEEDS[name])}
    return [name for name in ARTEFACTS if name in wanted]


def _make(workshop: Workshop, names: list[str], shown: bool) -> None:
    """Make artefacts one after the other and bring the report up to date after each."""
    home = workshop.paths.home
    for leftover in home.glob(f"{UNFINISHED}*"):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with Progress(names, shown=shown) as bar:
        expected = duration(sum(bar.expected.values()))
        bar.say(f"Making {', '.join(names)} in {home}")
        bar.say(f"from text on this machine, once; about {expected} on two quiet cores.")
        for name in names:
            started = time.monotonic()
            folder = home / f"{UNFINISHED}{name}"
            folder.mkdir()
            measured = workshop.make(name, folder, partial(bar.step, name))
            seconds = time.monotonic() - started
            _write_json(
                folder / MANIFEST,
                {
                    "recipe": workshop.recipe.fingerprint(name),
                    "seed": workshop.recipe.seed,
                    "seconds": round(seconds, 1),
                    "held_out": measured,
                },
            )
            _put_in_place(folder, home / name)
            _write_json(workshop.paths.report, {made: manifest(home / made) for made in ARTEFACTS})
            bar.finished(name, seconds, summary(measured))


def _put_in_place(folder: Path, place: Path) -> None:
    """Rename `folder` to `place`.  What is there is moved away first: it cannot be replaced."""
    old = place.with_name(f"{UNFINISHED}old-{place.name}")
    if place.exists():
        place.rename(old)
    folder.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Any) -> None:
    """Write atomically: readers see the old file or the new one."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.replace(path)


def summary(measured: dict[str, Any]) -> str:
    """What an artefact measured, in one line."""
    lines = []
    for quantity, value in measured.items():
        if isinstance(value, dict) and not any(isinstance(v, dict) for v in value.values()):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
            lines.append(f"{quantity.replace('_', ' ')}: {value}")
    return "; ".join(lines)

#!/usr/bin/env python
"""Proves from vLLM's source that everything in the ledger is there: `python scripts/check_vllm.py WHEEL`.

The ledger (vllm_marith/engine/ledger/) lists every vLLM symbol that this plugin replaces or relies on.
For each of them the source of the given vLLM must define it with the parameters and attributes we rely on,
and call what it is said to call in that order.  Nothing is imported or run, so a release can be checked
that does not install here.

Exit code: 0 all entries hold, 1 some do not, 2 there is no vLLM at the given place.
"""

from __future__ import annotations

import argparse
import ast
import sys
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

from vllm_marith.engine.patches import LEDGER, Entry

Function = ast.FunctionDef | ast.AsyncFunctionDef


class NoVllmError(Exception):
    """The sentence says what was found instead."""


class Found(NamedTuple):
    """A definition and the module that it stands in."""

    node: ast.AST
    module: str


class Source:
    """Modules of one vLLM, parsed when they are asked for."""

    def __init__(self, place: str) -> None:
        """place: a wheel, a directory with a package `vllm` in it, or ``installed``.

        Raises:
            NoVllmError: there is none.
        """
        if place == "installed":
            spec = find_spec("vllm")
            if spec is None or not spec.submodule_search_locations:
                raise NoVllmError("vLLM is not installed in this environment")
            place = str(Path(spec.submodule_search_locations[0]).parent)
        path = Path(place)
        if not path.exists():
            raise NoVllmError(f"{place} does not exist")
        try:
            self.root = path if path.is_dir() else zipfile.Path(path)
        except zipfile.BadZipFile:
            raise NoVllmError(f"{place} is neither a wheel nor a directory") from None
        self._modules: dict[str, ast.Module | None] = {}
        if self.module("vllm") is None:
            raise NoVllmError(f"{place} has no package vllm in it")

    def version(self) -> str:
        for node in ast.walk(self.module("vllm._version") or ast.Module([], [])):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if "__version__" in names or "version" in names:
                    return str(node.value.value)
        return "unknown"

    def module(self, name: str) -> ast.Module | None:
        """The module's syntax tree, None if it is not there."""
        if name not in self._modules:
            base = "/".join(name.split("."))
            self._modules[name] = None
            for file in (f"{base}.py", f"{base}/__init__.py"):
                path = self.root.joinpath(file)
                if path.is_file():
                    self._modules[name] = ast.parse(path.read_text(encoding="utf-8"))
                    break
        return self._modules[name]

    def find(self, target: str) -> Found | None:
        """The definition of a ledger target ``module:qualified.name``."""
        module, _, qualname = target.partition(":")
        first, *rest = qualname.split(".")
        found = self._global(module, first)
        for name in rest:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return None
            found = self._member(found, name)
        return found

    def parameters(self, found: Found) -> list[str]:
        """What a call of the definition accepts by name, as `inspect.signature` would say."""
        if isinstance(found.node, Function):
            arguments = found.node.args
            return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if not isinstance(found.node, ast.ClassDef):
            return []
        made_by = self._member(found, "__init__")
        if made_by is not None:
            return self.parameters(made_by)[1:]
        fields = [name for base in self._bases(found) for name in self.parameters(base)]
        for node in found.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields.append(node.target.id)
        return fields

    def attributes(self, found: Found) -> set[str]:
        """What a class's body defines and its methods use on ``self``, its bases included."""
        assert isinstance(found.node, ast.ClassDef)
        names = set().union(*(self.attributes(base) for base in self._bases(found)))
        for stated in _statements(found.node.body):
            targets = stated.targets if isinstance(stated, ast.Assign) else [getattr(stated, "target", None)]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        for node in ast.walk(found.node):
            if isinstance(node, Function):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self":
                names.add(node.attr)
        return names

    def _global(self, module: str, name: str) -> Found | None:
        """Follows imports and aliases within vLLM."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in reversed(list(_statements(tree.body))):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Found(node, module)
            if isinstance(node, ast.Assign) and name in [getattr(t, "id", None) for t in node.targets]:
                if isinstance(node.value, ast.Name) and node.value.id != name:
                    return self._global(module, node.value.id)
                return Found(node.value, module)
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._global(self._absolute(module, node), alias.name)
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.root.joinpath("/".join(module.split(".")), "__init__.py").is_file()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _member(self, owner: Found, name: str) -> Found | None:
        assert isinstance(owner.node, ast.ClassDef)
        for node in reversed(list(_statements(owner.node.body))):
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return Found(node, owner.module)
        for base in self._bases(owner):
            found = self._member(base, name)
            if found is not None:
                return found
        return None

    def _bases(self, owner: Found) -> Iterator[Found]:
        assert isinstance(owner.node, ast.ClassDef)
        for base in owner.node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            found = self._global(owner.module, name.id) if isinstance(name, ast.Name) else None
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield found


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module's or a class's own level, those under conditions included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for block in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _calls(node: ast.AST) -> list[str]:
    """Names of what is called, in the order of the source."""
    calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    return [getattr(call.func, "attr", getattr(call.func, "id", "")) for call in calls]


def objection(source: Source, entry: Entry) -> str:
    """What is wrong with the entry in this vLLM; empty if it holds."""
    found = source.find(entry.target)
    if found is None:
        return "is not there"
    if entry.parameters:
        wrong = entry.objection(source.parameters(found))
        if wrong:
            return wrong
    unknown = [name for name in entry.attributes if name not in source.attributes(found)]
    if unknown:
        return f"has no {', '.join(unknown)}"
    called = _calls(found.node)
    at = -1
    for name in entry.calls:
        if name not in called[at + 1 :]:
            return f"does not call {' > '.join(entry.calls)}"
        at = called.index(name, at + 1)
    return ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "vllm",
        nargs="+",
        metavar="WHEEL_OR_INSTALLED",
        help="a wheel, a directory with the package in it, or the word `installed`; several are compared",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args(arguments)
    try:
        sources = [Source(place) for place in options.vllm]
    except NoVllmError as error:
        _fail(f"check_vllm: {error}")
    versions = [source.version() for source in sources]
    results = [[objection(source, entry) for source in sources] for entry in LEDGER]

    rows = [["symbol", "how", *versions]]
    for entry, result in zip(LEDGER, results, strict=True):
        rows.append([entry.target, entry.how, *(wrong or "holds" for wrong in result)])
    _print(rows, options.markdown)
    print()
    failures = 0
    for i, version in enumerate(versions):
        wrong = sum(bool(result[i]) for result in results)
        failures += wrong
        verdict = (
            f"{wrong} of {len(LEDGER)} entries do not hold" if wrong else f"all {len(LEDGER)} entries hold"
        )
        print(f"vLLM {version}: {verdict}")
    return 1 if failures else 0


def _print(rows: list[list[str]], markdown: bool) -> None:
    if markdown:
        lines = [[f"`{row[0]}`" if row is not rows[0] else row[0], *row[1:]] for row in rows]
        lines.insert(1, ["---"] * len(rows[0]))
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _fail(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())

"""What the project is made of and reaches for: pinned packages, no code from data, no network of its own."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("requirements/*.txt"))
SOURCES = sorted([*ROOT.glob("vllm_marith/**/*.py"), *ROOT.glob("kernels/marith_kernels/**/*.py")])

# Importing these would let data become code, or the package speak to other machines.
FORBIDDEN = {
    *("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"),
    *("socket", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "websockets"),
    *("huggingface_hub", "openai", "subprocess", "ctypes"),
}
# (file, module) -> why all the same.
ALLOWED = {
    ("vllm_marith/chat.py", "urllib"): "a client of the server that its user names",
    ("vllm_marith/cli.py", "subprocess"): "`marith bench` runs a script of the repository",
    ("vllm_marith/distributed/deploy.py", "urllib"): "splits the address of the cluster that its user names",
    ("vllm_marith/distributed/everywhere.py", "httpx"): "asks the application of its own process, no socket",
    (
        "vllm_marith/engine/classifiers.py",
        "huggingface_hub",
    ): "whether a classifier has safetensors, at the start",
    ("kernels/marith_kernels/openmp.py", "ctypes"): "torch's own OpenMP runtime",
}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_pin_everything_once(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    names = []
    for line in lines:
        found = re.fullmatch(r"([A-Za-z0-9_.-]+)==[A-Za-z0-9_.+!-]+", line)
        assert found, f"not pinned: {line}"
        names.append(_normal(found.group(1)))
    assert len(names) == len(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    wanted += project["optional-dependencies"]["test"]
    lacking = {_normal(re.match(r"[\w.-]+", name).group()) for name in wanted} - set(names)
    assert not lacking


def _found(path: Path) -> tuple[set[str], list[str]]:
    """(forbidden modules that a file imports, calls in it that make code of text or trust a model's)."""
    modules, calls = set(), []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "__import__", "torch.load", "yaml.load", "os.system"):
                calls.append(name)
            calls += [
                "trust_remote_code"
                for keyword in node.keywords
                if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "True"
            ]
    return modules & FORBIDDEN, calls


def test_no_code_from_data_and_no_network() -> None:
    used = set()
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        modules, calls = _found(path)
        assert not calls, f"{name} calls {calls}"
        used |= {(name, module) for module in modules}
    assert used <= ALLOWED.keys(), used - ALLOWED.keys()
    assert used == ALLOWED.keys(), "an exception that nobody needs"


def test_the_check_finds_what_it_looks_for(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    import pickle\n    eval('1')\nload(trust_remote_code=True)\n")
    modules, calls = _found(file)
    assert modules == {"pickle"}
    assert sorted(calls) == ["eval", "trust_remote_code"]

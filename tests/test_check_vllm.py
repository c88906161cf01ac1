"""scripts/check_vllm.py says of a vLLM's source what Python would say of the imported package."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from vllm_marith.engine import patches
from vllm_marith.engine.patches import LEDGER, Entry

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_vllm.py"
FILES = {
    "vllm/__init__.py": "",
    "vllm/_version.py": "TYPE_CHECKING = False\n__version__ = version = '0.99.1'\n",
    "vllm/base.py": """
from dataclasses import dataclass
class Base:
    here: int = 0
    def __init__(self, config, *, extra=None):
        self.set_in_base = config
    def inherited(self, a): self.used.append(a)
class Named(Base):
    def own(self, a, b=1, *rest, c, **more): ...
    async def waits(self, a): ...
    if True:
        def conditional(self, x): ...
@dataclass
class Batch:
    ids: list
    lengths: list = ()
@dataclass
class MoreBatch(Batch):
    extra: int = 0
def function(a, b): ...
alias = function
def works(model):
    first(model)
    model.second()
    self.third(first())
""",
    "vllm/package/__init__.py": "from .inner import hidden as seen\nfrom vllm.base import Named\n",
    "vllm/package/inner.py": """
from ..base import Base
try:
    import fast
except ImportError:
    def hidden(x): ...
class Derived(Base): ...
""",
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_vllm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_vllm"] = module
    spec.loader.exec_module(module)
    return module


check = load()


@pytest.fixture(params=["wheel", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "wheel":
        path = tmp_path / "vllm-0.99.1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in FILES.items():
                wheel.writestr(name, text)
        return str(path)
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(tmp_path)


def entry(target: str, *parameters: str, how: str = "reads", **more: tuple[str, ...]) -> Entry:
    return Entry(f"vllm.{target}", "", how, "", parameters, **more)


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        (entry("base:function", "a", "b"), ""),
        (entry("base:function", "a", "c", "d"), "takes no c, d"),
        (entry("base:alias", "a", "c"), "takes no c"),
        (entry("base:nothing", "a"), "is not there"),
        (entry("nowhere:function", "a"), "is not there"),
        (entry("base:function.inside", "a"), "is not there"),
        (entry("base:Named.own", "self", "a", "b", "c"), ""),
        (entry("base:Named.own", "rest", "more"), "takes no rest, more"),
        (entry("base:Named.waits", "self", "a"), ""),
        (entry("base:Named.conditional", "x"), ""),
        (entry("base:Named.inherited", "a"), ""),
        (entry("base:Named", "config", "extra"), ""),
        (entry("base:Named", "self"), "takes no self"),
        (entry("base:Batch", "ids", "lengths"), ""),
        (entry("base:MoreBatch", "ids", "extra"), ""),
        (entry("package:seen", "x"), ""),
        (entry("package:Named.own", "c"), ""),
        (entry("package.inner:Derived.inherited", "a"), ""),
        (entry("package:hidden", "x"), "is not there"),
        # An override must accept whatever the original does.
        (entry("base:function", "a", "b", how="overrides"), ""),
        (entry("base:function", "a", how="overrides"), "also takes b"),
        (entry("base:function", "a", how="overrides", newer=("b",)), ""),
        (entry("base:function", "a", how="wraps"), ""),
        (entry("base:Named", attributes=("set_in_base", "used", "here", "own", "inherited")), ""),
        (entry("base:Named", attributes=("own", "absent")), "has no absent"),
        (entry("base:works", calls=("first", "second", "third")), ""),
        (entry("base:works", calls=("first", "third")), ""),
        (entry("base:works", calls=("second", "first")), ""),
        (entry("base:works", calls=("third", "second")), "does not call third > second"),
        (entry("base:works", calls=("fourth",)), "does not call fourth"),
    ],
    ids=lambda value: value.target if isinstance(value, Entry) else value,
)
def test_objections(place: str, wanted: Entry, answer: str) -> None:
    assert check.objection(check.Source(place), wanted) == answer


def test_table_and_exit_code(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "LEDGER", (entry("base:function", "a"),))
    assert check.main([place]) == 0
    assert "vLLM 0.99.1: all 1 entries hold" in capsys.readouterr().out
    monkeypatch.setattr(check, "LEDGER", (entry("base:function", "a"), entry("base:function", "z")))
    assert check.main([place, "--markdown"]) == 1
    printed = capsys.readouterr().out
    assert "| `vllm.base:function` | reads | takes no z |" in printed
    assert "vLLM 0.99.1: 1 of 2 entries do not hold" in printed


@pytest.mark.parametrize("kind", ["absent", "text", "empty"])
def test_no_vllm_there(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / kind
    if kind == "text":
        path.write_text("no wheel")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(SystemExit) as ended:
        check.main([str(path)])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"check_vllm: {path}")
    assert message.count("\n") == 1


def test_the_installed_vllm_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["installed"]) == 0, capsys.readouterr().out


def test_source_and_import_agree() -> None:
    """The two ways of reading a signature, on everything in the ledger."""
    source = check.Source("installed")
    for found in LEDGER:
        _, _, value = patches._resolve(found.target)
        imported = list(inspect.signature(inspect.unwrap(value)).parameters.values())
        named = [p.name for p in imported if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert set(found.parameters) <= set(named)
        # Pydantic's and msgspec's own rules about what is a field are not repeated in the script.
        assert set(named) <= set(source.parameters(source.find(found.target))), found.target


@pytest.mark.parametrize("runner", ["", "v1", "v2"])
def test_the_start_up_check_agrees(runner: str) -> None:
    assert list(patches.missing(runner)) == []

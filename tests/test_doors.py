"""The doors between the rooms: which package may import which (docs/design.md).

Every import statement of the project counts, also one inside a function, unless a rule says otherwise.
"""

import ast
from pathlib import Path

import pytest

import vllm_marith

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("vllm_marith/**/*.py"), *ROOT.glob("kernels/marith_kernels/**/*.py")])

# Room -> the rooms of ours that it may import; its own is always open.  A module's room is its longest prefix
# that is listed.  Modules that are not listed (the demonstration, say) are what the command line is made of:
# only the command line and their like may import them, and they may import every room.
ALL_BUT_CLI = {"language", "plan", "engine", "kernels", "serving", "distributed", "models"}
DOORS = {
    "kernels": set(),
    "language": set(),  # and plan, inside the functions of LAZY
    "plan": {"language"},
    "engine": {"language", "plan", "kernels"},
    # The one entry point that vLLM calls: it knows every process's part, and the server's.
    "engine.plugin": {"language", "plan", "kernels", "engine", "serving", "distributed"},
    "engine.group": {"language", "plan", "kernels"},
    "engine.frontend": {"language", "plan", "kernels", "engine"},
    "engine.core": {"language", "plan", "kernels", "engine"},
    "engine.worker": {"language", "plan", "kernels", "engine"},
    "serving": ALL_BUT_CLI,
    "distributed": ALL_BUT_CLI,
    "models": ALL_BUT_CLI,
    "evaluation": ALL_BUT_CLI,  # and nothing but the command line imports it
    "cli": ALL_BUT_CLI | {"evaluation"},
    "": {"language"},  # vllm_marith/__init__.py
}
# Functions of `language` that may reach for `plan` when they are called.
LAZY = {"explain", "lower"}
# One process each: they meet in engine.group's plain data.  Only the plugin, which registers them, knows all.
PROCESSES = {"engine.frontend", "engine.core", "engine.worker"}
MAY_IMPORT_VLLM = {"engine", "serving", "distributed"}


def _module(path: Path) -> str:
    """The dotted name below vllm_marith ("kernels..." for the kernels), "" for vllm_marith/__init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("kernels", *parts[2:]) if parts[0] == "kernels" else parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(module: str) -> str:
    while module not in DOORS:
        if "." not in module:
            return module
        module = module.rpartition(".")[0]
    return module


def _imports(path: Path, tree: ast.AST | None = None) -> list[tuple[str, str | None, int]]:
    """(absolute module imported, function that imports it, line) for every import statement of a file."""
    found = []
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[1:] if package[0] == "kernels" else package

    def visit(node: ast.AST, function: str | None) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        elif isinstance(node, ast.Import):
            found.extend((alias.name, function, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Level 1 is the package of the file, which for an __init__.py is its own directory.
            base = package[: len(package) - node.level] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vllm_marith.engine import core` imports a module as well as a name.
            found.extend((f"{module}.{alias.name}", function, node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # nothing is imported when the program runs
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(tree or ast.parse(path.read_text(encoding="utf-8"), str(path)), None)
    return found


def _ours(imported: str) -> str | None:
    """The imported module as `_module` names it, None for one that is not of this project."""
    top, _, rest = imported.partition(".")
    if top == "marith_kernels":
        return "kernels"
    if rest in vllm_marith.__all__:
        return "language"  # the package's own names are the language's
    return rest if top == "vllm_marith" else None


def _violations(path: Path, tree: ast.AST | None = None) -> list[str]:
    module = _module(path)
    room = _room(module)
    top = module.partition(".")[0]
    found = []
    for imported, function, line in _imports(path, tree):
        outside = imported.partition(".")[0]
        if outside == "vllm" and top not in MAY_IMPORT_VLLM:
            found.append(f"{path.name}:{line}: {top or 'vllm_marith'} imports vllm")
        if outside == "ray" and top != "distributed":
            found.append(f"{path.name}:{line}: {top or 'vllm_marith'} imports ray")
        ours = _ours(imported)
        if ours is None:
            continue
        target = _room(ours)
        target_top = ours.partition(".")[0]
        if room == target or top == target_top == "kernels":
            continue
        if room == "language" and target_top == "plan" and function in LAZY:
            continue
        if target in PROCESSES:
            # `engine` itself is the plugin's wing; below it, no process knows another.
            allowed = room in ("engine", "engine.plugin") or (
                top != "engine" and "engine" in DOORS.get(room, ALL_BUT_CLI)
            )
        elif target_top not in DOORS:
            allowed = room == "cli" or room not in DOORS
        else:
            allowed = target_top in DOORS.get(room, ALL_BUT_CLI) or (top != "" and top == target_top)
        if not allowed:
            found.append(f"{path.name}:{line}: {room or 'vllm_marith'} imports {ours or 'vllm_marith'}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_doors_stay_shut(path):
    assert _violations(path) == []


@pytest.mark.parametrize(
    ("file", "source", "refused"),
    [
        ("vllm_marith/language/x.py", "from vllm_marith.engine.group import Group", True),
        ("vllm_marith/language/x.py", "from vllm_marith.plan import lower", True),
        ("vllm_marith/language/x.py", "def explain(f):\n    from vllm_marith.plan import lower", False),
        ("vllm_marith/language/x.py", "def other(f):\n    from vllm_marith.plan import lower", True),
        ("vllm_marith/language/x.py", "import vllm", True),
        ("vllm_marith/language/x.py", "if TYPE_CHECKING:\n    import vllm", False),
        ("vllm_marith/language/x.py", "from .nodes import Node", False),
        ("vllm_marith/language/x.py", "from ..engine import group", True),
        ("vllm_marith/language/x.py", "import vllm_marith", True),
        ("vllm_marith/plan/x.py", "from vllm_marith.language import Formula", False),
        ("vllm_marith/plan/x.py", "import marith_kernels", True),
        ("vllm_marith/engine/x.py", "import marith_kernels.program, vllm.v1", False),
        ("vllm_marith/engine/x.py", "from vllm_marith.serving import routes", True),
        ("vllm_marith/engine/plugin.py", "from vllm_marith.serving import plugin", False),
        ("vllm_marith/engine/plugin.py", "from vllm_marith.distributed import executor", False),
        ("vllm_marith/engine/plugin.py", "import ray", True),
        ("vllm_marith/engine/worker/x.py", "from vllm_marith.distributed import executor", True),
        ("vllm_marith/engine/plugin.py", "from .core import scheduler", False),
        ("vllm_marith/engine/x.py", "from vllm_marith.engine.core import scheduler", False),
        ("vllm_marith/engine/core/x.py", "from vllm_marith.engine.worker import rows", True),
        ("vllm_marith/engine/core/x.py", "from ..frontend.admission import Admission", True),
        ("vllm_marith/engine/core/x.py", "from ..group import Group", False),
        ("vllm_marith/engine/group.py", "from .core import scheduler", True),
        ("vllm_marith/engine/group.py", "from vllm_marith.plan import Plan", False),
        ("vllm_marith/engine/core/x.py", "from .scheduler import Scheduler", False),
        (
            "vllm_marith/engine/worker/x.py",
            "def later():\n    import vllm_marith.engine.core.scheduler",
            True,
        ),
        ("vllm_marith/serving/x.py", "from vllm_marith.engine import group", False),
        ("vllm_marith/serving/x.py", "from vllm_marith.cli import main", True),
        ("vllm_marith/distributed/x.py", "import ray, vllm", False),
        ("vllm_marith/serving/x.py", "import ray", True),
        (
            "vllm_marith/cli/x.py",
            "from vllm_marith.cli import demo\nfrom vllm_marith.models import train",
            False,
        ),
        ("vllm_marith/cli/x.py", "import vllm", True),
        ("vllm_marith/cli/x.py", "from vllm_marith import demo", False),
        ("vllm_marith/demo.py", "from vllm_marith import Term\nfrom vllm_marith.models import ensure", False),
        ("vllm_marith/demo.py", "from vllm_marith.cli import main", True),
        ("vllm_marith/engine/x.py", "from vllm_marith import demo", True),
        ("vllm_marith/engine/x.py", "from vllm_marith import Term", False),
        ("vllm_marith/models/x.py", "from vllm_marith.cli import main", True),
        ("vllm_marith/evaluation/x.py", "from vllm_marith.engine.offline import offline_llm", False),
        ("vllm_marith/evaluation/x.py", "import vllm", True),
        ("vllm_marith/evaluation/x.py", "from vllm_marith.demo import CASES", True),
        ("vllm_marith/cli.py", "from vllm_marith.evaluation import evaluate", False),
        ("vllm_marith/serving/x.py", "from vllm_marith.evaluation import evaluate", True),
        ("vllm_marith/demo.py", "from vllm_marith.evaluation import plots", True),
        ("vllm_marith/__init__.py", "from vllm_marith.language import Term", False),
        ("vllm_marith/__init__.py", "from vllm_marith.engine import plugin", True),
        ("kernels/marith_kernels/x.py", "from vllm_marith.plan import Plan", True),
        ("kernels/marith_kernels/x.py", "from .program import Program\nimport marith_kernels.fuse", False),
    ],
)
def test_the_test_notices(file, source, refused):
    assert bool(_violations(ROOT / file, ast.parse(source))) == refused


def test_the_rooms_exist():
    assert {_room(_module(path)) for path in SOURCES} >= {"", "language", "plan", "engine", "kernels"}

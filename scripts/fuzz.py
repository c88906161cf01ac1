"""Hostile requests by the hundred thousand; what must hold of each is in tests/support/hostile.py.

    python scripts/fuzz.py                     # 10,000 values of hypothesis's, ten mutations of each
    python scripts/fuzz.py --guided 300000     # and atheris, guided by coverage, in an environment of its own

Every value goes the way of ``vllm_xargs["marith"]`` up to the engine, or is the body of a request to the API
server's routes.  A request must be answered or refused with a sentence, in bounded time and memory, and must
not lead to anything being evaluated, imported or opened.  Prints one JSON line; exits with 1 where something
did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.errors import HypothesisWarning  # noqa: E402

from tests.support import hostile  # noqa: E402

CPU_SECONDS = 2.0
"""A request may take so long to be read; measured on the slowest of all."""

GROWTH_MIB = 256
"""Memory that the run may leave behind: what is remembered for clients is bounded."""

GUIDED_SECONDS = 900
_TOLD_EVERY = 1000  # libFuzzer ends the process by itself


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000, help="values of hypothesis's")
    parser.add_argument("--mutations", type=int, default=10, help="of each of them")
    parser.add_argument("--bodies", type=int, default=3_000, help="bodies sent to the API server's routes")
    parser.add_argument("--guided", type=int, default=0, metavar="RUNS", help="runs of atheris")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def generated(strategy: st.SearchStrategy[Any], examples: int, number: int, check: Any) -> None:
    """Calls `check` with values of a strategy; the first that fails is made small and raised."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        check(value)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)  # large values are the point
        run()


def values(record: hostile.Record, asked: argparse.Namespace) -> None:
    rng = random.Random(asked.seed)

    def check(value: Any) -> None:
        record.examine(value)
        if isinstance(value, str):
            for _ in range(asked.mutations):
                record.examine(hostile.mutated(rng, value))

    generated(hostile.values, asked.examples, asked.seed, check)


def bodies(asked: argparse.Namespace) -> Counter[str]:
    """Raw bodies to the routes around no engine -> how many were answered with which status."""
    from tests.support import api_server

    with tempfile.TemporaryDirectory() as folder:
        presets = Path(folder)
        (presets / "steer.yaml").write_text("terms: {child: {system: A child.}}\nformula: child - 0.5*base\n")
        app = api_server.make_app(presets)
        asyncio.run(api_server.start(app))
        client = api_server.client(app)
        statuses: Counter[str] = Counter()

        def check(sent: tuple[str, Any]) -> None:
            route, value = sent
            if route == "explain":
                body = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
                answer = client.post("/v1/marith/explain", content=body)
            else:
                request = {"prompt": "x", "model": "steer", "vllm_xargs": {"marith": value}}
                answer = client.post("/v1/completions", content=json.dumps(request))
            statuses[str(answer.status_code)] += 1
            if answer.status_code not in (200, 400, 422):
                raise hostile.BrokenError(f"{route}: HTTP {answer.status_code}: {answer.text[:400]}")
            if answer.status_code != 200 and not answer.json()["error"]["message"].strip():
                raise hostile.BrokenError(f"{route}: refused without a sentence")

        raw = st.tuples(st.just("explain"), st.one_of(hostile.requests, st.binary(max_size=60)))
        named = st.tuples(st.just("completions"), hostile.values)
        generated(st.one_of(raw, named), asked.bodies, asked.seed, check)
        return statuses


def guided(runs: int, number: int) -> dict[str, Any]:
    """Runs this script under atheris, in a virtual environment that is made for it and thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = ["atheris", "hypothesis", "numpy", "pydantic", "pyyaml"]
        made = subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
        )
        if made.returncode:
            return {"skipped": f"atheris cannot be installed here: {made.stderr.strip().splitlines()[-1]}"}
        line = [python, Path(__file__), "--inside", str(runs), "--seed", str(number)]
        found = subprocess.run(line, capture_output=True, text=True, cwd=folder, check=False)
        told = [line for line in found.stdout.splitlines() if line.startswith("{")]
        if found.returncode or not told:
            raise hostile.BrokenError(f"atheris: {found.stdout[-2000:]}\n{found.stderr[-4000:]}")
        coverage = re.findall(r"DONE +cov: (\d+)", found.stderr)
        return {**json.loads(told[-1]), "edges": int(coverage[-1])}


def inside(runs: int, number: int) -> None:
    """What runs in that environment; atheris ends the process itself."""
    import atheris

    record = hostile.Record()

    def one(data: bytes) -> None:
        record.examine(data.decode("utf-8", "replace"))
        if record.outcomes.total() % _TOLD_EVERY == 0:
            print(json.dumps(record.figures()), flush=True)

    atheris.instrument_all()
    corpus = Path("corpus")
    corpus.mkdir()
    for i, seed_text in enumerate(hostile.SEEDS):
        (corpus / str(i)).write_text(seed_text)
    words = Path("words")
    words.write_text("".join(f'"{word}"\n' for word in hostile.DICTIONARY))
    atheris.Setup(
        [
            sys.argv[0],
            f"-runs={runs}",
            f"-seed={number % 2**31 + 1}",
            f"-max_total_time={GUIDED_SECONDS}",
            f"-dict={words}",
            "-max_len=4096",
            "-timeout=10",
            "-rss_limit_mb=2048",
            str(corpus),
        ],
        one,
    )
    atheris.Fuzz()


def main(arguments: list[str] | None = None) -> int:
    asked = options(arguments)
    if asked.inside:
        inside(asked.inside, asked.seed)
        return 0
    record, figures = hostile.Record(), {"seed": asked.seed}
    figures["max_rss_mib_before"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    failed = None
    try:
        values(record, asked)
        figures["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        if asked.bodies:
            figures["bodies"] = bodies(asked)
        if asked.guided:
            figures["guided"] = guided(asked.guided, asked.seed)
        if record.slowest[0] > CPU_SECONDS:
            failed = f"a request took {record.slowest[0]:.1f} s"
        if figures["max_rss_mib"] - figures["max_rss_mib_before"] > GROWTH_MIB:
            failed = "memory grew"
    except Exception:
        traceback.print_exc()
        failed = "a request did what no request may do"
    print(json.dumps({"fuzz": dict(figures), **record.figures(), "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

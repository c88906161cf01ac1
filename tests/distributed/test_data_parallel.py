"""Two data-parallel engines: each formula's group lives wholly in one of them."""

from __future__ import annotations

import random
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from tests.support import completions, exactness, server, tiny, workload
from vllm_marith.plan import lower

pytestmark = pytest.mark.several
SEED = random.randrange(2**32)
LENGTH = 12


def members(job: workload.Job) -> int:
    """How many different requests a formula makes; a term of weight 0 makes none."""
    assert job.formula is not None
    return len({job.prompts[term] for term in lower(job.formula).terms})


def by_engine(url: str) -> dict[str, Counter[int]]:
    """Engine -> how many groups of how many members its scheduler was given."""
    with urllib.request.urlopen(f"{url}/metrics") as figures:
        told = figures.read().decode()
    found: dict[str, list[tuple[float, int]]] = {}
    pattern = r'^vllm_marith:group_members_bucket\{engine="(\d+)",le="([\d.]+)"\} ([\d.]+)$'
    for engine, most, number in re.findall(pattern, told, re.MULTILINE):
        found.setdefault(engine, []).append((float(most), int(float(number))))
    groups = {}
    for engine, buckets in found.items():
        sums = [0, *(number for _, number in buckets)]  # a bucket counts what the smaller ones do, too
        groups[engine] = Counter(
            {
                int(most): upper - lower
                for (most, _), lower, upper in zip(buckets, sums, sums[1:], strict=False)
            }
        )
    return groups


def test_groups_are_never_split(tmp_path: Path) -> None:
    """Mixed load, every answer that of a single process; each engine has whole groups, and both have some."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    base = tiny.make(tmp_path / "base", sharpness=4.0)
    jobs = [workload.job(rng, rng.choice([0, 1, 2, 3, 4]), "", 14) for _ in range(24)]
    formulas = [job.formula for job in jobs]
    expected = exactness.references(str(base), jobs, LENGTH)
    options = ["--data-parallel-size", "2"]
    with server.serve(base, tmp_path / "log", {}, *options) as url:
        answers = completions.ask_all(completions.client_of(url), jobs, LENGTH)
        deadline = time.monotonic() + 60  # an engine that is busy tells its figures with a later scrape
        while sum((found := by_engine(url)).values(), Counter()).total() < sum(map(bool, formulas)):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
    exactness.assert_greedy(jobs, answers, expected)
    assert sorted(found) == ["0", "1"]
    assert all(sum(groups.values()) for groups in found.values()), found
    assert sum(found.values(), Counter()) == Counter(members(job) for job in jobs if job.formula)

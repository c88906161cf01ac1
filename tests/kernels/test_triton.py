"""The Triton kernels without a GPU: what they compute, interpreted, and what the compiler makes of them.

Both need processes of their own, see `interpreted.py` and `compile_only.py`. Speed, races and the device
itself are for scripts/gpu_check.sh, on a machine that has one.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).parents[2]
SLOTS = (1, 2, 3, 4, 8, 32)
EXTENDED_SLOTS = (2, 4, 8, 32)


def child(*arguments: str, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-20_000:]
    return result.stdout


def test_interpreted():
    output = child("-m", "pytest", "-q", "tests/kernels/interpreted.py", TRITON_INTERPRET="1")
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) > 60
    assert "skipped" not in output


@pytest.fixture(scope="module", params=[90])
def compiled(request) -> dict[str, dict]:
    lines = child("tests/kernels/compile_only.py", str(request.param)).splitlines()
    reports = [json.loads(line) for line in lines if line.startswith("{")]
    return {report["kernel"]: report for report in reports}


def test_nothing_spills(compiled):
    assert len(compiled) == 2 * (1 + 4 + 2 * len(SLOTS) + 2 * len(EXTENDED_SLOTS)) + 1 + 4
    for report in compiled.values():
        assert report["spills"] == report["local"] == report["stack"] == 0, report
        assert report["registers"] <= 168, report  # 3 programs of 4 warps on a multiprocessor at least


def test_loads_are_wide(compiled):
    """A 128-bit load for every 16 bytes of a thread's share of a block, in the unmasked path."""
    for name, report in compiled.items():
        if name.startswith("linear"):
            terms = int(name.split()[1])
            share = 2048 // 128 * (4 if "fp32" in name else 2)
            assert report["wide_loads"] >= terms * share // 16, report
            assert report["wide_stores"] >= 4, report
        if name.startswith(
            ("lse", "program 1 ", "program 2 ", "extended 2 ", "statistics", "sample", "residual")
        ):
            assert report["wide_loads"] >= 2, report
    assert compiled["program 2 *bf16 odd vocabulary"]["wide_loads"] == 2


def test_every_stack_slot_is_carried_through_the_loop(compiled):
    for dtype in ("*fp32", "*bf16"):
        for slots in SLOTS:
            assert compiled[f"program {slots} {dtype}"]["carried"] == [slots, slots]
            assert compiled[f"program {slots} divide {dtype}"]["carried"] == [2 * slots, 2 * slots]
        for slots in EXTENDED_SLOTS:
            assert compiled[f"extended {slots} {dtype}"]["carried"] == [slots, slots]
            assert compiled[f"extended {slots} divide {dtype}"]["carried"] == [2 * slots, 2 * slots]


def test_the_count_shows_a_lost_slot():
    """The frontend drops a saved slot that began as another name for the top; the interpreter does not."""
    report = json.loads(child("tests/kernels/compile_only.py", "90", "--trap").splitlines()[-1])
    assert report["kernel"] == "program 3 *bf16"
    assert report["carried"] == [1, 1]


@pytest.mark.parametrize("capability", ["80", "100"])
def test_other_generations_compile(capability):
    code = f"""
import compile_only as c
for variant in c.variants():
    if "bf16" in variant.name and variant.name.startswith(("lse", "linear 4", "program 2 *")):
        report = c.report(variant.name, c.compile_variant(variant, {capability}), {capability})
        assert report["spills"] == 0 and report["wide_loads"] >= 2, report
        print("compiled", variant.name)
"""
    path = os.pathsep.join([str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH", "")])
    output = child("-c", code, PYTHONPATH=path)
    assert output.count("compiled") == 4, output

"""A formula on its way from text to a fused row, without an engine: language, plan, wire, worker, kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import marith_kernels
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from tests.language.strategies import STEP, generic_logits, is_decided, operator_formulas
from tests.support.golden import CASES, expected, logits
from vllm_marith import Formula
from vllm_marith.engine.worker.pipelines import pipeline_of
from vllm_marith.language.nodes import Schedule
from vllm_marith.plan import encode, lower

CPU_BACKENDS = ("reference", "torch", "numba")


def fused(formula: Formula, values: dict[str, np.ndarray], backend: str, **step: Any) -> np.ndarray:
    """Log-probabilities [rows, vocab], every row of the inputs a group of the batch."""
    plan = lower(formula)
    dials = tuple(
        dial.at(
            step["position"] if isinstance(dial, Schedule) else step["probabilities"][dial.classifier.name]
        )
        for dial in plan.dials
    )
    pipeline = pipeline_of(encode(plan, range(len(plan.terms))), dials)
    stacked = torch.from_numpy(np.concatenate([values[name] for name in plan.terms]).astype(np.float32))
    groups = len(values[plan.terms[0]])
    rows = [[term * groups + group for term in range(len(plan.terms))] for group in range(groups)]
    batch = marith_kernels.StagedBatch.build([pipeline] * groups, rows)

    def classifiers(which: Any, source: Any, lse: Any, out: torch.Tensor) -> torch.Tensor:
        for (group, stage), row in zip(which, out, strict=True):
            name = plan.classifiers[int(plan.stages[stage].parameters[0])]
            row.copy_(torch.from_numpy(values[name][group]))
        weightless = torch.tensor([plan.stages[stage].weightless for _, stage in which])
        return torch.where(weightless, 0.0, out.logsumexp(-1))

    result = batch.run(stacked, backend=backend, external=classifiers)
    return (result.logits.double() - result.lse.double()[:, None]).numpy()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, backend: str) -> None:
    case = CASES[name]
    formula = Formula.parse(case["formula"], normalize=case["normalize"])
    expected(name).assert_equals(fused(formula, logits(name), backend))


def test_golden_on_triton() -> None:
    """In a process of its own: the interpreter is chosen before triton is imported."""
    code = (
        "from tests.engine.test_rows import CASES, Formula, expected, fused, logits\n"
        "for name, case in CASES.items():\n"
        "    formula = Formula.parse(case['formula'], normalize=case['normalize'])\n"
        "    expected(name).assert_equals(fused(formula, logits(name), 'triton'))\n"
        "print('compared', len(CASES))\n"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["compared", str(len(CASES))]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(formula=operator_formulas, values=generic_logits())
def test_the_whole_algebra(backend: str, formula: Formula, values: dict[str, np.ndarray]) -> None:
    assume(is_decided(formula, values))
    wanted = formula.evaluate(values, **STEP)
    found = fused(formula, values, backend, **STEP)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
    finite = ~np.isneginf(wanted)
    # Weights amplify float32's rounding; nothing that can be drawn has a larger scale than its own energies.
    scale = 1 + np.abs(wanted[finite]).max(initial=0)
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=0, atol=2e-5 * scale)

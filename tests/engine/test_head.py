"""Linear formulas applied before the LM head instead of after it."""

from __future__ import annotations

import marith_kernels
import pytest
import torch

from tests.engine import test_worker as steps
from vllm_marith.engine.worker.head import HeadPlan, combinable, obeys_law
from vllm_marith.engine.worker.runner_v2 import StepGroups

SIZE, VOCAB = 32, 301
CPU = torch.device("cpu")
MEAN = [("push", 0, 2.5), ("add", 1, -1.5)]


class Head(torch.nn.Module):
    """An LM head with a bias; cap: soft-capping as in Gemma 2."""

    def __init__(self, dtype: torch.dtype = torch.float32, cap: float | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(VOCAB, SIZE, generator=generator).to(dtype)
        self.bias = torch.randn(VOCAB, generator=generator).to(dtype)
        self.cap = cap
        self.rows = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.rows = len(hidden)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_affine_head_obeys_the_law(dtype: torch.dtype) -> None:
    assert obeys_law(Head(dtype), SIZE, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_capped_head_does_not(dtype: torch.dtype) -> None:
    assert not obeys_law(Head(dtype, cap=30.0), SIZE, dtype, CPU)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (MEAN, True),
        ([("push", 0, 0.5), ("add", 1, 0.25), ("add", 2, 0.25)], True),
        ([("push", 0, 1.0), ("add", 1, -0.6)], False),  # normalize: none; a bias would be scaled
        ([("push", 0, 1.0)], False),  # nothing to combine
        ([("push", 0, 1.0), ("max", 1, 1.0)], False),
        ([("push", 0, 0.5), ("add", -1, 0.5)], False),  # the number one is no row of the head
    ],
)
def test_which_formulas_are_combined(instructions: list[tuple[str, int, float]], expected: bool) -> None:
    assert combinable(marith_kernels.Program(instructions)) is expected


def test_both_orders_agree_and_the_head_sees_fewer_rows() -> None:
    head = Head()
    hidden = torch.randn(6, SIZE, generator=torch.Generator().manual_seed(2))
    program = marith_kernels.Program(MEAN)
    rows = [[4, 0], [1, 3]]  # rows 2 and 5 are plain
    before = hidden.clone()
    logits = HeadPlan.build([program, program], rows, 6, CPU).run(head, hidden)
    assert logits is not None
    assert head.rows == 4
    assert torch.equal(hidden, before)
    after = head(hidden)
    fused = marith_kernels.fuse(after, marith_kernels.Batch.build([program, program], rows)).logits
    assert torch.allclose(logits[[4, 1]], fused, rtol=1e-5, atol=1e-4)
    assert torch.allclose(logits[[2, 5]], after[[2, 5]], rtol=1e-6, atol=1e-5)
    assert torch.isfinite(logits).all()


def test_a_step_of_combinable_and_other_groups() -> None:
    union = [("push", 0, 1.0), ("max", 1, 1.0)]
    expected = None
    for combine in (False, True):
        head, groups = Head(), StepGroups(CPU, combine)
        for name, instructions in (("a", MEAN), ("b", union)):
            for i, args in enumerate(steps.tagged(name, instructions)):
                groups.add_request(name if i == 0 else f"{name}-{i}", args)
        groups.begin_step(steps.batch_of(["a-1", "plain", "b", "a", "b-1"], [9] * 5, [9] * 5), steps.unread)
        hidden = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(3))
        logits = groups.compute_logits(head, hidden)
        assert logits is not None
        assert head.rows == (4 if combine else 5)
        read = logits[[1, 2, 3]]  # the followers' rows are read by nobody
        assert expected is None or torch.allclose(read, expected, rtol=1e-5, atol=1e-4)
        expected = read
        sampled = logits.argmax(-1, keepdim=True)
        groups.tie(sampled)
        assert sampled[0] == sampled[3]
        assert sampled[4] == sampled[2]

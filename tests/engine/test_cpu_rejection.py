"""vLLM's rejection sampler on CPUs repeats what a request asks of the sampler for each of its drafts."""

from __future__ import annotations

import pytest
import torch
from vllm.utils import cpu_triton_utils
from vllm.v1.sample import rejection_sampler

from vllm_marith.engine.worker import cpu_rejection

DRAFTS = torch.tensor([2, 2, 5])  # the second request has none
VALUES = [
    (torch.tensor([0.7, 9.0, 0.0]), (0, 1), [0.7, 0.7, 1.0, 1.0, 1.0]),
    (torch.tensor([0.25, 0.5, 1.0]), (), [0.25, 0.25, 1.0, 1.0, 1.0]),
    (torch.tensor([50, 1, 7], dtype=torch.int32), (), [50, 50, 7, 7, 7]),
]


@pytest.mark.parametrize(("values", "replace", "expected"), VALUES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_draft_has_its_requests_value(values, replace, expected, dtype) -> None:
    cpu_rejection.install()
    found = rejection_sampler.expand_batch_to_tokens(values, DRAFTS.to(dtype), 5, *replace)
    assert torch.equal(found, torch.tensor(expected, dtype=values.dtype))


def test_vllm_alone_is_wrong() -> None:
    """The day this fails, `vllm_marith.engine.worker.cpu_rejection` can go."""
    found = torch.full((3,), -77.0)
    cpu_triton_utils._expand_kernel_impl(found, torch.tensor([0.5, 1.0]), torch.tensor([2, 3]), 0, 0)
    assert found.tolist() == [-77.0] * 3

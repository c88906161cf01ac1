"""vLLM's rejection sampler on CPUs, with the temperatures, top-k and top-p that its requests have.

It repeats each of them for every draft of a request.  vLLM's version for CPUs writes them into a copy that is
thrown away, and draws with whatever the memory held: where vLLM itself checks drafts, which it does for those
that are copied from text, answers at a temperature above 0 were not distributed as the formula says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import patches


def install() -> None:
    """Wraps the function that repeats; idempotent, once per worker process."""
    patches.patch("vllm.v1.sample.rejection_sampler:expand_batch_to_tokens", repeating)


def repeating(expand: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`expand`, but in torch for tensors of the host."""

    @functools.wraps(expand)
    def repeated(
        x: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: float = 0,
        replace_to: float = 0,
    ) -> torch.Tensor:
        # x [requests], cu_num_tokens [requests]: how many drafts there are up to each one's last.
        if x.device.type != "cpu":
            return expand(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        values = x.masked_fill(x == replace_from, replace_to)
        return values.repeat_interleave(counts, output_size=num_tokens)

    return repeated

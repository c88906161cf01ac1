"""`Shape` on the V1 model runner: vLLM's sampler up to the point where it draws.

Everything is vLLM's own code on chosen rows of its own state, so that drafts and formula are treated alike,
and as every other token of the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, BatchUpdate, LogitsProcessors
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

_GREEDY = 1e-5
"""Temperatures below are vLLM's zero (``_SAMPLING_EPS``)."""


class ShapeV1:
    """See `drafting.Shape`.

    Args:
        runner: vLLM's ``GPUModelRunner``.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def temperature(self, rows: Sequence[int]) -> torch.Tensor:
        greedy = [self._parameters(row).temperature < _GREEDY for row in rows]
        return torch.tensor([0.0 if zero else 1.0 for zero in greedy], device=self._runner.device)

    def __call__(
        self, logits: torch.Tensor, rows: Sequence[int], ahead: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        sampler = self._runner.sampler
        metadata = self._metadata(rows, ahead)
        logits = sampler.apply_logits_processors(logits.float(), metadata, predict_bonus_token=False)
        if metadata.all_greedy:
            return logits
        logits = sampler.apply_temperature(logits, metadata.temperature, metadata.all_random)
        for processor in metadata.logitsprocs.argmax_invariant:
            logits = processor.apply(logits)
        return apply_top_k_top_p(logits, metadata.top_k, metadata.top_p)

    def _metadata(self, rows: Sequence[int], ahead: Sequence[torch.Tensor]) -> Any:
        """vLLM's sampling metadata as if these rows were the batch."""
        whole = self._runner.input_batch.sampling_metadata
        index = torch.tensor(rows, device=self._runner.device)

        def of_rows(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.index_select(0, index)

        counts_tokens = bool(whole.bad_words_token_ids) or not whole.no_penalties
        asks_processors = any(_asks_processors(self._parameters(row)) for row in set(rows))
        answers: list[list[int]] = []
        if counts_tokens or asks_processors:
            answers = [self._answer(row) + drafted.tolist() for row, drafted in zip(rows, ahead, strict=True)]
        return replace(
            whole,
            temperature=of_rows(whole.temperature),
            top_p=of_rows(whole.top_p),
            top_k=of_rows(whole.top_k),
            generators={},
            max_num_logprobs=None,
            prompt_token_ids=None if whole.no_penalties else of_rows(whole.prompt_token_ids),
            frequency_penalties=of_rows(whole.frequency_penalties),
            presence_penalties=of_rows(whole.presence_penalties),
            repetition_penalties=of_rows(whole.repetition_penalties),
            output_token_ids=answers if counts_tokens else [],
            allowed_token_ids_mask=of_rows(whole.allowed_token_ids_mask),
            bad_words_token_ids={
                place: whole.bad_words_token_ids[row]
                for place, row in enumerate(rows)
                if row in whole.bad_words_token_ids
            },
            logitsprocs=self._processors(rows, answers) if asks_processors else LogitsProcessors(),
            logprob_token_ids=None,
            spec_token_ids=None,
            thinking_budget_state_holder=None,
        )

    def _processors(self, rows: Sequence[int], answers: Sequence[list[int]]) -> LogitsProcessors:
        """vLLM's processors for minimum length, bias and min-p, knowing these rows and no others."""
        runner = self._runner
        arguments = runner.vllm_config, runner.device, runner.sampler.pin_memory
        processors = [make(*arguments) for make in BUILTIN_LOGITS_PROCESSORS]
        added = [(place, self._parameters(row), None, answers[place]) for place, row in enumerate(rows)]
        for processor in processors:
            processor.update_state(BatchUpdate(len(rows), removed=[], added=added, moved=[]))
        return LogitsProcessors(processors)

    def _parameters(self, row: int) -> Any:
        return self._runner.requests[self._runner.input_batch.req_ids[row]].sampling_params

    def _answer(self, row: int) -> list[int]:
        answer: list[int] = self._runner.requests[self._runner.input_batch.req_ids[row]].output_token_ids
        return list(answer)


def _asks_processors(parameters: Any) -> bool:
    return bool(parameters.min_tokens or parameters.min_p or parameters.logit_bias)

"""What an engine answers, as plain data, and its comparison with the plain reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support import reference, tiny
from tests.support.workload import Job

LOGPROB_TOLERANCE = 1e-4


@dataclass
class Answer:
    """One completion of a request.

    prompt: the token ids that the client is told it sent.
    logprobs: per token, candidate -> log-probability, the token itself first.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[dict[int, float]]


def ids_of(job: Job) -> dict[str, list[int]]:
    return {name: tiny.tokenizer()(text).input_ids for name, text in job.reference_prompts().items()}


def params_of(job: Job, **asked: Any) -> Any:
    from vllm import SamplingParams

    return job.formula.sampling_params(**asked) if job.formula else SamplingParams(**asked)


def generate(
    llm: Any, jobs: Sequence[Job], asked: dict[str, Any], *, by_priority: bool = False
) -> list[list[Answer]]:
    """For each job its completions, of which there are ``asked["n"]``, by default one."""
    outputs = llm.generate(
        [job.text for job in jobs],
        [params_of(job, **asked) for job in jobs],
        priority=[job.priority for job in jobs] if by_priority else None,
        use_tqdm=False,
    )
    return [answers_of(output) for output in outputs]


def answers_of(output: Any) -> list[Answer]:
    """The completions of a `vllm.RequestOutput`."""
    return [
        Answer(
            list(output.prompt_token_ids),
            list(completion.token_ids),
            completion.text,
            completion.finish_reason,
            [{t: p.logprob for t, p in step.items()} for step in completion.logprobs or []],
        )
        for completion in output.outputs
    ]


def references(
    model: str, jobs: Sequence[Job], length: int, constituents: Mapping[str, str] | None = None
) -> list[reference.Reference]:
    """The greedy continuations that `jobs` should have.

    constituents: name -> path.
    """
    return [
        reference.generate(
            models_of(job, model, constituents or {}), job.reference_formula(), ids_of(job), length
        )
        for job in jobs
    ]


def models_of(job: Job, base: str, constituents: Mapping[str, str]) -> dict[str, str]:
    """The path of each term's model."""
    paths = {term: constituents[name] for term, name in job.models.items()}
    return {term: paths.get(term, base) for term in job.reference_prompts()}


def assert_greedy(
    jobs: Sequence[Job], answers: Sequence[Sequence[Answer]], expected: Sequence[reference.Reference]
) -> None:
    """Tokens, their log-probabilities and the visible prompt are the reference's."""
    for job, (answer,), wanted in zip(jobs, answers, expected, strict=True):
        assert answer.tokens == wanted.tokens, f"{job.formula}"
        assert answer.prompt == ids_of(job)[job.reference_formula().leader]
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        worst = max(abs(a - b) for a, b in zip(found, wanted.logprobs, strict=True))
        assert worst < LOGPROB_TOLERANCE

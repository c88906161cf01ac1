"""What a server answers over HTTP, as the same plain data as an engine's answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from tests.support.exactness import Answer
from tests.support.workload import Job


def client_of(url: str, timeout: float = 300) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=timeout)


def body_of(job: Job, speculative: Any = None) -> dict[str, Any]:
    """What the unmodified client is told beside prompt and sampling parameters."""
    body: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True}
    if job.formula is not None:
        body["vllm_xargs"] = {"marith": job.formula.to_json(speculative=speculative)}
    return body


def ask(client: openai.OpenAI, job: Job, length: int, speculative: Any = None) -> Answer:
    """A greedy completion with the log-probabilities of its tokens."""
    asked = dict(temperature=0, max_tokens=length, logprobs=1)
    found: Any = client.completions.create(
        model="tiny", prompt=job.text, extra_body=body_of(job, speculative), **asked
    )
    (choice,) = found.choices
    names = (int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens)
    return Answer(
        choice.prompt_token_ids,
        choice.token_ids,
        choice.text,
        choice.finish_reason,
        [{token: p} for token, p in zip(names, choice.logprobs.token_logprobs, strict=True)],
    )


def ask_all(
    client: openai.OpenAI, jobs: Sequence[Job], length: int, speculative: Any = None
) -> list[list[Answer]]:
    """All of them at the same time."""
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [[answer] for answer in threads.map(lambda job: ask(client, job, length, speculative), jobs)]

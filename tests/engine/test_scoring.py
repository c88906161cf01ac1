"""Log-probabilities of a prompt under a formula equal a plain Hugging Face float32 forward."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import asynchronous, engines, reference, runners, tiny, workload
from tests.support import constituents as several
from vllm_marith import Formula

TOLERANCE = 1e-4
FORMULAS = (
    "base",
    "1.5*base - 0.5*a",
    "base - 0.4*union(a, base) + 0.2*b",
    "topk(base, 100) + normalize(a - 0.3*b)",
    "self_debias(base, a, 5)",
    "0*base + a",
)


@pytest.fixture(scope="module", params=["v1", "v2"])
def runner(request: Any) -> Iterator[Any]:
    with runners.start(request.param) as found:
        yield found


def jobs() -> list[tuple[list[int], Formula, dict[str, list[int]]]]:
    """(what the client sends, formula, token ids of each term's prompt)."""
    print("seed 11")
    rng = random.Random(11)
    encode = tiny.tokenizer().encode
    found = []
    for text in FORMULAS:
        ids = encode(workload.words(rng, 4, 16))
        heads = {"a": workload.words(rng, 1, 10), "b": workload.words(rng, 1, 10)}
        formula = Formula.parse(
            text, {"a": {"system": heads["a"]}, "b": {"prompt": heads["b"] + ": {input}"}}
        )
        begins = {"a": encode(f"{heads['a']}\n"), "b": encode(f"{heads['b']}: ")}
        prompts = {name: [*begins[name], *ids[1:]] if name in begins else ids for name in formula.terms}
        found.append((ids, formula, prompts))
    return found


def ask(llm: Any, asked: list[tuple[list[int], str | None]], **options: Any) -> list[Any]:
    """For each (prompt, formula as a request's JSON) the prompt's log-probabilities and the first tokens."""
    from vllm import SamplingParams

    params = dict(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=4) | options
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in asked],
        [SamplingParams(extra_args={"marith": value} if value else None, **params) for _, value in asked],
        use_tqdm=False,
    )
    return [
        [
            {t: (p.logprob, p.rank) for t, p in step.items()} if step else None
            for step in output.prompt_logprobs
        ]
        for output in outputs
    ]


def expected(model: Any, ids: list[int], formula: Formula, prompts: dict[str, list[int]]) -> torch.Tensor:
    """float64 [len(ids) - 1, vocab]"""
    return reference.scores(str(model), formula, prompts, len(ids) - 1)


def check(found: list[Any], wanted: torch.Tensor, ids: list[int]) -> None:
    assert found[0] is None
    assert len(found) == len(ids)
    for step, token, row in zip(found[1:], ids[1:], wanted, strict=True):
        logprob, rank = step[token]
        if torch.isneginf(row[token]):
            assert logprob == -torch.inf
        else:
            assert abs(logprob - float(row[token])) < TOLERANCE
            assert abs(rank - 1 - int((row > row[token]).sum())) <= 1  # two may be as good as equal
        others = sorted((lp for lp, _ in step.values()), reverse=True)[:4]
        assert torch.allclose(torch.tensor(others).double(), row.topk(4).values, rtol=0, atol=TOLERANCE)


CASES = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=16, max_num_seqs=16),
    "small_cache": dict(num_gpu_blocks_override=13, max_num_seqs=16),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_huggingface(runner: Any, tiny_model: Any, name: str) -> None:
    wanted = [expected(tiny_model, *job) for job in jobs()]
    asked: list[tuple[list[int], str | None]] = [(ids, formula.to_json()) for ids, formula, _ in jobs()]
    plain = jobs()[1][0]
    with runner.open(tiny_model, **(dict(max_num_seqs=32, max_model_len=128) | CASES[name])) as call:
        *found, beside = call(ask, [*asked, (plain, None)])
        again = call(ask, asked)  # a prefix cache must not hide what is scored
        call(engines.assert_all_returned)
    for answer, second, rows, (ids, _) in zip(found, again, wanted, asked, strict=True):
        check(answer, rows, ids)
        check(second, rows, ids)
    check(beside, expected(tiny_model, plain, Formula.parse("base"), {"base": plain}), plain)


def test_asynchronously(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asynchronous.force(monkeypatch)
    asked: list[tuple[list[int], str | None]] = [(ids, formula.to_json()) for ids, formula, _ in jobs()]
    with engines.engine(tiny_model, max_num_batched_tokens=48, max_num_seqs=24) as llm:
        found = ask(llm, asked)
    for answer, job in zip(found, jobs(), strict=True):
        check(answer, expected(tiny_model, *job), job[0])


def several_jobs() -> list[tuple[list[int], Formula, dict[str, list[int]]]]:
    """Some of `jobs`, in which `a` and `b` run on other base models, and a formula on another model alone."""
    found = []
    for ids, formula, prompts in (jobs()[i] for i in (2, 5)):
        asked = json.loads(formula.to_json())
        for name, term in asked.get("terms", {}).items():
            if name != "base":
                term["model"] = {"a": "small", "b": "qwen"}[name]
        found.append((ids, Formula.parse(asked["formula"], asked.get("terms", {})), prompts))
    ids = found[0][0]
    return [*found, (ids, Formula.parse("a", {"a": {"model": "small"}}), {"a": ids})]


def test_over_several_base_models(runner: Any, tmp_path: Any) -> None:
    """Hidden states of three sizes, in chunks beside plain requests and formulas on one model."""
    base, constituents = several.make(tmp_path)
    asked_jobs = several_jobs()
    paths = {"base": base, "a": constituents["small"], "b": constituents["qwen"]}
    asked: list[tuple[list[int], str | None]] = [(ids, f.to_json()) for ids, f, _ in asked_jobs]
    plain = jobs()[1][0]
    options = dict(
        max_num_seqs=32,
        max_num_batched_tokens=32,
        max_model_len=128,
        additional_config=several.settings(constituents),
    )
    with runner.open(base, **options) as call:
        *found, beside, on_base = call(ask, [*asked, (plain, None), (plain, "base")])
        call(engines.assert_all_returned)
    for answer, (ids, formula, prompts) in zip(found, asked_jobs, strict=True):
        check(answer, reference.scores(paths, formula, prompts, len(ids) - 1), ids)
    for answer in (beside, on_base):
        check(answer, expected(base, plain, Formula.parse("base"), {"base": plain}), plain)


REFUSED = {
    "suffix": ("base + a", {"a": {"prompt": "{input} indeed"}}, "'base' and 'a' are not so"),
    "leader": ("a + base", {"a": {"system": "Hello"}}, "'a' and 'base' are not so"),
    "schedule": ("base + schedule(0: 1, 3: 2)*a", {"a": {"system": "Hello"}}, "schedules and classifiers"),
}


def ask_chat(llm: Any, formula: Formula) -> Any:
    messages = [{"role": "user", "content": "Hello"}]
    return llm.chat(messages, formula.sampling_params(prompt_logprobs=1), use_tqdm=False)


def test_refusals(tiny_model: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with engines.engine(tiny_model) as llm:
        for text, terms, words in REFUSED.values():
            formula = Formula.parse(text, terms)
            with pytest.raises(VLLMValidationError, match=words):
                ask(llm, [(jobs()[0][0], formula.to_json())])
        with pytest.raises(VLLMValidationError, match="for completions, not for conversations"):
            ask_chat(llm, Formula.parse("base + a", {"a": {"system": "x"}}))
        engines.assert_all_returned(llm)

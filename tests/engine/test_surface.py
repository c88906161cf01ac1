"""Everything that a request may ask of vLLM, it may ask of a formula: the table of docs/requests.md.

Three requests ask for the same: plain, under the formula `1*base`, and under `base + 1e-7*other`, a group
of two members whose distribution is the plain one to rounding.  All three get the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import engines, runners, tiny
from vllm_marith import Formula

TEXT = "the value of the expression is"
LENGTH = 12
EOS = tiny.tokenizer().eos_token_id
GROUP = Formula.parse("base + 0.0000001*other", {"other": {"system": "Something else, and longer"}})
TABLE = Path(__file__).parents[2] / "docs" / "requests.md"

FEATURES: dict[str, dict[str, Any]] = {
    "temperature": dict(temperature=0.8, seed=1),
    "greedy": dict(temperature=0),
    "seed": dict(temperature=1.0, seed=7),
    "top_k": dict(temperature=1.0, seed=2, top_k=5),
    "top_p": dict(temperature=1.0, seed=3, top_p=0.5),
    "min_p": dict(temperature=1.0, seed=4, min_p=0.2),
    "n": dict(temperature=1.0, seed=5, n=3),
    "presence_penalty": dict(temperature=0, presence_penalty=1.5),
    "frequency_penalty": dict(temperature=0, frequency_penalty=1.5),
    "repetition_penalty": dict(temperature=0, repetition_penalty=1.6),
    "logit_bias": dict(temperature=0, logit_bias={300: 4.0, 301: -5.0}),
    "allowed_token_ids": dict(temperature=0, allowed_token_ids=[300, 305, 310, 320]),
    "bad_words": dict(temperature=0, bad_words=["the", "and", "of a"]),
    "stop": dict(temperature=0, stop=["e"]),
    "include_stop_str_in_output": dict(temperature=0, stop=["e"], include_stop_str_in_output=True),
    "stop_token_ids": dict(temperature=0, logit_bias={300: 100.0}, stop_token_ids=[300], min_tokens=3),
    "min_tokens": dict(temperature=0, logit_bias={EOS: 100.0}, min_tokens=4, ignore_eos=False),
    "ignore_eos": dict(temperature=0, logit_bias={EOS: 100.0}, ignore_eos=True),
    "max_tokens": dict(temperature=0, max_tokens=3),
    "logprobs": dict(temperature=0.7, seed=6, logprobs=7),
    "logprobs_of_the_vocabulary": dict(temperature=0, logprobs=-1, max_tokens=2),
    "prompt_logprobs": dict(temperature=0, prompt_logprobs=3),
    "skip_special_tokens": dict(temperature=0, logit_bias={EOS: 100.0}, skip_special_tokens=False),
    "detokenize": dict(temperature=0, detokenize=False),
    "skip_reading_prefix_cache": dict(temperature=0, skip_reading_prefix_cache=True),
    "structured_choice": dict(temperature=0, structured_outputs=dict(choice=["the one", "the other"])),
    "structured_regex": dict(temperature=0, structured_outputs=dict(regex="[ab]{4}[0-9]+"), max_tokens=8),
    "structured_json": dict(
        temperature=0,
        structured_outputs=dict(
            json={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        ),
    ),
    "structured_grammar": dict(temperature=0, structured_outputs=dict(grammar='root ::= "yes" | "no"')),
    "priority": dict(temperature=0, priority=3),
    "cache_salt": dict(temperature=0, cache_salt="salt"),
    "truncate_prompt_tokens": dict(temperature=0, truncate_prompt_tokens=3),
}  # fmt: skip
# vLLM's own kernel for these does not run in Triton's interpreter, which V2 needs where there is no GPU.
NOT_INTERPRETED = {"top_k", "top_p"}
# One request of this kind goes beside each term's own prompt, which truncation would change.
ALONE = {"truncate_prompt_tokens"}


KINDS = {"plain": None, "trivial": Formula.parse("1*base"), "group": GROUP}


@pytest.fixture(scope="module", params=["v1", "v2"])
def answers(request: Any, tiny_model: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """Kind of request -> feature -> answer.  The requests of a kind run together."""
    with runners.start(request.param) as runner:
        options = dict(max_num_seqs=16, max_model_len=128, scheduling_policy="priority", max_logprobs=-1)
        with runner.open(tiny_model, **options) as call:
            names = [name for name in FEATURES if request.param == "v1" or name not in NOT_INTERPRETED]
            yield {kind: call(answer_all, formula, names) for kind, formula in KINDS.items()}


def answer_all(llm: Any, formula: Formula | None, names: list[str]) -> dict[str, Any]:
    """The answer to a request of every kind, as plain data."""
    together = [name for name in names if name not in ALONE]
    found = dict(zip(together, _generate(llm, formula, together), strict=True))
    for name in ALONE if formula is not GROUP else ():
        (found[name],) = _generate(llm, formula, [name], {"truncate_prompt_tokens": 3})
    engines.assert_all_returned(llm)
    return found


def _generate(llm: Any, formula: Formula | None, names: list[str], tokenization: Any = None) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompts, params, priorities = [], [], []
    for name in names:
        asked = dict(max_tokens=LENGTH, ignore_eos=True, logprobs=2) | FEATURES[name]
        salt = asked.pop("cache_salt", None)
        prompts.append({"prompt": TEXT} | ({"cache_salt": salt} if salt else {}))
        priorities.append(asked.pop("priority", 0))
        asked.pop("truncate_prompt_tokens", None)
        if grammar := asked.pop("structured_outputs", None):
            asked["structured_outputs"] = StructuredOutputsParams(**grammar)
        params.append(formula.sampling_params(**asked) if formula else SamplingParams(**asked))
    outputs = llm.generate(
        prompts, params, priority=priorities, use_tqdm=False, tokenization_kwargs=tokenization
    )
    return [
        [
            [list(output.prompt_token_ids), _logprobs(output.prompt_logprobs)],
            *(
                [list(c.token_ids), c.text, c.finish_reason, c.stop_reason, _logprobs(c.logprobs)]
                for c in output.outputs
            ),
        ]
        for output in outputs
    ]


def _logprobs(positions: Any) -> Any:
    return positions and [step and {t: p.logprob for t, p in step.items()} for step in positions]


def assert_close(found: Any, wanted: Any) -> None:
    """The same tokens, texts and reasons, and log-probabilities to rounding."""
    assert [part[:-1] for part in found] == [part[:-1] for part in wanted]
    for one, other in zip(found, wanted, strict=True):
        for step, same in zip(one[-1] or (), other[-1] or (), strict=True):
            if same is None or step is None:
                assert step == same
                continue
            # Of two candidates that are as good as equal, either may be the last one in a list.
            both = step.keys() & same.keys()
            assert len(both) >= len(same) - 1
            assert all(step[token] == pytest.approx(same[token], abs=1e-4) for token in both)


@pytest.mark.parametrize("name", FEATURES)
def test_a_formula_answers_as_the_plain_request(answers: dict[str, dict[str, Any]], name: str) -> None:
    if name not in answers["plain"]:
        pytest.skip("vLLM's own top-k and top-p kernel does not run in Triton's interpreter")
    plain = answers["plain"][name]
    assert len(plain[1][0]) > 0
    assert_close(answers["trivial"][name], plain)
    if name not in ALONE:
        assert_close(answers["group"][name], plain)


def test_the_table_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TABLE.read_text(), re.MULTILINE)
    assert rows == list(FEATURES)

"""Formulas with classifier terms through the engine equal plain transformers, on both model runners."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engines, exactness, judges, runners, tiny, workload
from tests.support.exactness import Answer
from tests.support.steering import Readings, Row, Steered, assert_follows
from tests.support.workload import Job
from vllm_marith import Formula

TEXT = "The value of the expression is not what a function returns, unless the statement is the last one"
BAD = "You are a rude person."
LENGTH = {"v1": 16, "v2": 10}
ASKED: dict[str, Any] = dict(temperature=0, ignore_eos=True, logprobs=0)


def _fudge(q: dict[str, Row], r: Readings) -> Row:
    return q["base"] + r.c("c", q["base"])


def _detox(q: dict[str, Row], r: Readings) -> Row:
    inner = (q["base"] - 0.96 * torch.maximum(q["toxic"], q["base"])) / 0.04
    return inner + r.c("c", inner)


def _two_judges(q: dict[str, Row], r: Readings) -> Row:
    inner = (2 * q["base"] - 0.5 * q["toxic"]) / 1.5
    return (1.5 * inner + 0.7 * r.c("c", inner) - 0.4 * r.c("d", inner)) / 1.5


def _plain(q: dict[str, Row], r: Readings) -> Row:
    return (2 * q["base"] + 0.5 * r.c("c", q["base"])) / 2.5


def _strength(q: dict[str, Row], r: Readings) -> Row:
    weight = 0.2 + 1.3 * r.p("c")
    return (q["base"] + weight * q["toxic"]) / (1 + weight)


PROMPTS = {"base": TEXT, "toxic": f"{BAD}\n{TEXT}"}
TOXIC = {"toxic": {"system": BAD}}
JUDGE = {"classifier": "three", "label": "toxic", "top_k": 8}
OTHER = {"classifier": "two", "label": 0, "top_k": 5, "prompt": "Answer: ", "every": 2}
JOBS = {
    "fudge": Steered(TEXT, "base + c", {"c": JUDGE}, _fudge),
    "detox": Steered(
        TEXT,
        "base - 0.96*union(toxic, base) + 0.04*c",
        {"c": JUDGE | {"minimize": True}} | TOXIC,
        _detox,
        PROMPTS,
    ),
    "two": Steered(
        TEXT, "2*base - 0.5*toxic + 0.7*c - 0.4*d", {"c": JUDGE, "d": OTHER} | TOXIC, _two_judges, PROMPTS
    ),
    "plain": Steered(
        TEXT, "2*base + 0.5*c", {"c": JUDGE | {"form": "plain", "every": 3, "label": 2}}, _plain
    ),
    "strength": Steered(TEXT, "base + strength(c, 0.2, 1.5)*toxic", {"c": JUDGE} | TOXIC, _strength, PROMPTS),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        "three": judges.make(folder / "three", sharpness=4),
        "two": judges.make(folder / "two", ("no", "yes"), seed=1, sharpness=4),
    }


def settings_of(paths: dict[str, Path], **more: Any) -> dict[str, Any]:
    classifiers = {name: {"path": str(path), **more} for name, path in paths.items()}
    return dict(additional_config={"marith": {"classifiers": classifiers}})


@pytest.fixture(scope="module", params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> Iterator[Any]:
    with runners.start(request.param) as found:
        found.name = request.param
        yield found


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    preempts: bool = False


SMALL_STEPS = dict(max_num_batched_tokens=32)
CASES = {
    "prefix_cache": Case(),
    "small_steps": Case(SMALL_STEPS | dict(enable_prefix_caching=False)),
    "small_cache": Case(dict(num_gpu_blocks_override=17), preempts=True),
    "async": Case(SMALL_STEPS, asynchronous=True),
    "async_small_cache": Case(dict(num_gpu_blocks_override=17), asynchronous=True, preempts=True),
}


def preemptions(llm: Any) -> int:
    return engines.scheduler(llm).figures.preempted


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(runner: Any, tiny_model: Path, paths: dict[str, Path], name: str) -> None:
    """All formulas at once, beside plain requests and formulas without classifiers."""
    if runner.name == "v2" and name in ("small_steps", "small_cache"):
        pytest.skip("slow in the interpreter, and part of the asynchronous cases")
    case, length = CASES[name], LENGTH[runner.name]
    options = dict(max_num_seqs=20, max_model_len=128) | settings_of(paths) | case.options
    plain = [
        Job("So it is what it is, and it is not what it was before, when it was"),
        workload.job(random.Random(5), 2, longest=8),
    ]
    jobs = [job.job() for job in JOBS.values()]
    with runner.open(tiny_model, asynchronous=case.asynchronous, **options) as call:
        answers = call(exactness.generate, [*jobs, *plain], ASKED | dict(max_tokens=length))
        call(engines.assert_all_returned)
        assert (call(preemptions) > 0) == case.preempts
    for steered, (answer,) in zip(JOBS.values(), answers, strict=False):
        assert len(answer.tokens) == length
        assert_follows(steered, answer, tiny_model, paths)
    exactness.assert_greedy(plain, answers[len(jobs) :], exactness.references(str(tiny_model), plain, length))


# -------------------------------------------------------------------------- one engine for each model runner


@pytest.fixture(scope="module")
def call(runner: Any, tiny_model: Path, paths: dict[str, Path]) -> Iterator[runners.Call]:
    with runner.open(tiny_model, max_num_seqs=16, max_model_len=128, **settings_of(paths)) as call:
        yield call
        call(engines.assert_all_returned)


def test_sampled_answers(call: runners.Call, tiny_model: Path, paths: dict[str, Path]) -> None:
    """Several completions with a seed each: each draws from the formula behind its own tokens."""
    asked = dict(n=2, temperature=1.0, seed=4, max_tokens=6, ignore_eos=True, logprobs=0)
    ((first, second),) = call(exactness.generate, [JOBS["detox"].job()], asked)
    assert first.tokens != second.tokens
    for answer in (first, second):
        assert_follows(JOBS["detox"], answer, tiny_model, paths, greedy=False)


def test_token_ids_are_read_as_text(call: runners.Call, tiny_model: Path, paths: dict[str, Path]) -> None:
    ids = tiny.tokenizer()(TEXT).input_ids
    answer = call(answer_to_ids, ids, JOBS["fudge"].job(), ASKED | dict(max_tokens=6))
    assert_follows(JOBS["fudge"], answer, tiny_model, paths)


def answer_to_ids(llm: Any, ids: list[int], job: Job, asked: dict[str, Any]) -> Answer:
    (output,) = llm.generate([{"prompt_token_ids": ids}], exactness.params_of(job, **asked), use_tqdm=False)
    return answer_of(output)


def answer_of(output: Any) -> Answer:
    (completion,) = output.outputs
    logprobs = [{token: p.logprob for token, p in step.items()} for step in completion.logprobs or []]
    return Answer(
        list(output.prompt_token_ids),
        list(completion.token_ids),
        completion.text,
        completion.finish_reason,
        logprobs,
    )


@pytest.mark.parametrize(
    ("term", "prefix"),
    [({}, "Why?\n"), ({"prompt": "Q: {input} A: "}, "Q: Why? A: "), ({"prompt": "Answer: "}, "Answer: ")],
)
def test_chat(
    call: runners.Call, tiny_model: Path, paths: dict[str, Path], term: dict[str, str], prefix: str
) -> None:
    """The input of a classifier's template is the last user message."""
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Me."},
        {"role": "user", "content": "Why?"},
    ]
    formula = Formula.parse("base + c", {"c": JUDGE | term})
    answer = call(answer_to_chat, messages, formula, ASKED | dict(max_tokens=6))
    # The same as a completion of the rendered conversation whose classifier reads the prefix.
    text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages) + "<|assistant|>"
    assert_follows(
        Steered(text, "base + c", {"c": JUDGE | {"prompt": prefix}}, _fudge), answer, tiny_model, paths
    )


def answer_to_chat(llm: Any, messages: Any, formula: Formula, asked: dict[str, Any]) -> Answer:
    (output,) = llm.chat(messages, formula.sampling_params(**asked), use_tqdm=False)
    return answer_of(output)


@pytest.mark.parametrize(
    ("formula", "term", "sentence"),
    [
        ("base + c", {"classifier": "four"}, "term 'c': .* has no classifier 'four'; it knows: three, two"),
        ("2*base + strength(c)*base", {"classifier": "five"}, "term 'c': .* has no classifier 'five'"),
        ("base + c", {"classifier": "three", "label": "rude"}, "no class 'rude'; its classes are 0: plain"),
        ("base + c", {"classifier": "two", "label": 2}, "no class 2; its classes are 0: no, 1: yes"),
        ("base + c", {"classifier": "two", "top_k": 101}, "reads 100 candidates a token at most, not 101"),
        ("base + c + d + e", {"classifier": "two", "top_k": 90}, "would read 273 texts for one token"),
        ("base + c", {"classifier": "two", "system": "x" * 32768}, "would read 32771 characters in front of"),
        ("base + c", {"classifier": "../two"}, "'classifier' of a term must be a name that the server knows"),
    ],
)
def test_refusals(call: runners.Call, formula: str, term: dict[str, Any], sentence: str) -> None:
    raw = json.dumps({"formula": formula, "terms": dict.fromkeys("cde", term)})
    found = call(refusal, raw)
    assert re.search(sentence, found), found


def refusal(llm: Any, raw: str) -> str:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        llm.generate(["So"], SamplingParams(extra_args={"marith": raw}), use_tqdm=False)
    except VLLMValidationError as error:
        return str(error)
    return "not refused"


def test_a_failing_classifier_ends_its_requests_alone(
    call: runners.Call, tiny_model: Path, paths: dict[str, Path]
) -> None:
    """Those that ask for it, at the step in which it fails; the others do not notice."""
    jobs = [JOBS["fudge"].job(), JOBS["two"].job(), JOBS["strength"].job(), Job(TEXT)]
    other = Steered(TEXT, "base + d", {"d": OTHER}, lambda q, r: q["base"] + r.c("d", q["base"]))
    failed = call(generate_while_failing, [*jobs, other.job()], ASKED | dict(max_tokens=8), "three", 4)
    for (answer,) in failed[:3]:
        assert answer.finish_reason == "error"
        assert len(answer.tokens) < 8
    (plain,), (steered,) = failed[3:]
    assert steered.finish_reason == plain.finish_reason == "length"
    assert_follows(other, steered, tiny_model, paths)
    exactness.assert_greedy(jobs[3:], [[plain]], exactness.references(str(tiny_model), jobs[3:], 8))
    ((again,),) = call(exactness.generate, jobs[:1], ASKED | dict(max_tokens=8))
    assert_follows(JOBS["fudge"], again, tiny_model, paths)


def generate_while_failing(
    llm: Any, jobs: list[Job], asked: dict[str, Any], name: str, after: int
) -> list[list[Answer]]:
    """`exactness.generate`, with a classifier that fails from some call on."""
    classifier = classifier_rows(llm).classifiers[name]
    submit, calls = classifier.submit, []

    def failing(texts: Any) -> Any:
        calls.append(texts)
        if len(calls) > after:
            raise RuntimeError("out of order")
        return submit(texts)

    classifier.submit = failing
    try:
        return exactness.generate(llm, jobs, asked)
    finally:
        del classifier.submit


def classifier_rows(llm: Any) -> Any:
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    if hasattr(runner, "model_state"):
        return runner.model_state.groups.plans.classifiers
    from vllm_marith.engine.worker import runner_v1

    return runner_v1._classifiers(runner)


def test_the_cache_knows_the_text_so_far(call: runners.Call) -> None:
    """It was a candidate in the step before: a token costs top_k texts, and one step one batch."""
    before = call(counters)
    ((answer,),) = call(
        exactness.generate,
        [Job("Never seen before", Formula.parse("base + c", {"c": JUDGE}))],
        ASKED | dict(max_tokens=9),
    )
    texts, hits, batches = (now - then for now, then in zip(call(counters), before, strict=True))
    assert len(answer.tokens) == batches == 9
    assert texts + hits == 9 * 9
    assert hits >= 8


def counters(llm: Any) -> tuple[int, int, int]:
    found = classifier_rows(llm).classifiers["three"].figures
    return found.texts, found.hits, found.batches


# -------------------------------------------------------------------------------------------------- at start


def test_a_bad_classifier_stops_the_start(tiny_model: Path, tmp_path: Path) -> None:
    from vllm_marith.engine.plugin import UnsupportedError

    options = settings_of({"broken": tmp_path})
    with (
        pytest.raises(UnsupportedError, match=r"classifier 'broken' .* has no readable configuration"),
        engines.engine(tiny_model, **options),
    ):
        pass


# ------------------------------------------------------------------------------------- models that mean it


def test_a_trained_classifier_steers() -> None:
    """Toward contracts, as a judge says that knows neither the model nor the classifier."""
    from vllm_marith.models.judge import Judge
    from vllm_marith.models.store import Paths, default_home, is_made

    home = default_home()
    for name in ("big", "judge", "judge_bert"):
        if not is_made(name, home):
            pytest.skip("needs the embedded models, which `marith models` makes")
    made = Paths.under(home)
    judge = Judge.load(made.judge)
    formula = Formula.parse(
        "base + 1.5*c", {"c": JUDGE | {"classifier": "tone", "label": "legal", "top_k": 20}}
    )
    texts = ["The", "In the beginning", "It is", "When"] * 3
    legal = {}
    with engines.engine(made.big, max_model_len=128, **settings_of({"tone": made.judge_bert})) as llm:
        for name, wanted in (("plain", None), ("steered", formula)):
            jobs = [Job(text, wanted) for text in texts]
            answers = [
                exactness.generate(llm, [job], dict(temperature=0.8, seed=seed, max_tokens=40))[0][0]
                for seed, job in enumerate(jobs)
            ]
            labels = judge.labels([text + answer.text for text, answer in zip(texts, answers, strict=True)])
            legal[name] = labels.count("legal")
    print(legal)
    assert legal["steered"] >= legal["plain"] + 4

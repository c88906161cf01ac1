"""Formulas on the V2 model runner are what they are on V1: every test of an engine runs on both, small.

V2 runs in Triton's interpreter, in a child process; see `tests.support.runners`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engines, exactness, poison, reference, runners, tiny, workload
from tests.support.exactness import LOGPROB_TOLERANCE, Answer, ids_of
from tests.support.sampler import EOS, Sampler
from tests.support.workload import Job
from vllm_marith import Formula

LENGTH = 12
SMALL = dict(max_num_seqs=16, max_model_len=128)

TERMS = {
    "a": {},
    "b": {"system": "You are an adult who writes letters about the law."},
    "c": {"prompt": "Magic.\n{input} so"},
}
TEXT = "The value is"
PROMPTS = {"a": TEXT, "b": f"{TERMS['b']['system']}\n{TEXT}", "c": f"Magic.\n{TEXT} so"}


def job_of(formula: str) -> Job:
    parsed = Formula.parse(formula, TERMS)
    return Job(TEXT, parsed, {name: PROMPTS[name] for name in parsed.terms})


LINEAR = job_of("1.8*a - 1.1*b + 0.6*c")
UNION = job_of("1.6*a - 0.8*b + 0.7*union(a, c)")


# ------------------------------------------------------------- functions of an engine, called where it lives


def facts(llm: Any) -> dict[str, Any]:
    """What tells an engine from another."""
    runner = model_runner(llm)
    scheduler = engines.scheduler(llm)
    return {
        "runner": "v2" if hasattr(runner, "model_state") else "v1",
        "scheduler": type(scheduler).__name__,
        "preemptions": scheduler.figures.preempted if hasattr(scheduler, "figures") else 0,
        "state": type(getattr(runner, "model_state", None)).__name__,
        "before_the_head": hasattr(runner, "model_state")
        and getattr(runner.model_state, "groups", None) is not None
        and runner.model_state.groups.plans.combine_hidden_states,
        "sampler": type(runner.sampler).__name__,
    }


def model_runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def chosen_by_noise(llm: Any, rows: torch.Tensor, seed: int, positions: list[int]) -> list[int]:
    """The tokens that V2's sampler draws from logits ``[tokens, vocab]`` with a request's seed."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    slot = torch.zeros(len(positions), dtype=torch.int64)
    temperature, seeds = torch.ones(1), torch.tensor([seed])
    where = torch.tensor(positions, dtype=torch.int64)
    return gumbel_sample(rows.float(), slot, temperature, seeds, where, False, False).tolist()


def abort_one_of_three(llm: Any, job: Job, asked: dict[str, Any]) -> list[list[int]]:
    """The tokens of two copies of a request, between which a third is aborted on the way."""
    engine = llm.llm_engine
    for i in range(3):
        engine.add_request(str(i), job.text, exactness.params_of(job, **asked))
    found: dict[str, list[int]] = {}
    for step in range(1000):
        if not engine.has_unfinished_requests():
            break
        if step == 5:
            engine.abort_request(["1"])
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    return [found["0"], found["2"]]


def prompt_logprobs_beside(llm: Any, job: Job, text: str) -> list[float]:
    """Log-probabilities of a plain request's prompt, computed in the steps of a group."""
    from vllm import SamplingParams

    plain = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0)
    params = [exactness.params_of(job, temperature=0, max_tokens=4), plain]
    _, output = llm.generate([job.text, text], params, use_tqdm=False)
    ids = output.prompt_token_ids
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]


def extension_answers(llm: Any) -> list[str]:
    return llm.collective_rpc("neighbour")


def members_left(llm: Any) -> int:
    """Members of groups that the worker still knows after the next step."""
    from vllm import SamplingParams

    llm.generate(["So"], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return len(model_runner(llm).model_state.groups.members)


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module", params=["v1", "v2"])
def runner(request: pytest.FixtureRequest) -> Iterator[Any]:
    with runners.start(request.param) as found:
        found.name = request.param
        yield found


@pytest.fixture(scope="module")
def call(runner: Any, tiny_model: Path) -> Iterator[runners.Call]:
    """An engine with room for everything; call(function, ...) runs the function with it."""
    with runner.open(tiny_model, **SMALL) as call:
        assert call(facts)["runner"] == runner.name
        yield call
        call(engines.assert_all_returned)
        if runner.name == "v2":
            assert call(members_left) == 0


def completion(call: runners.Call, job: Job, **asked: Any) -> Answer:
    ((answer,),) = call(exactness.generate, [job], asked)
    return answer


def distributions(model: Path, job: Job, tokens: list[int]) -> torch.Tensor:
    """float64 log-probabilities ``[tokens, vocab]`` that the formula gives on the way along `tokens`."""
    rows: list[torch.Tensor] = []

    def follow(logits: dict[str, torch.Tensor], so_far: list[int]) -> int:
        rows.append(job.reference_formula().evaluate(logits))
        return tokens[len(so_far)]

    reference.decode(str(model), ids_of(job), len(tokens), follow)
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------ schedules


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    preempts: bool = False


SMALL_STEPS = dict(max_num_batched_tokens=16)
SMALL_CACHE = dict(num_gpu_blocks_override=13)
CASES = {
    "prefix_cache": Case(),
    "small_steps": Case(SMALL_STEPS | dict(enable_prefix_caching=False)),
    "small_cache": Case(SMALL_CACHE, preempts=True),
    "async": Case(SMALL_STEPS, asynchronous=True),
    "async_small_cache": Case(SMALL_CACHE, asynchronous=True, preempts=True),
    "before_the_head": Case(dict(additional_config={"marith": {"combine_hidden_states": True}})),
}


@cache
def jobs() -> list[Job]:
    """Groups of 1 to 4 unequal prompts among plain requests; most of them outgrow a block on the way."""
    rng = random.Random(35)
    return [workload.job(rng, size, longest=12) for size in (3, 0, 2, 1, 4, 0)]


@cache
def expected(model: str) -> list[reference.Reference]:
    return exactness.references(model, jobs(), LENGTH)


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_huggingface(runner: Any, tiny_model: Path, name: str) -> None:
    case = CASES[name]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    with runner.open(tiny_model, asynchronous=case.asynchronous, **(SMALL | case.options)) as call:
        answers = call(exactness.generate, jobs(), asked)
        call(engines.assert_all_returned)
        found = call(facts)
    assert found["runner"] == runner.name
    assert found["scheduler"] == ("AsyncGroupScheduler" if case.asynchronous else "GroupScheduler")
    assert (found["preemptions"] > 0) == case.preempts
    assert found["before_the_head"] == (runner.name == "v2" and name == "before_the_head")
    exactness.assert_greedy(jobs(), answers, expected(str(tiny_model)))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_every_operator_equals_huggingface(runner: Any, tiny_model: Path, asynchronous: bool) -> None:
    jobs = workload.operator_jobs(random.Random(7))
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    with runner.open(tiny_model, asynchronous=asynchronous, **SMALL) as call:
        answers = call(exactness.generate, jobs, asked)
        call(engines.assert_all_returned)
    exactness.assert_greedy(jobs, answers, exactness.references(str(tiny_model), jobs, LENGTH))


def test_plain_requests_are_plain_vllm(runner: Any, tiny_model: Path) -> None:
    plain = [Job(TEXT), Job("So it is"), Job("Magic")]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=3)
    found, answers = {}, {}
    for formulas in (True, False):
        with runner.open(tiny_model, formulas=formulas, **SMALL) as call:
            found[formulas] = call(facts)
            answers[formulas] = call(exactness.generate, plain, asked)
    assert answers[True] == answers[False]
    assert found[False]["scheduler"] == "Scheduler"
    if runner.name == "v2":
        assert (found[True]["state"], found[True]["sampler"]) == ("FormulaDefaultModelState", "TyingSampler")
        assert (found[False]["state"], found[False]["sampler"]) == ("DefaultModelState", "Sampler")


def test_beside_other_plugins(runner: Any, tiny_model: Path) -> None:
    """Another plugin's logits processor acts on the formula's row; the operator's worker extension stays."""
    from tests.support import neighbours

    asked = dict(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    processors = ["marith", f"{neighbours.__name__}:Favouring"]
    extension = f"{neighbours.__name__}.Extension"
    with runner.open(
        tiny_model, logits_processors=processors, worker_extension_cls=extension, **SMALL
    ) as call:
        ((answer,),) = call(exactness.generate, [UNION], asked)
        assert call(extension_answers) == ["CPUWorker"]
    assert answer.tokens == [neighbours.FAVOURITE] * 4
    wanted = distributions(tiny_model, UNION, answer.tokens)[:, neighbours.FAVOURITE]
    found = [step[neighbours.FAVOURITE] for step in answer.logprobs]
    assert found == pytest.approx(wanted.tolist(), abs=LOGPROB_TOLERANCE)  # raw ones, as vLLM reports them


# --------------------------------------------------------------------- what a request may ask of the sampler


@pytest.mark.parametrize("job", [LINEAR, UNION], ids=["linear", "union"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logprobs(call: runners.Call, tiny_model: Path, job: Job, temperature: float) -> None:
    answer = completion(call, job, temperature=temperature, max_tokens=8, ignore_eos=True, logprobs=5)
    wanted = distributions(tiny_model, job, answer.tokens)
    for token, found, row in zip(answer.tokens, answer.logprobs, wanted, strict=True):
        assert token in found
        assert len(found) in (5, 6)  # a token from below the first 5 comes on top of them
        for candidate, logprob in found.items():
            assert abs(logprob - float(row[candidate])) < LOGPROB_TOLERANCE
        best = torch.tensor(sorted(found.values(), reverse=True)[:5], dtype=torch.float64)
        assert torch.allclose(best, row.topk(5).values, rtol=0, atol=LOGPROB_TOLERANCE)


@pytest.mark.parametrize(
    "asked",
    [
        dict(presence_penalty=2.0),
        dict(frequency_penalty=1.5),
        dict(presence_penalty=-1.0, frequency_penalty=1.5),
        dict(logit_bias={EOS: 100.0}, min_tokens=4, ignore_eos=False),
    ],
    ids=lambda asked: "+".join(asked),
)
def test_penalties(call: runners.Call, tiny_model: Path, asked: dict[str, Any]) -> None:
    """They count the tokens of the leader, whose row the formula's distribution is in."""
    # Few tokens are allowed, so that some come again and again.
    usual = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, allowed_token_ids=[EOS, *range(300, 310)])
    asked = usual | asked
    job = LINEAR
    answer = completion(call, job, **asked)
    sampler = Sampler(exactness.params_of(job, **asked))
    evaluate = job.reference_formula().evaluate
    wanted = reference.decode(
        str(tiny_model),
        ids_of(job),
        len(answer.tokens),
        lambda logits, so_far: sampler(evaluate(logits), so_far),
    )
    assert answer.tokens == wanted
    assert len(answer.tokens) == (LENGTH if asked["ignore_eos"] else 5)
    assert answer.tokens != completion(call, job, **usual).tokens  # the penalties changed something


@pytest.mark.parametrize("text", ["2*b - a", "2*a - union(b, c)", "intersection(b, c) - 0.4*a"])
def test_grammars(call: runners.Call, tiny_model: Path, text: str) -> None:
    """A masked row times a negative weight would be +inf: the mask has to come after the formula."""
    from vllm.sampling_params import StructuredOutputsParams

    job, pattern = job_of(text), "[abc]{3} [0-9]{2}"
    shape = ["abc"] * 3 + [" "] + ["0123456789"] * 2
    pieces = [tiny.tokenizer().decode([i]) for i in range(tiny.VOCAB)]

    def begins(text: str) -> bool:
        return len(text) <= len(shape) and all(c in s for c, s in zip(text, shape, strict=False))

    def masked(logits: dict[str, torch.Tensor], tokens: list[int]) -> int:
        so_far = tiny.tokenizer().decode(tokens)
        row = job.reference_formula().evaluate(logits)
        for i, piece in enumerate(pieces):
            ends = len(so_far) == len(shape)
            if not (ends if i == EOS else i >= len(tiny.SPECIAL) and begins(so_far + piece)):
                row[i] = -torch.inf
        return int(row.argmax())

    answer = completion(
        call, job, temperature=0, max_tokens=LENGTH, structured_outputs=StructuredOutputsParams(regex=pattern)
    )
    assert len(answer.text) == len(shape)
    assert begins(answer.text)
    assert answer.finish_reason == "stop"
    assert answer.tokens == reference.decode(str(tiny_model), ids_of(job), len(answer.tokens), masked)


# ------------------------------------------------------------------------------------------------ seeds and n


def seeded(call: runners.Call, job: Job, seed: int) -> list[int]:
    return completion(call, job, temperature=1.0, seed=seed, max_tokens=LENGTH, ignore_eos=True).tokens


def test_seeds_do_not_depend_on_the_other_terms_prompts(call: runners.Call) -> None:
    found = []
    for words in (0, 3, 40):
        terms = {"a": {}, "b": {"system": "So " * words}}
        found.append(seeded(call, Job(TEXT, Formula.parse("a + 0.0000001*b", terms)), 7))
    assert found[0] == found[1] == found[2] == seeded(call, Job(TEXT), 7)
    assert len(set(found[0])) > 1


def test_a_formula_of_one_term_is_the_plain_request(call: runners.Call) -> None:
    system = {"a": {"system": "You are an adult."}}
    rendered = Job(f"You are an adult.\n{TEXT}")
    for seed in (1, 2):
        wanted = seeded(call, rendered, seed)
        assert seeded(call, Job(TEXT, Formula.parse("a", system)), seed) == wanted
        assert seeded(call, Job(TEXT, Formula.parse("a", TERMS)), seed) == seeded(call, Job(TEXT), seed)
    assert wanted != seeded(call, rendered, 3)


def test_seeded_groups_beside_others(call: runners.Call) -> None:
    asked = dict(temperature=1.0, seed=11, max_tokens=LENGTH, ignore_eos=True)
    together = call(exactness.generate, [UNION, LINEAR, Job("So"), UNION], asked)
    assert together[0][0].tokens == together[3][0].tokens == seeded(call, UNION, 11)
    assert together[1][0].tokens == seeded(call, LINEAR, 11)


def test_noise_is_that_of_the_leaders_seed_and_position(
    call: runners.Call, runner: Any, tiny_model: Path
) -> None:
    """V2's own rule, applied to the formula's distribution."""
    if runner.name == "v1":
        pytest.skip("V1 draws its noise from a generator; tests/engine/test_sampling.py")
    for job in (LINEAR, UNION):
        tokens = seeded(call, job, 23)
        rows = distributions(tiny_model, job, tokens)
        # A token's noise has the position of the token before it.
        first = len(ids_of(job)[job.reference_formula().leader]) - 1
        assert call(chosen_by_noise, rows, 23, list(range(first, first + len(tokens)))) == tokens


def test_several_completions(call: runners.Call) -> None:
    """vLLM's own rule: the i-th completion has the seed plus i."""
    asked = dict(n=2, temperature=1.0, seed=40, max_tokens=LENGTH, ignore_eos=True)
    (answers,) = call(exactness.generate, [UNION], asked)
    assert [a.tokens for a in answers] == [seeded(call, UNION, 40), seeded(call, UNION, 41)]
    assert answers[0].tokens != answers[1].tokens


# ------------------------------------------------------------------------------------------------ odd shapes


def test_prompts_of_one_token(call: runners.Call, tiny_model: Path) -> None:
    """Nothing of them can be held back until the other members are ready."""
    empty = {"a": {}, "b": {"system": "You are a lawyer."}, "c": {"prompt": ""}}
    odd = [
        Job("", Formula.parse("a", empty), {"a": ""}),
        Job("", Formula.parse("a - 0.4*b", empty), {"a": "", "b": "You are a lawyer.\n"}),
        Job(
            TEXT,
            Formula.parse("a + 0.5*union(b, c)", empty),
            {"a": TEXT, "b": f"You are a lawyer.\n{TEXT}", "c": ""},
        ),
    ]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    wanted = exactness.references(str(tiny_model), [*odd, UNION], LENGTH)
    exactness.assert_greedy([*odd, UNION], call(exactness.generate, [*odd, UNION], asked), wanted)


# ------------------------------------------------------------------------------------- what stays as it is


def test_aborted_groups_leave_the_others_alone(call: runners.Call, tiny_model: Path) -> None:
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    (wanted,) = exactness.references(str(tiny_model), [UNION], LENGTH)
    assert call(abort_one_of_three, UNION, asked) == [wanted.tokens] * 2


def test_prompt_logprobs_of_plain_requests(call: runners.Call, tiny_model: Path) -> None:
    """V2 computes them with the function that fuses."""
    ids = tiny.tokenizer()(TEXT).input_ids
    found = call(prompt_logprobs_beside, UNION, TEXT)
    with torch.inference_mode():
        logits = reference.load(str(tiny_model))(torch.tensor([ids])).logits[0].double()
    wanted = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    assert found == pytest.approx(wanted, abs=LOGPROB_TOLERANCE)


def test_nan_in_one_term_fails_its_request_alone(call: runners.Call, tiny_model: Path) -> None:
    """Its blocks, too, are no danger to those who get them next."""
    bad = Job(TEXT, Formula.parse("a - 0.5*union(a, b)", TERMS | {"b": {"system": poison.CHARACTER}}))
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    call(poison.failed)
    for jobs in ([UNION, Job(TEXT)], [Job(TEXT), UNION]):
        (failed,), *others = call(poison.generate, [bad, *jobs], asked)
        assert failed.finish_reason == "error"
        assert failed.tokens == []
        assert call(poison.failed) == {"logits": 1}
        exactness.assert_greedy(jobs, others, exactness.references(str(tiny_model), jobs, LENGTH))

"""Formulas that draft, through vLLM's V1 runner, against a plain Hugging Face float32 loop."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from numba import njit
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode import ngram_proposer

from tests.support import constituents as several
from tests.support import engines, exactness, reference, workload
from tests.support.statistics import CLEARLY_WRONG, SIGNIFICANCE, chi_square
from vllm_marith import Formula
from vllm_marith.engine.group import FIGURES
from vllm_marith.language.names import FREE_DRAFTERS

LENGTH = 32
SEED = 3
FORMULAS: dict[str, tuple[str, dict[str, Any]]] = {
    "a small model drafts": ("superseded(s, a)", {"s": {"model": "small"}}),
    "a term lags": ("a + 0.5*b", {"b": {"system": "", "speculative_factor": 4}}),
    "two levels, three models": (
        "a + 0.6*union(a, b) - 0.2*c",
        {
            "b": {"system": "", "speculative_factor": 2},
            "c": {"system": "", "speculative_factor": 4, "model": "qwen"},
        },
    ),
    "the leader lags": (
        "b + 0.5*a",
        {"b": {"system": "", "speculative_factor": 3}, "a": {"model": "small"}},
    ),
    "drafts for a formula": ("superseded(s, 2*a - b)", {"s": {"model": "qwen"}, "b": {"system": ""}}),
    "nothing lags": ("2*a - 0.5*b", {"b": {"system": ""}}),
}


def job_of(rng: random.Random, name: str) -> workload.Job:
    text, terms = FORMULAS[name]
    heads = {n: workload.words(rng, 1, 12) for n, term in terms.items() if "system" in term}
    formula = Formula.parse(
        text, {n: term | ({"system": heads[n]} if n in heads else {}) for n, term in terms.items()}
    )
    asked = workload.words(rng, 2, 10)
    prompts = {n: f"{heads[n]}\n{asked}" if n in heads else asked for n in formula.terms}
    models = {n: term["model"] for n, term in terms.items() if "model" in term}
    return workload.Job(asked, formula, prompts, rng.randint(0, 2), models)


@cache
def jobs() -> list[workload.Job]:
    """Every formula twice, and plain requests between them."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    return [job_of(rng, name) if name else workload.job(rng, 0) for name in [*FORMULAS, "", *FORMULAS, ""]]


def copying() -> list[workload.Job]:
    """Formulas that suffixes draft for, where there are some."""
    texts = ["one two one two one", "So it is. So it"]
    formula = Formula.parse("superseded(s, a + 0.5*b)", {"s": {"model": "suffix"}, "b": {"system": ""}})
    return [workload.Job(text, formula, {"a": text, "b": f"\n{text}"}) for text in texts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return several.make(tmp_path_factory.mktemp("speculation"), sharpness=2.5)


@cache
def expected(base: str, constituents: tuple[tuple[str, str], ...]) -> list[reference.Reference]:
    return exactness.references(base, jobs(), LENGTH, dict(constituents))


def drafts(llm: Any) -> tuple[int, int]:
    """(drafted, accepted) since the last call."""
    figures = engines.scheduler(llm).take_figures()
    return sum(n for _, n in figures["drafted"]), sum(n for _, n in figures["accepted"])


def runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def rounds(llm: Any) -> Any:
    """The worker's, once something has drafted."""
    return runner(llm).marith_rounds


CASES: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small_steps": dict(max_num_batched_tokens=24, max_num_seqs=24),
    "small_cache": dict(max_model_len=128, num_gpu_blocks_override=18),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_huggingface(case: str, models: tuple[str, dict[str, str]]) -> None:
    base, constituents = models
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    everything = [*jobs(), *copying()]
    with several.engine(base, constituents, marith={"speculative": 3}, **CASES[case]) as llm:
        scheduler = engines.scheduler(llm)
        answers = exactness.generate(llm, everything, asked)
        preempted = scheduler.figures.preempted
        drafted, accepted = drafts(llm)
        if find_spec("arctic_inference"):
            # Whoever was preempted is remembered all the same, once, and with nobody else.
            assert len(rounds(llm)._suffixes._trees.cached_requests) == len(copying())
    wanted = [*expected(base, tuple(constituents.items())), *exactness.references(base, copying(), LENGTH)]
    exactness.assert_greedy(everything, answers, wanted)
    assert (preempted > 0) == (case == "small_cache")
    assert 0 < accepted < drafted


OWN: dict[str, dict[str, Any]] = {
    "ngram": dict(num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3),
    "suffix": dict(num_speculative_tokens=3),
}


@pytest.mark.parametrize("method", OWN)
def test_an_operators_own_drafts_are_for_all(
    method: str, models: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own speculation, for plain requests and for formulas as for their leaders."""
    compiled = njit(parallel=True)(ngram_proposer.batch_propose_numba.py_func)
    monkeypatch.setattr(ngram_proposer, "batch_propose_numba", compiled)
    if method == "suffix":
        pytest.importorskip("arctic_inference", reason="suffixes need arctic-inference, see docs/serving.md")
    base, _ = models
    mine = [job for job in jobs() if not job.models]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    with engines.engine(base, speculative_config={"method": method, **OWN[method]}) as llm:
        assert len(compiled.signatures) == (method == "ngram")  # before anybody asks
        answers = exactness.generate(llm, mine, asked)
        drafted, _ = drafts(llm)
        engines.assert_all_returned(llm)
        if method == "suffix":
            remembered = runner(llm).drafter.suffix_cache.cached_requests
            # vLLM takes in what is said, once: of followers nothing.
            assert len(remembered) == len(mine)
    exactness.assert_greedy(mine, answers, exactness.references(base, mine, LENGTH))
    assert drafted
    assert len(compiled.signatures) == (method == "ngram")


# ------------------------------------------------------------------------------ one engine for the rest


@pytest.fixture(scope="module")
def engine(models: tuple[str, dict[str, str]]) -> Iterator[Any]:
    base, constituents = models
    settings = several.settings(constituents, max_speculative_tokens=8, speculative=3)
    with engines.engine(base, additional_config=settings, max_num_seqs=96) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    torch.manual_seed(0)
    drafts(engine)
    yield engine
    generate(engine, workload.Job("It"), max_tokens=1)  # ids of aborted followers are kept for one more step
    engines.assert_all_returned(engine)


def one(name: str) -> workload.Job:
    return job_of(random.Random(SEED), name)


def generate(llm: Any, job: workload.Job, number: int = 1, **asked: Any) -> list[Any]:
    params = exactness.params_of(job, **asked)
    outputs = llm.generate([job.text] * number, [params] * number, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


Law = dict[tuple[int, ...], float]


def laws(
    models: tuple[str, dict[str, str]],
    job: workload.Job,
    allowed: list[int],
    count: int,
    formula: Formula,
    heat: float = 1.0,
) -> Law:
    """The probability of each sequence of so many of the allowed tokens."""
    ids, paths = exactness.ids_of(job), exactness.models_of(job, *models)

    def following(tokens: tuple[int, ...]) -> dict[int, float]:
        with torch.inference_mode():
            sequences = {term: torch.tensor([ids[term] + list(tokens)]) for term in formula.terms}
            rows = {t: reference.load(paths[t])(ids_).logits[0, -1] for t, ids_ in sequences.items()}
            likely = (formula.evaluate(rows, dtype=torch.float64)[allowed] / heat).softmax(-1)
        return dict(zip(allowed, likely.tolist(), strict=True))

    law: Law = {(): 1.0}
    for _ in range(count):
        law = {(*t, x): p * q for t, p in law.items() for x, q in following(t).items()}
    return law


def p_value(found: Counter[tuple[int, ...]], law: Law) -> float:
    outcomes = sorted(law)
    assert found.keys() <= set(outcomes)
    samples = [place for place, outcome in enumerate(outcomes) for _ in range(found[outcome])]
    return chi_square(samples, torch.tensor([law[outcome] for outcome in outcomes]).log())


@pytest.mark.parametrize(
    ("name", "speculative", "number"),
    [("a small model drafts", 2, 5000), ("two levels, three models", None, 2000)],
)
def test_sequences_are_distributed_as_the_formula_says(
    llm: Any, models: tuple[str, dict[str, str]], name: str, speculative: int | None, number: int
) -> None:
    """Four tokens of two outcomes each: a step, then a round of two drafts, and what is left after it."""
    count, allowed = 4, [300, 301]
    job = one(name)
    asked = dict(temperature=1.0, allowed_token_ids=allowed, max_tokens=count, ignore_eos=True)
    completions = generate(llm, job, number, speculative=speculative, **asked)
    found = Counter(tuple(completion.token_ids) for completion in completions)
    drafted, accepted = drafts(llm)
    assert 0 < accepted < drafted
    law_of = functools.partial(laws, models, job, allowed, count)
    assert p_value(found, law_of(job.reference_formula())) > SIGNIFICANCE
    # What the drafts alone would have given is told apart: the test can fail.
    drafter = "s" if name.startswith("a small") else "a"
    assert p_value(found, law_of(Formula.parse(drafter))) < CLEARLY_WRONG


@pytest.mark.parametrize("model", FREE_DRAFTERS)
def test_copied_sequences_are_distributed_as_the_formula_says(
    llm: Any, models: tuple[str, dict[str, str]], model: str
) -> None:
    """As above, where vLLM's own rejection sampler checks what was copied."""
    if model == "suffix":
        suffixes(llm)
    count, allowed, heat, number = 4, [300, 301], 0.6, 1500
    text = llm.get_tokenizer().decode([300, 301, 301, 300] * 4)
    terms = {"s": {"model": model}, "b": {"system": ""}}
    job = workload.Job(text, Formula.parse("superseded(s, a + 0.5*b)", terms), {"a": text, "b": f"\n{text}"})
    asked = dict(temperature=heat, allowed_token_ids=allowed, max_tokens=count, ignore_eos=True)
    completions = generate(llm, job, number, speculative=3, **asked)
    found = Counter(tuple(completion.token_ids) for completion in completions)
    drafted, accepted = drafts(llm)
    assert 0 < accepted < drafted
    formula = Formula.parse("a + 0.5*b")
    assert p_value(found, laws(models, job, allowed, count, formula, heat)) > SIGNIFICANCE
    assert p_value(found, laws(models, job, allowed, count, formula, heat=1.0)) < CLEARLY_WRONG


SURFACE: dict[str, dict[str, Any]] = {
    "log-probabilities": dict(logprobs=5),
    "penalties": dict(presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.2),
    "bias and minimum": dict(logit_bias={300: 4.0, 301: 3.0}, min_tokens=9),
    "few tokens": dict(allowed_token_ids=list(range(300, 330)), frequency_penalty=0.5),
    "stop": dict(stop=["e"], include_stop_str_in_output=True),
    "end": dict(ignore_eos=False, logit_bias={2: 14.0}, min_tokens=5),
    "one token": dict(max_tokens=1),
}


@pytest.mark.parametrize("asked", SURFACE.values(), ids=list(SURFACE))
def test_nothing_changes_but_the_speed(llm: Any, asked: dict[str, Any]) -> None:
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True) | asked
    for name in FORMULAS:
        job = one(name)
        (plain,) = generate(llm, job, speculative="off", **asked)
        assert drafts(llm) == (0, 0)
        (found,) = generate(llm, job, **asked)
        drafts(llm)
        assert found.token_ids == plain.token_ids
        assert (found.text, found.finish_reason) == (plain.text, plain.finish_reason)
        assert found.stop_reason == plain.stop_reason
        for one_step, other in zip(found.logprobs or [], plain.logprobs or [], strict=True):
            assert one_step.keys() == other.keys()
            for token, logprob in one_step.items():
                assert logprob.logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_seeds(llm: Any) -> None:
    """The same answer again, whoever is beside; and plain requests draw what they draw without drafts."""
    job, plain = one("a small model drafts"), workload.Job("The value of")
    asked = dict(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)
    (first,) = generate(llm, job, speculative=3, **asked)
    (alone,) = generate(llm, plain, **asked)
    assert drafts(llm)[1] > 0
    params = [
        job.formula.sampling_params(speculative=3, **asked),
        SamplingParams(**asked),
        one("two levels, three models").formula.sampling_params(temperature=0.8, max_tokens=30),
    ]
    again, beside, _ = llm.generate([job.text, plain.text, "So"], params, use_tqdm=False)
    assert again.outputs[0].token_ids == first.token_ids
    assert beside.outputs[0].token_ids == alone.token_ids


def test_an_abort_between_draft_and_check(llm: Any) -> None:
    core = llm.llm_engine
    for step in range(3, 7):
        core.add_request("gone", "It is", one("a small model drafts").formula.sampling_params(max_tokens=64))
        core.add_request("stays", "So", one("a term lags").formula.sampling_params(max_tokens=12))
        for _ in range(step):
            core.step()
        core.abort_request(["gone"])
        while core.has_unfinished_requests():
            core.step()
        engines.assert_all_returned(llm)
    assert drafts(llm)[0] > 0


@pytest.mark.parametrize(
    ("text", "factors"),
    [("superseded(g, 2*a - b)", (1, 1)), ("superseded(g, a) + 0.3*b", (3, 5))],
    ids=["for the formula", "for its first level"],
)
def test_ngrams_draft(llm: Any, text: str, factors: tuple[int, int]) -> None:
    """The paper's superseded(A, M) with a free A: vLLM's proposer, checked by the formula or by a level."""
    a, b = ({"speculative_factor": factor} for factor in factors)
    formula = Formula.parse(text, {"g": {"model": "ngram"}, "a": a, "b": {"system": "Count.", **b}})
    text = "one two three four five six seven eight " * 4
    asked = dict(temperature=0, max_tokens=48, ignore_eos=True, allowed_token_ids=list(range(300, 306)))
    plain, found = (
        llm.generate([text], formula.sampling_params(speculative=how, **asked), use_tqdm=False)[0].outputs[0]
        for how in ("off", 4)
    )
    drafted, accepted = drafts(llm)
    assert found.token_ids == plain.token_ids
    assert 0 < accepted <= drafted


def suffixes(llm: Any) -> Any:
    """The worker's."""
    pytest.importorskip("arctic_inference", reason="suffixes need arctic-inference, see docs/serving.md")
    generate(llm, one("a small model drafts"), max_tokens=2)  # from here on there are rounds
    rounds(llm).__dict__.pop("_suffixes", None)  # what other tests have left behind
    drafts(llm)
    return rounds(llm)._suffixes


@pytest.mark.parametrize(
    ("text", "factors"),
    [("superseded(s, 2*a - b)", (1, 1)), ("superseded(s, a) + 0.3*b", (3, 5))],
    ids=["for the formula", "for its first level"],
)
def test_suffixes_draft_from_earlier_answers(llm: Any, text: str, factors: tuple[int, int]) -> None:
    """Greedy answers stay what they are, beside plain requests and with an abort between; and a second time
    they take fewer calls than the first, which has only its own text to copy."""
    memory = suffixes(llm)
    a, b = ({"speculative_factor": factor} for factor in factors)
    formula = Formula.parse(text, {"s": {"model": "suffix"}, "a": a, "b": {"system": "Count.", **b}})
    asked = dict(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [f"The value of {word} is" for word in ("one", "two", "three")]
    core = llm.llm_engine

    def answers(how: Any) -> list[list[int]]:
        params = [formula.sampling_params(speculative=how, **asked)] * 3 + [SamplingParams(**asked)]
        outputs = llm.generate([*prompts, prompts[0]], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def calls() -> int:
        core, worker = llm.collective_rpc(FIGURES)
        return sum(number for _, number in [*core["calls"], *worker["calls"]])

    plain = answers("off")
    assert drafts(llm) == (0, 0)
    core.add_request("gone", prompts[0], formula.sampling_params(speculative=4, max_tokens=64))
    for _ in range(5):
        core.step()
    core.abort_request(["gone"])
    calls()
    assert answers(4) == plain
    first = calls()
    assert answers(4) == plain
    assert calls() < first
    # One answer of each leader that drafted is remembered; of followers and of plain requests there is none.
    assert len(memory._trees.cached_requests) == 1 + 3 + 3
    assert answers("off") == plain
    # What the last step ended is let go by the next one that drafts.
    llm.generate(prompts[:1], formula.sampling_params(speculative=4, max_tokens=2), use_tqdm=False)
    assert len(memory._trees.active_requests) == len(memory._texts) == 1


def test_an_answer_to_a_seed_does_not_depend_on_earlier_ones(llm: Any) -> None:
    memory = suffixes(llm)
    formula = Formula.parse("superseded(s, a)", {"s": {"model": "suffix"}})
    asked = dict(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True, allowed_token_ids=[300, 301])
    found = []
    for _ in range(2):
        params = formula.sampling_params(speculative=4, **asked)
        found.append(llm.generate(["So"], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert found[0] == found[1]
    assert drafts(llm)[0] > 0
    assert not memory._trees.cached_requests


def test_what_does_not_pay_is_left_out(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto", a request whose drafter does not pay comes without it, and answers the same."""
    scheduler = engines.scheduler(llm)
    job, asked = one("drafts for a formula"), dict(temperature=0, max_tokens=12, ignore_eos=True)
    (plain,) = generate(llm, job, speculative="off", **asked)
    sizes = []
    add = scheduler._add_group
    monkeypatch.setattr(scheduler, "_add_group", lambda group: (sizes.append(len(group.members)), add(group)))
    for pays, size in ((True, 3), (False, 2)):
        monkeypatch.setattr(scheduler._pacing, "wants_drafters", lambda key, pays=pays: pays)
        (found,) = generate(llm, job, speculative="auto", **asked)
        assert found.token_ids == plain.token_ids
        assert sizes.pop() == size


def test_explicit_drafts_that_cannot_be_are_refused(llm: Any) -> None:
    with pytest.raises(VLLMValidationError, match="superseded"):
        generate(llm, one("nothing lags"), speculative=2)


def test_vllm_counts_a_group_once(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own metrics of speculation: drafts of the leader's, not of every member."""
    counted: list[tuple[int, int]] = []

    def count(self: Any, before: Any, drafted: int, accepted: int, invalid: Any, request_id: str) -> Any:
        counted.append((drafted, accepted))
        return before

    monkeypatch.setattr(Scheduler, "make_spec_decoding_stats", count)
    generate(llm, one("two levels, three models"), temperature=0, max_tokens=20, ignore_eos=True)
    drafted, accepted = drafts(llm)
    assert sum(number for number, _ in counted) == drafted > 0
    assert sum(number for _, number in counted) == accepted


def test_calls_are_counted_by_model(llm: Any) -> None:
    """A drafting model runs for each token that it drafts, and with the others in every step."""
    job = one("a small model drafts")
    models = {term.model or "base" for term in job.formula.terms.values()}
    count = 24

    def calls(speculative: int | str) -> tuple[Counter[str], int, int]:
        llm.collective_rpc(FIGURES)
        # Of one token, every draft stands.
        asked = dict(temperature=0, allowed_token_ids=[300], max_tokens=count, ignore_eos=True)
        generate(llm, job, speculative=speculative, **asked)
        core, worker = llm.collective_rpc(FIGURES)
        found: Counter[str] = Counter()
        for (_, name), number in [*core["calls"], *worker["calls"]]:
            found[name] += number
        return found, sum(n for _, n in core["steps"]), sum(n for _, n in core["drafted"])

    plain, _, _ = calls("off")
    (large,) = plain
    assert plain[large] == count
    found, steps, drafted = calls(3)
    assert found.keys() == models
    (small,) = models - {large}
    assert found[large] == steps < count / 2
    assert found[small] >= steps + drafted  # what was drafted last need not have been checked

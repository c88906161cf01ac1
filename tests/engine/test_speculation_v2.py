"""Formulas that draft, through vLLM's V2 model runner, against a plain Hugging Face float32 loop.

V2 runs in Triton's interpreter, in a child process (`tests.support.runners`): few rows and few tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.test_speculation import FORMULAS, job_of
from tests.support import adapters, engines, exactness, reference, runners, workload
from tests.support import constituents as several
from tests.support.statistics import CLEARLY_WRONG, SIGNIFICANCE, chi_square
from vllm_marith import Formula
from vllm_marith.engine.group import FIGURES
from vllm_marith.engine.worker.speculation.ngrams_v2 import NgramRounds

LENGTH = 22  # so many that groups outgrow their blocks
SEED = 3
PAIR = [368, 369]  # of which a formula and its drafts think differently; top-k is not for the interpreter
Models = tuple[str, dict[str, str]]


@cache
def jobs() -> list[workload.Job]:
    """Every formula, and a plain request between them."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    return [job_of(rng, name) if name else workload.job(rng, 0) for name in ["", *FORMULAS]]


# ------------------------------------------------------------- functions of an engine, called where it lives


def facts(llm: Any) -> dict[str, Any]:
    """What tells an engine from another, and the drafts since the last call."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    preempted = core.scheduler.figures.preempted
    figures, drafting = llm.collective_rpc(FIGURES)  # which count anew from here
    return {
        "runner": "v2" if hasattr(runner, "model_state") else "v1",
        "preempted": preempted,
        "drafted": sum(n for _, n in figures["drafted"]),
        "accepted": sum(n for _, n in figures["accepted"]),
        "drafting calls": sum(n for _, n in drafting["calls"]),
    }


def remembered(llm: Any) -> tuple[int, int]:
    """(texts that are followed, answers that are remembered) for `suffix`."""
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    trees = runner.model_state.rounds._suffixes._trees
    return len(trees.active_requests), len(trees.cached_requests)


def completions(
    llm: Any, jobs: list[workload.Job], speculative: Any, asked: dict[str, Any]
) -> tuple[list[tuple[list[int], Any, list[dict[int, float]]]], dict[str, Any]]:
    """(token ids, why it ended, log-probabilities of each token) of each request; and `facts`."""
    from vllm import SamplingParams

    params = [
        job.formula.sampling_params(speculative=speculative, **asked)
        if job.formula
        else SamplingParams(**asked)
        for job in jobs
    ]
    outputs = llm.generate([job.text for job in jobs], params, use_tqdm=False)
    found = [
        (
            list(answer.token_ids),
            (answer.finish_reason, answer.stop_reason),
            [{t: p.logprob for t, p in step.items()} for step in answer.logprobs or []],
        )
        for answer in (output.outputs[0] for output in outputs)
    ]
    return found, facts(llm)


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def runner() -> Iterator[Any]:
    with runners.start("v2") as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return several.make(tmp_path_factory.mktemp("speculation"), sharpness=2.5)


def options(models: Models) -> dict[str, Any]:
    settings = several.settings(models[1], max_speculative_tokens=4, speculative=3)
    # Groups are preempted, with drafts of theirs that have not been checked.
    return dict(additional_config=settings, max_num_seqs=24, max_model_len=128, num_gpu_blocks_override=12)


@pytest.fixture(scope="module")
def call(runner: Any, models: Models) -> Iterator[runners.Call]:
    with runner.open(models[0], **options(models)) as call:
        assert call(facts)["runner"] == "v2"
        yield call
        call(engines.assert_all_returned)


@cache
def expected(base: str, constituents: tuple[tuple[str, str], ...]) -> list[reference.Reference]:
    return exactness.references(base, jobs(), LENGTH, dict(constituents))


# ---------------------------------------------------------------------------------------------------- tests


def test_adapters(runner: Any, tiny_model: Path, tmp_path: Path) -> None:
    """The first test: an engine of its own, before that of all others."""
    paths = {name: str(adapters.make(tiny_model, tmp_path / name, seed=n)) for n, name in enumerate("vw")}
    terms = {"a": {"adapter": "v"}, "b": {"adapter": "w", "speculative_factor": 3}, "c": {}}
    formulas = [Formula.parse(text, terms) for text in ("a + 0.5*b", "c + 0.4*b")]
    jobs = [workload.Job("The value is", formula) for formula in formulas] + [workload.Job("So")]
    asked = dict(temperature=0, max_tokens=9, ignore_eos=True)
    settings = {"marith": {"speculative": 2}}
    lora = dict(enable_lora=True, max_loras=2, max_lora_rank=8)
    with runner.open(
        tiny_model, additional_config=settings, max_num_seqs=8, max_model_len=128, **lora
    ) as call:
        call(adapters.load, paths)
        plain, none = call(completions, jobs, "off", asked)
        found, some = call(completions, jobs, 2, asked)
        call(engines.assert_all_returned)
    assert found == plain
    assert none["drafted"] == 0 < some["accepted"]


def test_an_operators_own_ngrams_draft_for_all(runner: Any, models: Models) -> None:
    """vLLM's own speculation, for plain requests and for formulas as for their leaders."""
    base, _ = models
    mine = [job for job in jobs() if not job.models]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    own = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
    with runner.open(base, speculative_config=own, max_num_seqs=8, max_model_len=128) as call:
        answers = call(exactness.generate, mine, asked)
        found = call(facts)
        drawing = dict(temperature=1.0, allowed_token_ids=PAIR, seed=7, max_tokens=10, ignore_eos=True)
        beside, some = call(completions, mine, "off", drawing)
        alone, _ = call(completions, mine[-1:], "off", drawing)
        call(engines.assert_all_returned)
    exactness.assert_greedy(mine, answers, exactness.references(base, mine, LENGTH))
    assert beside[-1:] == alone
    assert found["runner"] == "v2"
    assert found["drafted"]
    assert 0 < some["accepted"] < some["drafted"]


def test_followers_have_their_leaders_drafts() -> None:
    """And nobody else has others than vLLM's proposer gave; of groups that do not step together, neither."""
    rounds = NgramRounds()
    own = torch.arange(10).reshape(5, 2)
    runner: Any = SimpleNamespace(speculator=SimpleNamespace())
    plan: Any = SimpleNamespace(joint=[SimpleNamespace(rows=[3, 0, 2])])
    for joint, expected in ((plan, [[6, 7], [2, 3], [6, 7], [6, 7], [8, 9]]), (None, own.tolist())):
        rounds.begin_step(runner, None)
        assert runner.speculator.marith_rounds is rounds
        if joint is not None:
            assert rounds.sample(joint, lambda *given: given, "logits", "batch") == ("logits", "batch")  # type: ignore[arg-type]
        assert rounds.propose(None, None, own.clone).tolist() == expected  # type: ignore[arg-type]


def test_greedy_equals_huggingface(call: runners.Call, models: Models) -> None:
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    answers = call(exactness.generate, jobs(), asked)
    exactness.assert_greedy(jobs(), answers, expected(models[0], tuple(models[1].items())))
    found = call(facts)
    assert 0 < found["accepted"] < found["drafted"]
    assert found["preempted"] > 0


SURFACE: dict[str, dict[str, Any]] = {
    "penalties": dict(presence_penalty=0.6, frequency_penalty=0.4, repetition_penalty=1.2, logprobs=3),
    "bias and minimum": dict(logit_bias={2: 14.0, 300: 4.0}, min_tokens=5, ignore_eos=False),
    # The scheduler cuts drafts that the grammar forbids, and with them what the partial formula drew.
    "grammar": dict(structured_outputs=StructuredOutputsParams(regex="[^ae]*"), max_tokens=20),
    "few tokens": dict(allowed_token_ids=list(range(300, 304)), frequency_penalty=1.5),
}


@pytest.mark.parametrize("asked", SURFACE.values(), ids=list(SURFACE))
def test_nothing_changes_but_the_speed(call: runners.Call, asked: dict[str, Any]) -> None:
    asked = dict(temperature=0, max_tokens=10, ignore_eos=True) | asked
    drafting = jobs()[1:4]
    plain, none = call(completions, drafting, "off", asked)
    found, some = call(completions, drafting, 3, asked)
    assert none["drafted"] == 0 < some["accepted"]
    for one, other in zip(found, plain, strict=True):
        assert one[:2] == other[:2]
        for step, wanted in zip(one[2], other[2], strict=True):
            assert step == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "factors", "calls"),
    [("superseded(g, 2*a - b)", (1, 1), 0), ("superseded(g, a) + 0.3*b", (3, 5), 1)],
    ids=["for the formula", "for its first level"],
)
def test_ngrams_draft(call: runners.Call, text: str, factors: tuple[int, int], calls: int) -> None:
    """calls: of the first level's one member for a drafted token, if n-grams drafted none for it."""
    a, b = ({"speculative_factor": factor} for factor in factors)
    formula = Formula.parse(text, {"g": {"model": "ngram"}, "a": a, "b": {"system": "Count.", **b}})
    job = workload.Job("one two three four five six seven eight " * 2, formula)
    asked = dict(temperature=0, max_tokens=24, ignore_eos=True, allowed_token_ids=PAIR)
    plain, none = call(completions, [job], "off", asked)
    found, some = call(completions, [job], 4, asked)
    assert found == plain
    assert none["drafted"] == 0 < some["accepted"]
    assert (some["drafting calls"] > 0) == (calls > 0)
    assert some["drafting calls"] <= 0.8 * calls * some["drafted"], some


def test_suffixes_draft_from_earlier_answers(call: runners.Call) -> None:
    """A second answer has what the first has left behind; what has ended is let go."""
    pytest.importorskip("arctic_inference", reason="suffixes need arctic-inference, see docs/serving.md")
    formula = Formula.parse("superseded(s, 2*a - b)", {"s": {"model": "suffix"}, "b": {"system": "Count."}})
    drafting = [workload.Job("The value of one is", formula), workload.Job("So")]
    asked = dict(temperature=0, max_tokens=16, ignore_eos=True)
    plain, none = call(completions, drafting, "off", asked)
    found, some = call(completions, drafting, 4, asked)
    again, more = call(completions, drafting, 4, asked)
    assert found == again == plain
    assert none["drafted"] == 0
    assert some["accepted"] < more["accepted"]
    assert call(remembered) == (0, 2)


def test_seeds(call: runners.Call) -> None:
    """The same answer again, whoever is beside; and plain requests draw what they draw without drafts."""
    plain, *drafting = jobs()[0], jobs()[2], jobs()[1]
    asked = dict(temperature=1.0, allowed_token_ids=PAIR, seed=7, max_tokens=10, ignore_eos=True)
    (first,), facts = call(completions, drafting[:1], 3, asked)
    (alone,), _ = call(completions, [plain], None, asked)
    assert facts["accepted"] > 0
    (beside, again, _), _ = call(completions, [plain, *drafting], 3, asked)
    assert (again, beside) == (first, alone)
    assert call(completions, drafting[:1], 3, asked | dict(seed=8))[0] != [first]


def test_sequences_are_distributed_as_the_formula_says(call: runners.Call, models: Models) -> None:
    """Three tokens of two outcomes each: one step, then a draft and its check."""
    base, constituents = models
    count, number = 3, 96
    job = jobs()[2]
    asked = dict(temperature=1.0, allowed_token_ids=PAIR, max_tokens=count, ignore_eos=True)
    answers, found = call(completions, [job] * number, 3, asked)
    assert 0 < found["accepted"] < found["drafted"]
    formula, ids = job.reference_formula(), exactness.ids_of(job)
    paths = exactness.models_of(job, base, constituents)

    def rows(tokens: tuple[int, ...]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return {
                term: reference.load(paths[term])(torch.tensor([ids[term] + list(tokens)])).logits[0, -1]
                for term in formula.terms
            }

    def law(drafts: bool) -> dict[tuple[int, ...], float]:
        """drafts: as if what is drafted, the second token, were never checked."""
        found: dict[tuple[int, ...], float] = {(): 1.0}
        for place in range(count):
            partial = Formula.parse("a") if drafts and place == 1 else formula
            longer: dict[tuple[int, ...], float] = {}
            for tokens, p in found.items():
                energies = rows(tokens)
                scores = partial.evaluate({name: energies[name] for name in partial.terms})[PAIR]
                longer |= {
                    (*tokens, token): p * q
                    for token, q in zip(PAIR, scores.softmax(-1).tolist(), strict=True)
                }
            found = longer
        return found

    expected, unchecked = law(drafts=False), law(drafts=True)
    outcomes = sorted(expected)
    counted = Counter(tuple(tokens) for tokens, _, _ in answers)
    assert set(counted) <= set(outcomes)
    samples = [place for place, outcome in enumerate(outcomes) for _ in range(counted[outcome])]
    assert chi_square(samples, torch.tensor([expected[o] for o in outcomes]).log()) > SIGNIFICANCE
    assert chi_square(samples, torch.tensor([unchecked.get(o, 0.0) for o in outcomes]).log()) < CLEARLY_WRONG

"""A formula that cannot be computed fails its own request, and nobody else notices."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine import test_worker as steps
from tests.support import engines, exactness, poison, runners, workload
from tests.support.workload import Job
from vllm_marith import Formula
from vllm_marith.engine.group import KEY, Cause, ClassifierTerm, GroupSpec, member_tags
from vllm_marith.engine.worker import rows as rows_module
from vllm_marith.engine.worker.failures import StepFailures
from vllm_marith.engine.worker.rows import JointGroup
from vllm_marith.engine.worker.runner_v2 import StepGroups
from vllm_marith.engine.worker.scoring import PromptScorer
from vllm_marith.plan import decode, encode, lower

CPU = torch.device("cpu")
VOCAB = 64
FORMULAS = (
    "2*a - b",
    "a - 0.5*union(b, c)",
    "intersection(a, b)",
    "plausible(a - 0.5*b, a, 0.1) + 0.2*c",
    "topk(normalize(2*a - b), 5) + 0.1*c",
    "mixture(0.5: a, 0.3: b, 0.2: uniform)",
    "a + schedule(0: 0, 50: 1)*b",
)


def members(name: str, formula: str) -> list[tuple[str, dict[str, Any]]]:
    """(request id, extra_args) of a group's members."""
    plan = lower(Formula.parse(formula))
    size = len(plan.terms)
    tags = member_tags(name, GroupSpec([[1]] * (size - 1), encode(plan, range(size))), prompt_length=1)
    return [(f"{name}-{tag.index}" if tag.index else name, {KEY: tag.to_wire()}) for tag in tags]


def step(requests: list[tuple[str, dict[str, Any] | None]], logits: torch.Tensor, **options: Any) -> Any:
    """(the step's logits, its failures, the tokens that are drawn greedily)."""
    groups = StepGroups(CPU, **options)
    for request_id, args in requests:
        groups.add_request(request_id, args)
    ids = [request_id for request_id, _ in requests]
    groups.begin_step(steps.batch_of(ids, [9] * len(ids), [9] * len(ids)), steps.unread)
    fused = groups.compute_logits(lambda hidden: hidden, logits)
    sampled = fused.argmax(-1, keepdim=True)
    groups.tie(sampled)
    return fused, groups.take_failures(), sampled


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_one_bad_row_fails_its_group_alone(data: st.DataObject) -> None:
    """Whatever the formula does with the row, wherever the value stands, and whatever else is in the step."""
    formulas = data.draw(st.lists(st.sampled_from(FORMULAS), min_size=1, max_size=4))
    requests: list[tuple[str, dict[str, Any] | None]] = [("plain", None)]
    for i, formula in enumerate(formulas):
        requests += members(f"g{i}", formula)
    requests = data.draw(st.permutations(requests))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = 4 * torch.randn(len(requests), VOCAB, generator=generator)
    logits[:, 0] = -torch.inf  # padding of the vocabulary, which is nothing bad
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    logits = logits.to(dtype)
    sound, no_failures, _ = step(requests, logits.clone())
    assert not no_failures

    row = data.draw(st.integers(0, len(requests) - 1))
    logits[row, data.draw(st.integers(0, VOCAB - 1))] = data.draw(st.sampled_from([math.nan, math.inf]))
    fused, failures, sampled = step(requests, logits)
    _, args = requests[row]
    if args is None:
        assert not failures
    else:
        assert {group: cause for group, (cause, _) in failures.items()} == {args[KEY]["group"]: Cause.LOGITS}
    leaders = [i for i, (other, its) in enumerate(requests) if its and other == its[KEY]["group"]]
    for i in leaders:
        if requests[i][0] in failures:
            assert (fused[i] < math.inf).all(), "something to draw from, so that the sampler goes on"
        else:
            assert torch.equal(fused[i], sound[i])
    assert ((sampled >= 0) & (sampled < VOCAB)).all()


@pytest.mark.parametrize("backend", ["before the head", "after it"])
def test_combined_hidden_states_are_judged_by_their_logits(backend: str) -> None:
    requests = [*members("bad", "0.5*a + 0.5*b"), *members("good", "0.5*a + 0.5*b")]
    hidden = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    hidden[1, 3] = torch.nan
    fused, failures, _ = step(requests, hidden.clone(), combine_hidden_states=backend == "before the head")
    assert failures.keys() == {"bad"}
    assert torch.allclose(fused[2], hidden[2:].mean(0), atol=1e-6)


def test_energies_beyond_float32_and_formulas_that_forbid_everything() -> None:
    requests = [
        *members("large", "1e5*a - 99999*b"),
        *members("empty", "a + b"),
        *members("good", "a + b"),
    ]
    logits = torch.full((6, VOCAB), 1.0)
    logits[0] = 1e33 * torch.arange(VOCAB)
    logits[2, ::2] = -torch.inf
    logits[3, 1::2] = -torch.inf
    _, failures, _ = step(requests, logits)
    assert {name: cause for name, (cause, _) in failures.items()} == {
        "large": Cause.LOGITS,
        "empty": Cause.FORBIDDEN,
    }
    assert "float32" in failures["large"][1]


def test_what_is_no_plan_fails_alone() -> None:
    """A program that cannot be read, and a part of a group."""
    good, unreadable, torn = (members(name, "2*a - b") for name in ("good", "unreadable", "torn"))
    (_, args), *_ = unreadable
    args[KEY]["routine"] = args[KEY]["routine"][:-1]
    headless = members("headless", "2*a - b")[1:]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(2))
    fused, failures, _ = step([*good, *unreadable, torn[0], *headless], logits)
    causes = {name: cause for name, (cause, _) in failures.items()}
    assert causes == {"unreadable": Cause.ERROR, "torn": Cause.TORN, "headless": Cause.TORN}
    alone, _, _ = step(good, logits[:2])
    assert torch.equal(fused[0], alone[0])


def test_a_fusion_that_fails_ends_the_step_s_groups_and_not_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rows_module.marith_kernels.StagedBatch, "replace", failing)
    requests = [*members("a", "2*a - b"), ("plain", None), *members("b", "2*a - b")]
    logits = torch.randn(5, VOCAB)
    fused, failures, sampled = step(requests, logits.clone())
    assert {name: cause for name, (cause, _) in failures.items()} == {"a": Cause.ERROR, "b": Cause.ERROR}
    assert torch.equal(fused[2], logits[2])
    assert sampled[2] == logits[2].argmax()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_of_a_prompt_are_judged_too(value: float) -> None:
    """Positions that no later one attends to, as it were: what is sampled behind them is sound."""
    from vllm.v1.outputs import LogprobsTensors

    def gather(logits: torch.Tensor, tokens: torch.Tensor) -> LogprobsTensors:
        scores = logits.log_softmax(-1).gather(1, tokens[:, None])
        return LogprobsTensors(tokens[:, None], scores, torch.zeros_like(tokens))

    scorer, failed = PromptScorer(CPU), {}
    for name in ("good", "bad"):
        plan = lower(Formula.parse("2*a - b"))
        spec = GroupSpec([[1, 5, 6]], encode(plan, range(2)), scored=True)
        tags = member_tags(name, spec, prompt_length=3)
        for i, tag in enumerate(tags):
            hidden = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(i))
            if name == "bad" and i:
                hidden[0, 7] = value
            scorer.keep(f"{name}{i}", tag, 3, 0, hidden)
        group = JointGroup([f"{name}0", f"{name}1"], [0, 1], tags[0], decode(spec.routine))
        scorer.score(group, lambda _, parts: torch.cat(parts), torch.tensor([5, 6]), gather)
        failed[name] = scorer.add_failures(None)
    assert failed["good"] is None
    assert {name: cause for name, (cause, _) in failed["bad"].items()} == {"bad": Cause.LOGITS}
    other = StepFailures({"c": (Cause.TORN, "")})
    assert scorer.add_failures(other) is other


def test_a_verdict_travels_as_plain_data() -> None:
    peaks = [1.0, -math.inf, math.inf, math.nan]
    known = {"d": (Cause.CLASSIFIER, "it failed")}
    failures = StepFailures(known, ["a", "b", "c", "d"], torch.tensor(peaks))
    arrived = pickle.loads(pickle.dumps(failures))
    assert type(arrived) is dict
    assert arrived == dict(failures)
    assert {name: str(cause) for name, (cause, _) in arrived.items()} == {
        "b": "forbidden",
        "c": "logits",
        "d": "classifier",
    }
    assert not StepFailures({}, ["a"], torch.ones(1))


def test_logs_of_a_step_do_not_show_a_client_s_text() -> None:
    """vLLM writes down what the workers were sent when they fail, sampling parameters included."""
    from vllm import SamplingParams

    term = ClassifierTerm("c", "tone", "my secret", 1, False, "bayes", 5, 1)
    leader, _ = member_tags("g", GroupSpec([[7]], "", [term]), prompt_length=1)
    args = pickle.loads(pickle.dumps({KEY: leader.to_wire()}))
    assert "my secret" not in repr(SamplingParams(extra_args=args))
    assert "<9 characters>" in repr(SamplingParams(extra_args=args))
    tag = type(leader).from_wire(args[KEY])
    assert tag.classifiers == [term]


# ---------------------------------------------------------------------------------------------- in an engine


@pytest.fixture(scope="module")
def call(tiny_model: Path) -> Iterator[Any]:
    """Asynchronous scheduling: a step is on its way when the one before turns out to have failed."""
    with runners.Here().open(tiny_model, asynchronous=True, max_num_seqs=12) as call:
        yield call
        call(engines.assert_all_returned)


@pytest.fixture(autouse=True)
def counts_from_nothing(request: pytest.FixtureRequest) -> None:
    if "call" in request.fixturenames:
        request.getfixturevalue("call")(poison.failed)


def test_nan_in_one_term(call: Any, tiny_model: Path) -> None:
    """Of a formula among others: at once, later in the answer, and in the log-probabilities of a prompt."""
    rng = random.Random(8)
    jobs = [workload.job(rng, num_terms) for num_terms in (3, 2, 0, 4)]
    asked = dict(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    wanted = exactness.references(str(tiny_model), jobs, 12)
    terms = {"b": {"system": f"So {poison.CHARACTER}"}, "c": {"system": "Be brief."}}
    for formula in ("2*base - b", "union(base, c) + 0.1*topk(b, 5)", "base + schedule(0: 0, 5: 1)*b"):
        bad = Job("The value", Formula.parse(formula, terms))
        (failed,), *others = call(poison.generate, [bad, *jobs], asked)
        assert failed.finish_reason == "error"
        assert failed.tokens == []
        exactness.assert_greedy(jobs, others, wanted)
        assert call(poison.failed) == {"logits": 1}
    ((well,),) = call(exactness.generate, [bad], asked)
    assert len(well.tokens) == 12, "the model is sound again"


def test_nan_in_a_scored_prompt(call: Any) -> None:
    job = Job("The value", Formula.parse("2*base - b", {"b": {"system": "So"}}))
    late = replace(job, text=f"The {poison.CHARACTER} value")
    asked = dict(temperature=0, max_tokens=1, prompt_logprobs=0)
    (fine,), (failed,) = call(poison.generate, [job, late], asked)
    assert fine.finish_reason == "length"
    assert failed.finish_reason == "error"


def test_members_that_differ_fail(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the tie ever to fail, no client would see the token."""
    jobs = [workload.job(random.Random(3), 3), Job("The value")]
    ties = []

    def tie(self: Any, sampled: torch.Tensor) -> None:
        ties.append(sampled)
        if len(ties) < 4:
            original(self, sampled)

    original = rows_module.RowPlan.tie
    monkeypatch.setattr(rows_module.RowPlan, "tie", tie)
    (torn,), (plain,) = call(exactness.generate, jobs, dict(temperature=0, max_tokens=12, ignore_eos=True))
    assert torn.finish_reason == "error"
    assert len(torn.tokens) == 3
    assert plain.finish_reason == "length"
    assert call(poison.failed) == {"torn": 1}

"""Whatever a request asks of the sampler acts on the formula's distribution, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engines, reference, tiny
from tests.support.sampler import EOS, Sampler
from tests.support.statistics import CLEARLY_WRONG, SIGNIFICANCE, chi_square, tempered
from tests.support.workload import Job
from vllm_marith import Formula

LOGPROB_TOLERANCE = 1e-4
LENGTH = 16
ROWS = {"roomy": 96, "cramped": 24, "speculative": 96}
ENGINES = {
    "roomy": dict(max_num_seqs=ROWS["roomy"]),
    # Prompts are computed in many chunks, groups wait for rows and are preempted for blocks.
    "cramped": dict(
        max_num_seqs=ROWS["cramped"],
        max_num_batched_tokens=24,
        num_gpu_blocks_override=28,
        structured_outputs_config={"backend": "guidance"},  # the roomy one has vLLM's default, xgrammar
    ),
    # The terms of factor 1 draft three tokens, which all terms then check.
    "speculative": dict(max_num_seqs=ROWS["speculative"], marith={"speculative": 3}),
}
in_every_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)
without_drafts = pytest.mark.parametrize("engine", ["roomy", "cramped"], indirect=True)
roomy = pytest.mark.parametrize("engine", ["roomy", "speculative"], indirect=True)
cramped = pytest.mark.parametrize("engine", ["cramped"], indirect=True)

TERMS = {
    "a": {},
    "b": {
        "system": "You are an adult who writes long letters about the law, and about nothing else.",
        "speculative_factor": 4,
    },
    "c": {"prompt": "Always talk about magic.\n{input} so", "speculative_factor": 4},
}
TEXT = "The value of the expression is"


def job_of(text: str, formula: Formula) -> Job:
    """A request with the prompts that its terms should have."""
    prompts = {
        "a": text,
        "b": f"{TERMS['b']['system']}\n{text}",
        "c": f"Always talk about magic.\n{text} so",
    }
    return Job(text, formula, {name: prompts[name] for name in formula.terms})


LINEAR = job_of(TEXT, Formula.parse("1.8*a - 1.1*b + 0.6*c", TERMS))
UNION = job_of(TEXT, Formula.parse("1.6*a - 0.8*b + 0.7*union(a, c)", TERMS))

Row = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def linear_row(logits: dict[str, torch.Tensor]) -> torch.Tensor:
    """LINEAR as the sampler sees it: the weighted mean of raw logits."""
    a, b, c = (logits[name].double() for name in "abc")
    return (1.8 * a - 1.1 * b + 0.6 * c) / 1.3


def union_row(logits: dict[str, torch.Tensor]) -> torch.Tensor:
    """UNION as the sampler sees it: E / N over log-probabilities, plus the leader's log-sum-exp."""
    a, b, c = (logits[name].double().log_softmax(-1) for name in "abc")
    energy = 1.6 * a - 0.8 * b + 0.7 * torch.maximum(a, c)
    return energy / 1.5 + logits["a"].double().logsumexp(-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose distributions have many likely tokens, so that sampling has something to do."""
    return tiny.make(tmp_path_factory.mktemp("models") / "soft", sharpness=2.0)


@pytest.fixture(scope="module")
def engine(model: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    options: dict[str, Any] = dict(ENGINES[request.param])
    settings = {"limits": {"max_terms": 64}, **options.pop("marith", {})}
    with engines.engine(model, max_logprobs=-1, additional_config={"marith": settings}, **options) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any) -> Iterator[Any]:
    """The module's engine, which each test leaves empty."""
    torch.manual_seed(0)  # what requests without a seed are sampled with
    yield engine
    engines.assert_all_returned(engine)


def ids_of(job: Job) -> dict[str, list[int]]:
    return {name: tiny.tokenizer()(text).input_ids for name, text in job.reference_prompts().items()}


def params_of(job: Job, **asked: Any) -> Any:
    from vllm import SamplingParams

    return job.formula.sampling_params(**asked) if job.formula else SamplingParams(**asked)


def generate(llm: Any, job: Job, **asked: Any) -> Any:
    """The request's `RequestOutput`."""
    (output,) = llm.generate([job.text], params_of(job, **asked), use_tqdm=False)
    return output


def tokens_of(llm: Any, job: Job, **asked: Any) -> list[int]:
    (completion,) = generate(llm, job, **asked).outputs
    return list(completion.token_ids)


def expected_tokens(model: Path, job: Job, row: Row, sampler: Sampler, length: int = LENGTH) -> list[int]:
    return reference.decode(
        str(model), ids_of(job), length, lambda logits, tokens: sampler(row(logits), tokens)
    )


def evaluated(job: Job) -> Row:
    """The formula's log-probabilities as a row."""
    return job.reference_formula().evaluate


# ------------------------------------------------------------------------------------------ distribution


@roomy
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("job", [LINEAR, UNION], ids=["linear", "union"])
def test_tokens_are_distributed_as_the_formula_says(
    llm: Any, model: Path, job: Job, temperature: float
) -> None:
    output = generate(llm, job, temperature=temperature, n=2000, max_tokens=2, ignore_eos=True)
    samples = [completion.token_ids for completion in output.outputs]
    assert all(len(tokens) == 2 for tokens in samples)
    ((most_frequent, count),) = Counter(first for first, _ in samples).most_common(1)
    assert count >= 150
    second = [second for first, second in samples if first == most_frequent]

    for tokens, text_so_far in (([first for first, _ in samples], []), (second, [most_frequent])):
        prompts = {name: [*ids, *text_so_far] for name, ids in ids_of(job).items()}
        formula = reference.next_distribution(str(model), job.formula, prompts)
        leader = reference.next_distribution(str(model), Formula.parse("a"), {"a": prompts["a"]})
        assert chi_square(tokens, tempered(formula, temperature)) > SIGNIFICANCE
        assert chi_square(tokens, tempered(leader, temperature)) < CLEARLY_WRONG


@roomy
@pytest.mark.parametrize(
    "asked",
    [dict(top_k=6), dict(top_p=0.5), dict(min_p=0.25), dict(top_k=8, top_p=0.8, min_p=0.1)],
    ids=lambda asked: "+".join(asked),
)
def test_filters_keep_what_the_formula_calls_likely(llm: Any, model: Path, asked: dict[str, Any]) -> None:
    output = generate(llm, UNION, temperature=0.9, n=600, max_tokens=1, **asked)
    found = {token for completion in output.outputs for token in completion.token_ids}

    def support(row: torch.Tensor) -> set[int]:
        processed = Sampler(params_of(UNION, temperature=0.9, **asked)).processed(row, [])
        probabilities = processed.softmax(-1)
        assert probabilities[probabilities > 0].min() * 600 > 5  # all of them are seen, bar one case in 100
        return set(probabilities.nonzero().flatten().tolist())

    prompts = ids_of(UNION)
    formula = support(reference.next_distribution(str(model), UNION.formula, prompts))
    leader = support(reference.next_distribution(str(model), Formula.parse("a"), {"a": prompts["a"]}))
    assert found == formula
    assert found != leader


@roomy
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logprobs_are_the_formulas(llm: Any, model: Path, temperature: float) -> None:
    output = generate(llm, UNION, temperature=temperature, seed=5, max_tokens=8, ignore_eos=True, logprobs=20)
    (completion,) = output.outputs
    expected: list[torch.Tensor] = []

    def replay(logits: dict[str, torch.Tensor], tokens: list[int]) -> int:
        expected.append(UNION.formula.evaluate(logits))
        return completion.token_ids[len(tokens)]

    reference.decode(str(model), ids_of(UNION), 8, replay)
    total = 0.0
    for token, found, wanted in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        assert token in found
        assert len(found) in (20, 21)  # a token from below the first 20 comes on top of them
        for candidate, logprob in found.items():
            assert abs(logprob.logprob - float(wanted[candidate])) < LOGPROB_TOLERANCE
        best = sorted((logprob.logprob for logprob in found.values()), reverse=True)[:20]
        assert torch.allclose(torch.tensor(best).double(), wanted.topk(20).values, atol=LOGPROB_TOLERANCE)
        assert found[token].rank == 1 + int((wanted > wanted[token]).sum())
        total += found[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)


@roomy
def test_logprobs_of_the_whole_vocabulary(llm: Any, model: Path) -> None:
    (completion,) = generate(llm, UNION, temperature=0, max_tokens=1, logprobs=-1).outputs
    wanted = reference.next_distribution(str(model), UNION.formula, ids_of(UNION))
    (found,) = completion.logprobs
    assert len(found) == tiny.VOCAB
    for candidate, logprob in found.items():
        assert abs(logprob.logprob - float(wanted[candidate])) < LOGPROB_TOLERANCE


# ------------------------------------------------------------------------------------------ sampler features


FEW = list(range(300, 312))
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "seed": dict(temperature=0.8, seed=11),
    "top_k": dict(temperature=1.0, seed=12, top_k=5),
    "top_p": dict(temperature=1.0, seed=13, top_p=0.4),
    "min_p": dict(temperature=1.0, seed=14, min_p=0.2),
    "logit_bias": dict(temperature=0, logit_bias={700: 2.0, 701: 3.0, 702: -4.0}),
    "allowed_token_ids": dict(temperature=0, allowed_token_ids=list(range(100, 400, 3))),
    "min_tokens": dict(temperature=0, logit_bias={EOS: 50.0}, min_tokens=7),
    # Few tokens, so that some come again.
    "presence_and_frequency": dict(
        temperature=0, allowed_token_ids=FEW, presence_penalty=0.7, frequency_penalty=0.4
    ),
    "negative_frequency": dict(temperature=0, allowed_token_ids=FEW, frequency_penalty=-0.8),
    "repetition_penalty": dict(temperature=0, allowed_token_ids=FEW, repetition_penalty=1.4),
    "repetition_reward": dict(temperature=0, allowed_token_ids=FEW, repetition_penalty=0.6),
    "all": dict(
        temperature=0.9,
        seed=15,
        top_k=10,
        top_p=0.9,
        min_p=0.03,
        logit_bias={305: 2.0},
        allowed_token_ids=list(range(300, 340)),
        presence_penalty=0.6,
        frequency_penalty=0.8,
        repetition_penalty=1.3,
    ),
}
every_feature = pytest.mark.parametrize("asked", FEATURES.values(), ids=list(FEATURES))


@roomy
@every_feature
@pytest.mark.parametrize(("job", "row"), [(LINEAR, linear_row), (UNION, union_row)], ids=["linear", "union"])
def test_sampler_acts_on_the_formula(
    llm: Any, model: Path, job: Job, row: Row, asked: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """The repetition penalty too, which divides positive logits and multiplies negative ones and so needs to
    know where zero is: rows stay on the scale of the leader's raw logits."""
    if request.node.callspec.params["engine"] == "speculative":
        asked = asked | dict(temperature=0)  # rounds draw other noise than vLLM's sampler does
    found = tokens_of(llm, job, max_tokens=LENGTH, **asked)
    length, leader = len(found), ids_of(job)["a"]
    assert length == LENGTH or found[-1] == EOS

    def expected(job: Job, row: Row, **asked: Any) -> list[int]:
        return expected_tokens(model, job, row, Sampler(params_of(job, **asked), leader), length)

    assert found == expected(job, row, **asked)
    # Each of these would be seen: the formula forgotten, the penalty forgotten, zero in another place.
    assert found != expected(Job(job.text), lambda logits: logits["base"], **asked) or "min_tokens" in asked
    penalties = [name for name in asked if name.endswith("_penalty")]
    if penalties:
        assert found != expected(job, row, **{k: v for k, v in asked.items() if k not in penalties})
    if penalties == ["repetition_penalty"]:
        assert found != expected(job, evaluated(job), **asked)


@pytest.mark.parametrize(("job", "row"), [(LINEAR, linear_row), (UNION, union_row)], ids=["linear", "union"])
def test_rows_written_by_hand_are_the_formula(job: Job, row: Row) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = {name: 3 * torch.randn(100, generator=generator) for name in "abc"}
    assert torch.allclose(row(logits).log_softmax(-1), job.formula.evaluate(logits), atol=1e-12)


@roomy
@every_feature
@pytest.mark.parametrize("text", ["1*base", "2*base", "base"])
def test_a_formula_of_one_term_is_the_plain_request(llm: Any, text: str, asked: dict[str, Any]) -> None:
    asked = dict(asked, max_tokens=LENGTH, logprobs=5)
    plain, formula = (
        generate(llm, Job(TEXT, formula), **asked).outputs[0] for formula in (None, Formula.parse(text))
    )
    assert formula.token_ids == plain.token_ids
    assert [list(step.items()) for step in formula.logprobs] == [
        list(step.items()) for step in plain.logprobs
    ]
    assert formula.finish_reason == plain.finish_reason
    assert formula.text == plain.text


@roomy
def test_bad_words(llm: Any, model: Path) -> None:
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    free = tokens_of(llm, UNION, **asked)
    text = tiny.tokenizer().decode
    words = [text(free[i : i + length]).strip() for i, length in ((0, 1), (4, 1), (8, 1), (2, 2), (6, 2))]
    asked["bad_words"] = [word for word in words if word]
    params = params_of(UNION, **asked)
    params.update_from_tokenizer(llm.get_tokenizer())
    bad_words = params.bad_words_token_ids

    def occurs(word: list[int], tokens: list[int]) -> bool:
        return any(tokens[i : i + len(word)] == word for i in range(len(tokens)))

    found = tokens_of(llm, UNION, **asked)
    assert found == expected_tokens(model, UNION, evaluated(UNION), Sampler(params, bad_words=bad_words))
    assert {len(word) for word in bad_words if occurs(word, free)} >= {1, 2}
    assert not any(occurs(word, found) for word in bad_words)


@roomy
def test_stop_strings_and_stop_tokens(llm: Any) -> None:
    (free,) = generate(llm, UNION, temperature=0, max_tokens=LENGTH, ignore_eos=True).outputs
    stop = free.text[len(free.text) // 2 :][:4]
    (found,) = generate(llm, UNION, temperature=0, max_tokens=LENGTH, ignore_eos=True, stop=[stop]).outputs
    assert found.finish_reason == "stop"
    assert found.stop_reason == stop
    assert found.text == free.text[: free.text.index(stop)]
    assert len(found.token_ids) < LENGTH

    stop_id = free.token_ids[7]
    first = free.token_ids.index(stop_id)
    (found,) = generate(
        llm, UNION, temperature=0, max_tokens=LENGTH, ignore_eos=True, stop_token_ids=[stop_id]
    ).outputs
    assert (found.finish_reason, found.stop_reason) == ("stop", stop_id)
    assert list(found.token_ids) == free.token_ids[: first + 1]


@roomy
def test_end_of_sequence_ends_the_group(llm: Any) -> None:
    found = generate(llm, UNION, temperature=0, max_tokens=LENGTH, logit_bias={EOS: 100.0}).outputs[0]
    assert list(found.token_ids) == [EOS]
    assert found.finish_reason == "stop"
    found = generate(
        llm, UNION, temperature=0, max_tokens=5, ignore_eos=True, logit_bias={EOS: 100.0}
    ).outputs[0]
    assert list(found.token_ids) == [EOS] * 5
    assert found.finish_reason == "length"


# ------------------------------------------------------------------------------------------ seeds, n


@without_drafts
def test_seeds(llm: Any, model: Path, request: pytest.FixtureRequest) -> None:
    """One number of a seed a token, however many steps its group took and whatever ran beside it."""
    jobs = [
        job_of(text, job.formula)
        for text in ("", "So", "This is where the statement ends and another", TEXT * 3)
        for job in (LINEAR, UNION)
    ]
    asked = [dict(temperature=0.9, seed=20 + i, max_tokens=40, ignore_eos=True) for i in range(len(jobs))]
    params = [params_of(job, **ask) for job, ask in zip(jobs, asked, strict=True)]
    before = engines.scheduler(llm).figures.preempted
    together = llm.generate([job.text for job in jobs], params, use_tqdm=False)
    is_cramped = request.node.callspec.params["engine"] == "cramped"
    assert (engines.scheduler(llm).figures.preempted > before) == is_cramped
    for i, (job, output) in enumerate(zip(jobs, together, strict=True)):
        found = list(output.outputs[0].token_ids)
        assert found == expected_tokens(model, job, evaluated(job), Sampler(params[i]), 40)
        if i < 3:
            assert found == tokens_of(llm, job, **asked[i])
            assert found != tokens_of(llm, job, **dict(asked[i], seed=1000))


@without_drafts
@pytest.mark.parametrize("seed", [None, 40])
def test_several_completions(llm: Any, model: Path, seed: int | None) -> None:
    output = generate(llm, UNION, n=3, temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
    found = [list(completion.token_ids) for completion in output.outputs]
    assert [len(tokens) for tokens in found] == [12] * 3
    assert len({tuple(tokens) for tokens in found}) == 3
    if seed is not None:
        for i, tokens in enumerate(found):  # vLLM's own rule: the i-th completion has the seed plus i
            sampler = Sampler(params_of(UNION, temperature=1.0, seed=seed + i))
            assert tokens == expected_tokens(model, UNION, evaluated(UNION), sampler, 12)


# ------------------------------------------------------------------------------------------ grammars


def matches_regex(text: str) -> bool:
    """Whether `text` begins some match of ``[abc]{6} [0-9]{2}``."""
    shape = ["abc"] * 6 + [" "] + ["0123456789"] * 2
    return len(text) <= len(shape) and all(c in allowed for c, allowed in zip(text, shape, strict=False))


CHOICES = ["positive mood", "negative mood", "pose"]
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], bool], Callable[[str], bool]]] = {
    "regex": (dict(regex="[abc]{6} [0-9]{2}"), matches_regex, lambda text: len(text) == 9),
    "choice": (
        dict(choice=CHOICES),
        lambda text: any(choice.startswith(text) for choice in CHOICES),
        lambda text: text in CHOICES,
    ),
}


@in_every_engine
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("text", ["2*b - a", "2*a - union(b, c)", "intersection(b, c) - 0.4*a"])
def test_grammars_mask_the_formula(llm: Any, model: Path, grammar: str, text: str) -> None:
    """A masked row times a negative weight would be +inf: the mask has to come after the formula."""
    from vllm.sampling_params import StructuredOutputsParams

    backend = llm.llm_engine.vllm_config.structured_outputs_config.backend
    options, begins, is_whole = GRAMMARS[grammar]
    tokenizer = tiny.tokenizer()
    pieces = [tokenizer.decode([i]) for i in range(tiny.VOCAB)]
    job = job_of(TEXT, Formula.parse(text, TERMS))

    def masked(logits: dict[str, torch.Tensor], tokens: list[int]) -> int:
        so_far = tokenizer.decode(tokens)
        row = job.formula.evaluate(logits)
        for i, piece in enumerate(pieces):
            follows = is_whole(so_far) if i == EOS else i >= len(tiny.SPECIAL) and begins(so_far + piece)
            if not follows:
                row[i] = -torch.inf
        return int(row.argmax())

    (found,) = generate(
        llm, job, temperature=0, max_tokens=12, structured_outputs=StructuredOutputsParams(**options)
    ).outputs
    assert is_whole(found.text)
    assert found.finish_reason == "stop"
    if (backend, grammar) != ("guidance", "choice"):  # where one text is left, guidance picks its tokens
        expected = reference.decode(str(model), ids_of(job), len(found.token_ids), masked)
        assert list(found.token_ids) == expected


# ------------------------------------------------------------------------------------------ shapes of groups


@in_every_engine
@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", {"a": {}}),
        ("", {"a": {}, "b": {"system": "You are a lawyer."}}),
        (TEXT, {"a": {}, "b": {"prompt": ""}}),
        (TEXT, {"a": {"prompt": ""}, "b": {"prompt": "{input} {input} {input}"}, "c": {}}),
    ],
    ids=["alone", "leader", "follower", "leader_of_long"],
)
def test_prompts_of_one_token(llm: Any, model: Path, text: str, terms: dict[str, Any]) -> None:
    formula = Formula.parse({1: "a", 2: "a - 0.4*b", 3: "a - 0.4*b + union(b, c)"}[len(terms)], terms)
    job = Job(text, formula, {name: term.render(text) for name, term in formula.terms.items()})
    assert 1 in map(len, ids_of(job).values())
    beside = [UNION, Job(TEXT)]
    jobs = [job, *beside, job]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    outputs = llm.generate([j.text for j in jobs], [params_of(j, **asked) for j in jobs], use_tqdm=False)
    for j, output in zip(jobs, outputs, strict=True):
        expected = reference.generate(str(model), j.reference_formula(), ids_of(j), LENGTH).tokens
        assert list(output.outputs[0].token_ids) == expected


@roomy
@pytest.mark.parametrize("formula", ["2*a - 0.5*b", "union(a, b)", "a - 0.3*intersection(b, 2*a)"])
def test_terms_of_equal_prompts_are_one_member(llm: Any, formula: str) -> None:
    same = Formula.parse(formula, {"a": {"prompt": "{input}"}, "b": {}})
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=5)
    (plain,) = generate(llm, Job(TEXT), **asked).outputs

    scheduler = engines.scheduler(llm)
    llm.llm_engine.add_request("same", TEXT, same.sampling_params(**asked))
    llm.llm_engine.step()
    assert len(scheduler.requests) == len(scheduler.running) == 1
    assert not scheduler.groups
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
    (found,) = outputs[-1].outputs
    assert found.token_ids == plain.token_ids
    if "2*a)" not in formula:
        for step, expected in zip(found.logprobs, plain.logprobs, strict=True):
            for token, logprob in step.items():
                assert logprob.logprob == pytest.approx(expected[token].logprob, abs=LOGPROB_TOLERANCE)


@cramped
def test_a_group_of_all_rows_and_groups_that_wait(llm: Any, model: Path) -> None:
    rows = ROWS["cramped"]
    terms = {f"t{i}": {"system": str(i)} for i in range(rows)}
    whole = Formula.parse("t0 + 0.05*" + " + 0.05*".join(list(terms)[1:]), terms)
    jobs = [
        UNION,
        Job("It", whole, {name: term.render("It") for name, term in whole.terms.items()}),
        UNION,
        LINEAR,
    ] * 3
    asked = dict(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate([j.text for j in jobs], [params_of(j, **asked) for j in jobs], use_tqdm=False)
    expected = [reference.generate(str(model), job.formula, ids_of(job), 6).tokens for job in jobs[:4]]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected * 3


@cramped
def test_a_group_of_more_rows_than_there_are_is_refused(llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    terms = {f"t{i}": {"system": str(i)} for i in range(ROWS["cramped"] + 1)}
    job = Job("It", Formula.parse(" + ".join(terms), terms))
    with pytest.raises(VLLMValidationError, match="25 different terms; this server runs 24 rows at most"):
        generate(llm, job)

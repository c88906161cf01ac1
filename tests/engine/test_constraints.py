"""Hard constraints in engines: both model runners, both ways of scheduling, with and without room."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import engines, reference, runners, tiny
from tests.support.statistics import CLEARLY_WRONG, SIGNIFICANCE, chi_square
from vllm_marith import Formula

TEXT = "The value of"
SYSTEM = "You are an adult who writes letters about the law."
FORMULA = Formula.parse("1.5*a - 0.5*b", {"a": {}, "b": {"system": SYSTEM}})
UNION = Formula.parse("union(a, b) + 0.3*a", {"a": {}, "b": {"system": SYSTEM}})
BASE = Formula.parse("base")
EOS = 2


def ids_of(formula: Formula, text: str = TEXT) -> dict[str, list[int]]:
    encode = tiny.tokenizer()
    return {
        name: encode(text if term.system is None else f"{term.system}\n{text}").input_ids
        for name, term in formula.terms.items()
    }


# ------------------------------------------------------------- functions of an engine, called where it lives


@dataclass
class Answer:
    """One completion, and what the client had read of it after each step."""

    tokens: list[int]
    text: str
    finish_reason: str | None
    stop_reason: Any
    logprobs: list[float]
    reads: list[str] = field(default_factory=list)


@dataclass
class Ask:
    """One request; `asked` are sampling parameters."""

    formula: Formula | None
    asked: dict[str, Any]
    constraints: dict[str, Any] | None = None
    text: str = TEXT

    def params(self, **more: Any) -> Any:
        from vllm import SamplingParams

        if self.formula is None:
            return SamplingParams(**self.asked, **more)
        return self.formula.sampling_params(constraints=self.constraints, **self.asked, **more)


@contextmanager
def watched(llm: Any) -> Iterator[None]:
    """Members of a group hold identical tokens after every update."""
    scheduler = engines.scheduler(llm)
    update = scheduler.update_from_output

    def watching(*args: Any) -> Any:
        outputs = update(*args)
        for group in scheduler.groups.values():
            first, *others = [list(member.output_token_ids) for member in group.members]
            assert all(tokens == first for tokens in others), group.name
            for member in group.members:
                assert list(member.all_token_ids)[member.num_prompt_tokens :] == first
                if scheduler.cache_config.enable_prefix_caching:
                    full = member.num_tokens // engines.BLOCK_SIZE
                    assert len(member.block_hashes) == full
        return outputs

    scheduler.update_from_output = watching
    try:
        yield
    finally:
        del scheduler.update_from_output


def generate(llm: Any, asks: Sequence[Ask]) -> list[list[Answer]]:
    """The completions of each request, read as a stream."""
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for i, ask in enumerate(asks):
        engine.add_request(str(i), ask.text, ask.params(output_kind=RequestOutputKind.DELTA))
    found: dict[tuple[str, int], Answer] = {}
    with watched(llm):
        while engine.has_unfinished_requests():
            for output in engine.step():
                for part in output.outputs:
                    answer = found.setdefault((output.request_id, part.index), Answer([], "", None, None, []))
                    answer.tokens += part.token_ids
                    answer.text += part.text
                    answer.reads.append(answer.text)
                    answer.finish_reason, answer.stop_reason = part.finish_reason, part.stop_reason
                    for token, step in zip(part.token_ids, part.logprobs or [], strict=False):
                        answer.logprobs.append(step[token].logprob)
    engines.assert_all_returned(llm)
    return [
        [answer for (name, _), answer in sorted(found.items()) if name == str(i)] for i in range(len(asks))
    ]


def num_backoffs(llm: Any) -> int:
    return engines.scheduler(llm).num_backoffs


def abort_on_the_way(llm: Any, ask: Ask, step: int) -> None:
    """Aborts one of two requests after so many steps."""
    engine = llm.llm_engine
    for name in "ab":
        engine.add_request(name, ask.text, ask.params())
    for i in range(10_000):
        if i == step:
            engine.abort_request(["a"])
        if not engine.has_unfinished_requests():
            break
        engine.step()
    engines.assert_all_returned(llm)


# ------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose distributions have many likely tokens."""
    return tiny.make(tmp_path_factory.mktemp("models") / "soft", sharpness=3.0)


# V2, which is interpreted here, runs where most can go wrong: asynchronously and with little room.
SETTINGS = ("v1-synchronous", "v1-asynchronous", "v1-cramped", "v2-cramped")


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> tuple[str, str]:
    name, schedule = request.param.split("-")
    return name, schedule


@pytest.fixture(scope="module")
def runner(setting: tuple[str, str]) -> Iterator[Any]:
    with runners.start(setting[0]) as found:
        found.name = setting[0]
        yield found


@pytest.fixture(scope="module")
def call(runner: Any, model: Path, setting: tuple[str, str]) -> Iterator[runners.Call]:
    options: dict[str, Any] = dict(max_num_seqs=16, max_model_len=256)
    if setting[1] != "synchronous":
        options["asynchronous"] = True
    if setting[1] == "cramped":
        # Groups preempt each other, and prompts take several steps.
        options |= dict(num_gpu_blocks_override=17, max_num_batched_tokens=24)
    with runner.open(model, **options) as call:
        yield call


@pytest.fixture
def size(runner: Any) -> int:
    """How much to do: the V2 runner is interpreted here."""
    return 4 if runner.name == "v1" else 1


# ------------------------------------------------------------------------------------------------ greedy


def back_off(
    model: Path, formula: Formula, pattern: re.Pattern[str], length: int
) -> tuple[list[int], list[float], int]:
    """Greedy tokens, their log-probabilities, and how often tokens were taken back: no vLLM, no automaton."""
    decode = tiny.tokenizer().decode
    tokens: list[int] = []
    logprobs: list[float] = []
    bans: dict[int, list[int]] = {}
    times = 0
    while len(tokens) < length:
        prompts = {name: [*ids, *tokens] for name, ids in ids_of(formula).items()}
        row = reference.next_distribution(str(model), formula, prompts).clone()
        row[bans.get(len(tokens), [])] = -torch.inf
        row = row.log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
        match = pattern.search(decode(tokens))
        if match:
            times += 1
            place = next(
                i for i in range(len(tokens)) if len(decode(tokens[: i + 1]).rstrip("\ufffd")) > match.start()
            )
            bans = {p: banned for p, banned in bans.items() if p <= place}
            bans.setdefault(place, []).append(tokens[place])
            del tokens[place:], logprobs[place:]
    return tokens, logprobs, times


def fragments(tokens: list[int]) -> list[str]:
    """Strings of a text that lie across tokens: the end of one, or of two, and the beginning of the next."""
    pieces = [tiny.tokenizer().decode([token]) for token in tokens]
    joined = [a[-1:] + b[:2] for a, b in pairwise(pieces)]
    joined += [a[-1:] + b + c[:1] for a, b, c in zip(pieces, pieces[1:], pieces[2:], strict=False)]
    return [text for text in joined if text.isascii() and len(text) > 2 and text.strip()]


@pytest.mark.parametrize("formula", [FORMULA, UNION, BASE], ids=["linear", "union", "base"])
def test_greedy_is_a_plain_back_off_loop(
    call: runners.Call, model: Path, formula: Formula, size: int
) -> None:
    length = 10 * size
    greedy = dict(temperature=0, max_tokens=length, ignore_eos=True, logprobs=1)
    words: list[str] = []
    # What is forbidden next lies in what was said instead.
    for _ in range(2 + size):
        pattern = re.compile("|".join(map(re.escape, words)) or "(?!)", re.IGNORECASE)
        tokens, logprobs, times = back_off(model, formula, pattern, length)
        words += fragments(tokens)[len(words) :: length][:1]
    words.pop()
    assert times >= len(words) > 1
    before = call(num_backoffs)
    ((found,),) = call(generate, [Ask(formula, greedy, {"forbid": words})])
    assert found.tokens == tokens
    assert call(num_backoffs) - before == times
    assert max(abs(a - b) for a, b in zip(found.logprobs, logprobs, strict=True)) < 1e-4
    assert found.finish_reason == "length"
    assert found.stop_reason is None


# ---------------------------------------------------------------------------------------------- never


@pytest.mark.parametrize(
    ("constraints", "pattern"),
    [
        ({"forbid": ["e", "th", "AN", " ", "in"]}, "(?i)e|th|an| |in"),
        ({"forbid": ["e", "t", "on"], "ignore_case": False}, "e|t|on"),
        ({"forbid": ["the", "is", "a", "value"], "whole_words": True}, r"(?i)\b(the|is|a|value)\b"),
        ({"forbid_regex": ["[a-z]{4}", r"\d\d", r"\W\W\W"]}, r"(?i)[a-z]{4}|\d\d|\W\W\W"),
        ({"forbid": ["é", "\ufffd"], "forbid_regex": [r"[^\x00-\x7f]"]}, r"[^\x00-\x7f]"),
        ({"forbid_regex": [r"[aeiou].*[aeiou]"], "window": 3}, "(?i)[aeiou].*[aeiou]"),
    ],
    ids=["substrings", "case", "words", "regex", "bytes", "window"],
)
def test_what_is_forbidden_never_appears(
    call: runners.Call, constraints: dict[str, Any], pattern: str, size: int
) -> None:
    asks = [
        Ask(
            (FORMULA, UNION, BASE)[seed % 3],
            dict(temperature=0.5 + 0.3 * (seed % 4), seed=seed, max_tokens=8 * size, presence_penalty=0.3),
            {**constraints, "max_backoffs": 500},
        )
        for seed in range(6 * size)
    ]
    before = call(num_backoffs)
    answers = [answer for (answer,) in call(generate, asks)]
    assert call(num_backoffs) > before
    for answer in answers:
        assert answer.finish_reason in ("length", "stop")
        assert answer.stop_reason in (None, "constraints")
        assert not re.search(pattern, answer.text), answer.text
        assert answer.text == answer.reads[-1]
        # A stream is never longer than what stays, and a word is not shown before it is known to be none.
        assert all(answer.text.startswith(read) for read in answer.reads)
        if "." not in pattern:
            assert not any(re.search(pattern, read) for read in answer.reads)
    assert sum(answer.stop_reason is None for answer in answers) > len(answers) // 2


# ------------------------------------------------------------------------------------------------- law


Rows = dict[tuple[int, ...], torch.Tensor]
"""The formula's probabilities ``[4]`` of the allowed tokens, after each prefix of them."""
ANSWERS = list(product(range(4), repeat=3))
Pair = tuple[int, int]


def defined(rows: Rows, pair: Pair) -> torch.Tensor:
    """Log-probabilities of `ANSWERS` when a pair of tokens is forbidden, as docs/semantics.md has it."""
    law: dict[tuple[int, ...], float] = dict.fromkeys(ANSWERS, 0.0)

    def walk(prefix: tuple[int, ...], banned: frozenset[int], mass: float) -> float:
        """Adds the answers that begin with the prefix; returns the mass that goes back by one token."""
        if len(prefix) == 3:
            law[prefix] += mass
            return 0.0
        row = rows[prefix].clone()
        row[list(banned)] = 0
        row = row / row.sum()
        back = 0.0
        for token in set(range(4)) - banned:
            share = mass * float(row[token])
            if prefix and (prefix[-1], token) == pair:
                back += share
            elif (again := walk((*prefix, token), frozenset(), share)) > 0:
                back += walk(prefix, banned | {token}, again)
        return back

    assert walk((), frozenset(), 1.0) == 0
    return torch.tensor(list(law.values()), dtype=torch.float64).log()


def conditional(rows: Rows, pair: Pair) -> torch.Tensor:
    """Log-probabilities of `ANSWERS` under the formula, given that the pair is not in them: another law."""
    masses = [
        float(rows[()][x[0]] * rows[x[:1]][x[1]] * rows[x[:2]][x[2]]) * (pair not in (x[:2], x[1:]))
        for x in ANSWERS
    ]
    return (torch.tensor(masses, dtype=torch.float64) / sum(masses)).log()


def test_answers_are_distributed_as_defined(call: runners.Call, model: Path, runner: Any) -> None:
    """Over a vocabulary of four tokens, all answers of three, by an independent computation of the law."""
    allowed = tiny.tokenizer().convert_tokens_to_ids(["a", "b", "e", "s"])
    prompts = ids_of(FORMULA)
    rows = {
        prefix: reference.next_distribution(
            str(model),
            FORMULA,
            {name: [*ids, *(allowed[i] for i in prefix)] for name, ids in prompts.items()},
        )[allowed].softmax(-1)
        for length in range(3)
        for prefix in product(range(4), repeat=length)
    }

    def difference(pair: Pair) -> float:
        return float((defined(rows, pair).exp() - conditional(rows, pair).exp()).abs().sum())

    pair = max(product(range(4), repeat=2), key=difference)
    word = "".join("abes"[i] for i in pair)
    number = 1000 if runner.name == "v1" else 150
    asked = dict(temperature=1, max_tokens=3, n=number, allowed_token_ids=allowed)
    (found,) = call(generate, [Ask(FORMULA, asked, {"forbid": [word]})])
    seen = [ANSWERS.index(tuple(allowed.index(token) for token in answer.tokens)) for answer in found]
    assert chi_square(seen, defined(rows, pair)) > SIGNIFICANCE
    if runner.name == "v1":  # fewer cannot tell
        assert chi_square(seen, conditional(rows, pair)) < CLEARLY_WRONG


# ------------------------------------------------------------------------------------- sampling parameters


def test_seeds_reproduce_whatever_runs_beside(call: runners.Call, size: int) -> None:
    constraints = {"forbid": ["e", "an", "s "], "max_backoffs": 500}
    asks = [
        Ask(formula, dict(temperature=1.0, seed=seed, max_tokens=8 * size, ignore_eos=True), constraints)
        for seed, formula in enumerate([FORMULA, BASE, UNION])
    ]
    before = call(num_backoffs)
    alone = [call(generate, [ask])[0][0].tokens for ask in asks]
    assert call(num_backoffs) >= before + 3
    together = [answer.tokens for (answer,) in call(generate, asks)]
    assert together == alone


def test_several_completions(call: runners.Call, size: int) -> None:
    constraints = {"forbid": ["e", "a"], "max_backoffs": 500}
    asked = dict(temperature=1.0, seed=5, n=3, max_tokens=6 * size, ignore_eos=True)
    (together,) = call(generate, [Ask(FORMULA, asked, constraints)])
    assert len({tuple(answer.tokens) for answer in together}) == 3
    for i, answer in enumerate(together):
        ((alone,),) = call(generate, [Ask(FORMULA, {**asked, "n": 1, "seed": 5 + i}, constraints)])
        assert alone.tokens == answer.tokens
        assert not re.search("[ea]", answer.text, re.IGNORECASE)


def test_ends(call: runners.Call, size: int) -> None:
    """Stop strings, stop tokens and max_tokens end an answer as ever."""
    asked = dict(temperature=0, max_tokens=10 * size, ignore_eos=True)
    constraints = {"forbid": ["e"]}
    ((whole,),) = call(generate, [Ask(FORMULA, asked, constraints)])
    assert len(whole.tokens) == 10 * size
    middle = len(whole.tokens) // 2
    token = whole.tokens[middle]
    place = whole.tokens.index(token)
    stop = tiny.tokenizer().decode(whole.tokens[2:4])
    (by_token,), (by_string,), (shorter,) = call(
        generate,
        [
            Ask(FORMULA, {**asked, "stop_token_ids": [token]}, constraints),
            Ask(FORMULA, {**asked, "stop": [stop]}, constraints),
            Ask(FORMULA, {**asked, "max_tokens": middle}, constraints),
        ],
    )
    assert by_token.tokens == whole.tokens[: place + 1]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    assert by_string.text == whole.text[: whole.text.index(stop)]
    assert (by_string.finish_reason, by_string.stop_reason) == ("stop", stop)
    assert shorter.tokens == whole.tokens[:middle]
    assert shorter.finish_reason == "length"


def test_the_end_of_sequence_completes_a_word(call: runners.Call) -> None:
    """A whole word is certain when the answer ends; then the end is taken back, too."""
    encode = tiny.tokenizer().convert_tokens_to_ids
    allowed = [*encode(["a", "b"]), EOS]
    asked = dict(temperature=1, max_tokens=4, allowed_token_ids=allowed, logit_bias={EOS: 3.0}, n=20)
    (answers,) = call(generate, [Ask(BASE, asked, {"forbid": ["a", "ba"], "whole_words": True})])
    texts = {answer.text for answer in answers}
    assert not texts & {"a", "ba"}
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def test_gives_up_after_so_many_backoffs(call: runners.Call) -> None:
    asked = dict(temperature=0, max_tokens=12, ignore_eos=True)
    ((plain,),) = call(generate, [Ask(FORMULA, asked)])
    word = tiny.tokenizer().decode(plain.tokens[5:7])
    before = call(num_backoffs)
    ((found,),) = call(generate, [Ask(FORMULA, asked, {"forbid": [word], "max_backoffs": 0})])
    assert call(num_backoffs) == before
    assert (found.finish_reason, found.stop_reason) == ("length", "constraints")
    assert found.tokens == plain.tokens[: len(found.tokens)]
    assert len(found.tokens) <= 5
    assert word.lower() not in found.text.lower()


def test_gives_up_where_nothing_is_left(call: runners.Call) -> None:
    encode = tiny.tokenizer().convert_tokens_to_ids
    asked = dict(temperature=1, max_tokens=8, allowed_token_ids=encode(["a", "b", "e"]))
    (answer,) = call(generate, [Ask(FORMULA, asked, {"forbid": ["a", "b", "e"]})])[0]
    assert (answer.tokens, answer.text) == ([], "")
    assert (answer.finish_reason, answer.stop_reason) == ("length", "constraints")


def test_aborts_on_the_way(call: runners.Call, size: int) -> None:
    asked = dict(temperature=1.0, seed=1, max_tokens=6 * size, ignore_eos=True)
    for step in range(0, 8 * size, 3):
        call(abort_on_the_way, Ask(FORMULA, asked, {"forbid": ["e", "a", "s"], "max_backoffs": 500}), step)


def test_plain_requests_beside_are_what_they_are_alone(call: runners.Call, size: int) -> None:
    plain = [
        Ask(None, dict(temperature=temperature, seed=seed, max_tokens=8 * size, logprobs=1), text=text)
        for seed, (temperature, text) in enumerate(
            [(0, "So"), (0.8, "This is where the statement"), (0, TEXT)]
        )
    ]
    alone = [call(generate, [ask])[0][0] for ask in plain]
    constrained = Ask(
        FORMULA,
        dict(temperature=1, max_tokens=8 * size, ignore_eos=True),
        {"forbid": ["e", "a"], "max_backoffs": 500},
    )
    together = call(generate, [plain[0], constrained, plain[1], plain[2]])
    for before, (after,) in zip(alone, [together[0], *together[2:]], strict=True):
        assert after.tokens == before.tokens
        assert after.logprobs == pytest.approx(before.logprobs, abs=1e-5)


# ------------------------------------------------------------------------------------------------ refusals


def refusal(llm: Any, formula: str, constraints: dict[str, Any], **asked: Any) -> str:
    """What a client is told."""
    import json

    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams

    if "regex" in asked:
        asked["structured_outputs"] = StructuredOutputsParams(regex=asked.pop("regex"))
    value = json.dumps({"formula": formula, "constraints": constraints})
    with pytest.raises(VLLMValidationError) as caught:
        llm.generate([TEXT], SamplingParams(extra_args={"marith": value}, **asked), use_tqdm=False)
    return str(caught.value)


def test_refusals(call: runners.Call) -> None:
    assert "cannot be combined with structured output" in call(
        refusal, "base", {"forbid": ["a"]}, regex="[ab]*"
    )
    assert "cannot be combined with prompt log-probabilities" in call(
        refusal, "base", {"forbid": ["a"]}, prompt_logprobs=1
    )
    assert "has a back-reference" in call(refusal, "base", {"forbid_regex": [r"(a)\1"]})
    assert "did you mean 'forbid'?" in call(refusal, "base", {"forbids": ["a"]})

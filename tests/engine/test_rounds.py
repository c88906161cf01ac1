"""The worker's rounds of drafting and checking, without an engine: every random decision taken every way.

The code is the worker's own; only the models are made up, the dice are an enumeration, and the sampler's
shape is a temperature and a top-k.  Keys and values are stood for by the tokens that a forward pass was
given: a member that was not shown a token, or was shown one that did not stand, answers for another text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.enumeration import Chooser, Dice, Path, enumerate_paths
from tests.support.speculation import law, model_of, random_terms
from vllm_marith import Formula
from vllm_marith.engine.group import MemberTag
from vllm_marith.engine.worker.pipelines import routine_of
from vllm_marith.engine.worker.rows import JointGroup, RowPlan, RowPlans
from vllm_marith.engine.worker.speculation.dice import Settled
from vllm_marith.engine.worker.speculation.drafting import Drafter, Line
from vllm_marith.engine.worker.speculation.verification import NO_TOKEN, Check, settle
from vllm_marith.plan import encode, lower, speculate

VOCAB, COUNT = 3, 2
PROMPTS = (4, 1, 2, 7, 3, 5)
"""Tokens of each member's prompt: positions differ from member to member."""


@dataclass
class Members:
    """Made-up models: member m's logits behind a text, by (term, text)."""

    names: Sequence[str]
    logits: Callable[[tuple[int, ...]], dict[str, np.ndarray]]
    shown: dict[int, list[int]] = field(default_factory=dict)

    def __call__(
        self, rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        found = []
        for row, first, part in zip(rows, firsts, tokens.split(list(counts)), strict=True):
            seen = self.shown.setdefault(row, [0] * PROMPTS[row])
            assert len(seen) >= first, "a token was skipped"
            for position, token in enumerate(part.tolist(), first):
                del seen[position:]
                seen.append(token)
                text = tuple(seen[PROMPTS[row] :])
                found.append(self.logits(text)[self.names[row]])
        return torch.tensor(np.array(found), dtype=torch.float32)


@dataclass
class Enumerated:
    """`Dice` that ask a chooser, in float64."""

    chooser: Chooser

    def draw(self, logits: torch.Tensor, rows: Sequence[int], temperature: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._one(row, t) for row, t in zip(logits, temperature, strict=True)])

    def settle(
        self,
        target: torch.Tensor,
        draft: torch.Tensor,
        tokens: torch.Tensor,
        numbers: Sequence[int],
        rows: Sequence[int],
        temperature: torch.Tensor,
    ) -> Settled:
        accepted, following = [], []
        targets, drafts = target.split([n + 1 for n in numbers]), draft.split(list(numbers))
        for p_rows, q_rows, drawn, t in zip(
            targets, drafts, tokens.split(list(numbers)), temperature, strict=True
        ):
            for place, token in enumerate(drawn.tolist()):
                p, q = law_of(p_rows[place], t), law_of(q_rows[place], t)
                keep = min(1.0, p[token] / q[token])
                if keep < 1 and self.chooser.choice([keep, 1 - keep]):
                    left = np.maximum(p - q, 0)
                    accepted.append(place)
                    following.append(self.chooser.choice(left / left.sum()))
                    break
            else:
                accepted.append(len(drawn))
                following.append(self._one(p_rows[-1], t))
        return Settled(torch.tensor(accepted), torch.tensor(following))

    def _one(self, row: torch.Tensor, temperature: torch.Tensor) -> int:
        return self.chooser.choice(law_of(row, temperature))


def law_of(row: torch.Tensor, temperature: torch.Tensor) -> np.ndarray:
    if float(temperature) == 0:
        return np.eye(len(row))[int(row.argmax())]
    return torch.softmax(row.double(), -1).numpy()


@dataclass
class Sampler:
    """`Shape` of one temperature and one top-k; what a grammar forbids is -inf before it."""

    heat: float
    top_k: int

    def __call__(self, logits: torch.Tensor, rows: Sequence[int], ahead: Sequence[Any]) -> torch.Tensor:
        assert len(logits) == len(rows) == len(ahead)
        logits = logits.clone() / (self.heat or 1.0)
        if self.top_k:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits[logits < smallest] = -torch.inf
        return logits

    def temperature(self, rows: Sequence[int]) -> torch.Tensor:
        return torch.tensor([float(self.heat > 0)] * len(rows))


Cut = Callable[[list[int]], int]
"""Drafted tokens -> how many of them vLLM schedules."""


def copies(lines: Sequence[Line], numbers: Sequence[int]) -> list[torch.Tensor]:
    """n-grams that follow a text, made up: none, or token 1 and the one that the text's length says."""
    found = []
    for line, number in zip(lines, numbers, strict=True):
        so_far = len(line.tokens) + line.lengths[0] - PROMPTS[0]
        known = number if so_far % 2 else 0
        found.append(torch.tensor([(1 + so_far * i) % VOCAB for i in range(known)], dtype=torch.int64))
    return found


def group_of(formula: Formula, length: int) -> JointGroup:
    """The group of a formula whose terms are its members, as admission would make it."""
    speculation = speculate(formula, length)
    assert not isinstance(speculation, str)
    own = lower(formula).terms
    terms = (*own, *(name for level in speculation.levels for name in level.terms if name not in own))
    terms = tuple(dict.fromkeys(terms))
    members = range(len(terms))
    tag = MemberTag(
        "g",
        0,
        len(terms),
        prompt_length=PROMPTS[0],
        routine=encode(lower(formula, terms), members),
        drafts=[encode(lower(level.formula, terms), members) for level in speculation.levels],
        draft_lengths=list(speculation.lengths),
        drafter=speculation.free or "formula",
    )
    ids = [f"g{m}" for m in members]
    return JointGroup(ids, list(members), tag, routine_of(tag.routine)), terms  # type: ignore[return-value]


def answer(
    chooser: Chooser, formula: Formula, length: int, sampler: Sampler, logits: Any, count: int, cut: Cut = len
) -> tuple[int, ...]:
    """`count` tokens of a formula, generated by the worker's code as the engine calls it."""
    group, terms = group_of(formula, length)  # type: ignore[misc]
    members = Members(terms, logits)
    dice: Any = Enumerated(chooser)
    plans = RowPlans(torch.device("cpu"))
    tokens: list[int] = []
    draft = None
    while len(tokens) < count:
        # vLLM's step: every member computes its last token and the drafts that were scheduled.
        drafted = draft.tokens.tolist() if draft else []
        number = cut(drafted) if drafted else 0
        inputs = torch.tensor([*(tokens[-1:] or [0]), *drafted[:number]])
        # The first step's token is the end of the prompt.
        before = max(0, len(tokens) - 1)
        firsts = [PROMPTS[row] - (not tokens) + before for row in group.rows]
        counts = [len(inputs)] * len(firsts)
        rows = members(group.rows, firsts, counts, inputs.repeat(len(firsts)))
        each = np.full(len(firsts), number)
        lengths = np.asarray([PROMPTS[row] + len(tokens) for row in group.rows])
        plan = plans.plan_step(
            group.ids, np.zeros(len(firsts), bool), lengths, _extra_args(group).get, lambda _: [], each
        )
        assert plan is not None
        fused, failures = plan.fuse(rows)
        assert not failures
        mine = range(int(plan.starts[0]), int(plan.starts[1]))
        if draft is None:
            new = [int(dice.draw(sampler(fused[:1], [0], [tokens]), [0], sampler.temperature([0])))]
        else:
            found = settle(fused, [Check(0, mine, draft)], sampler, dice, number + 1)
            new = [token for token in found[0].tolist() if token != NO_TOKEN]
            assert 1 <= len(new) <= number + 1
        tokens += new
        if len(tokens) >= count:
            break
        line = Line(
            group,
            [PROMPTS[row] + len(tokens) for row in group.rows],
            torch.tensor(tokens[-1:]),
            group.tag.draft_lengths[-1],
        )
        (draft,) = Drafter(members, sampler, dice, copies).propose([line])
        assert 1 <= len(draft.tokens) <= line.wanted
    return tuple(tokens[:count])


def _extra_args(group: JointGroup) -> dict[str, Any]:
    tags = [group.tag, *(MemberTag("g", i, group.tag.size) for i in range(1, group.tag.size))]
    return {name: {"marith": tag.to_wire()} for name, tag in zip(group.ids, tags, strict=True)}


def formula_of(text: str, normalize: Any = "sum", **factors: int) -> Formula:
    terms: dict[str, Any] = {
        name: {"system": name, "speculative_factor": factors.get(name, 1)} for name in "abcd"
    }
    terms["g"] = {"model": "ngram"}
    return Formula.parse(text, terms, normalize)


def distance(found: dict[Any, float], expected: dict[Any, float]) -> float:
    return max(abs(found.get(tokens, 0) - expected.get(tokens, 0)) for tokens in {*found, *expected})


def laws(
    formula: Formula, length: int, heat: float, top_k: int, count: int = COUNT, cut: Cut = len
) -> tuple[dict[Any, float], dict[Any, float]]:
    """What the worker's code generates, and the formula's own law, as float32 rows have it."""
    logits = random_terms("abcd", VOCAB, seed=5)
    sampler = Sampler(heat, top_k)
    found = enumerate_paths(lambda chooser: answer(chooser, formula, length, sampler, logits, count, cut))
    return found, law(model_of(formula, logits, heat, top_k), VOCAB, count)


EVERY_OPERATOR = (
    "a + 0.6*b",
    "a + 0.6*b - 0.4*c",
    "a + union(a, b)",
    "a + intersection(b, 2*a)",
    "a + 0.5*indicator(b - a)*a",
    "a + 0.5*kl_indicator(b, a, 0.01)*a",
    "normalize(a + b) + a",
    "topk(a + b, 2)",
    "topp(a + b, 0.7)",
    "self_debias(a, b, 5)",
    "mixture(1: a, 2: b, 0.5: uniform)",
    "a + plausible(b, a, 0.2)",
    "superseded(c, b)",
    "a + schedule(0: 0.5, 1: 2)*b",
)


@pytest.mark.parametrize("text", EVERY_OPERATOR)
def test_every_operator(text: str) -> None:
    for heat, top_k in ((1, 0), (0.7, 2), (0, 0)):
        found, expected = laws(formula_of(text, b=3, c=3), 2, heat, top_k)
        assert distance(found, expected) < 1e-6, (heat, top_k)
        assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(("length", "count"), [(1, 3), (2, 3), (3, 2)])
def test_every_length(length: int, count: int) -> None:
    found, expected = laws(formula_of("a + 0.6*b", b=2), length, 1, 0, count)
    assert distance(found, expected) < 1e-6


def test_schedules_turn_within_a_round() -> None:
    """The step that checks one draft has the formula of two positions."""
    formula = formula_of("a + schedule(0: 0.5, 2: 4)*b", b=2)
    found, expected = laws(formula, 1, 1, 0, count=3)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize(
    ("text", "heat", "factors"),
    [
        ("a + 0.6*b - 0.4*c", 1, dict(b=2, c=3)),
        ("a + 0.6*b - 0.4*c", 1, dict(b=2, c=4)),
        ("a + 0.6*b - 0.4*c + 0.5*d", 0, dict(b=2, c=4, d=7)),
        # The first level's member is none of the second's, and has not seen the token that this adds.
        ("superseded(d, a) + 0.5*c", 1, dict(a=2, c=4)),
        ("superseded(d, a) + 0.5*c", 0, dict(a=3, c=8)),
    ],
)
def test_levels_nest(text: str, heat: float, factors: dict[str, int]) -> None:
    """Also where a level leaves the last drafts to who needs them."""
    count = COUNT if heat else 9  # of greedy answers there is one path
    found, expected = laws(formula_of(text, **factors), max(factors.values()) - 1, heat, 0, count)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("text", ["a + 0.6*b - 0.4*c", "superseded(d, a) + 0.5*c"])
def test_drafts_come_with_what_they_were_drawn_from(text: str) -> None:
    """A level's law behind the very tokens in front: no member has missed one, or seen another."""
    own = dict(a=3, c=8) if "d" in text else dict(b=3, c=8)
    formula, logits = formula_of(text, **own), random_terms("abcd", VOCAB, seed=5)
    speculation = speculate(formula, 7)
    assert not isinstance(speculation, str)
    models = [model_of(level.formula, logits) for level in speculation.levels]
    group, terms = group_of(formula, 7)  # type: ignore[misc]
    used = set()
    for seed in range(8):
        members = Members(terms, logits)
        members.shown = {row: [0] * (length - 1) for row, length in enumerate(PROMPTS)}
        dice: Any = Enumerated(Dice(seed))
        line = Line(group, PROMPTS, torch.tensor([0]), 7)
        (draft,) = Drafter(members, Sampler(1, 0), dice).propose([line])
        tokens = draft.tokens.tolist()
        for place, row in enumerate(draft.logits.double().softmax(-1).numpy()):
            gaps = [np.abs(model(tuple(tokens[:place])) - row).max() for model in models]
            assert min(gaps) < 1e-6
            used.add(int(np.argmin(gaps)))
        for row, number in line.shown.items():
            seen = members.shown[row][PROMPTS[row] :]
            assert seen[: number - 1] == tokens[: number - 1]
    assert used == {0, 1}


def test_who_checks_what() -> None:
    """A level checks as many drafts as it may, and leaves the last ones to the whole formula."""
    group, terms = group_of(formula_of("a + 0.6*b - 0.4*c", b=3, c=6), 5)  # type: ignore[misc]
    assert group.tag.draft_lengths == [2, 5]
    members = Members(terms, random_terms("abcd", VOCAB, seed=5))
    members.shown = {row: [0] * (length - 1) for row, length in enumerate(PROMPTS)}
    calls: list[tuple[list[int], int]] = []

    def forward(rows: Sequence[int], firsts: Sequence[int], counts: Sequence[int], tokens: Any) -> Any:
        calls.append((list(rows), counts[0]))
        return members(rows, firsts, counts, tokens)

    dice: Any = Enumerated(Path([]))  # every draft is kept
    Drafter(forward, Sampler(1, 0), dice).propose([Line(group, PROMPTS, torch.tensor([0]), 5)])
    alone, together = ([0], 1), ([0, 1], 3)
    assert calls == [alone, alone, together, alone, alone]


@pytest.mark.parametrize("heat", [1, 0])
def test_ngrams_draft_for_the_first_level(heat: float) -> None:
    formula = formula_of("superseded(g, a) + 0.6*b", a=3, b=4)
    assert group_of(formula, 3)[0].tag.draft_lengths == [2, 3]  # type: ignore[index]
    found, expected = laws(formula, 3, heat, 0)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("number", [0, 1])
def test_drafts_that_vllm_has_no_room_for(number: int) -> None:
    found, expected = laws(
        formula_of("a + 0.6*b", b=3), 2, 1, 0, cut=lambda drafted: min(number, len(drafted))
    )
    assert distance(found, expected) < 1e-6


def _forbidding(logits: Any, forbidden: int) -> Any:
    """The terms of a formula under a grammar that does not know a token."""

    def masked(text: tuple[int, ...]) -> dict[str, np.ndarray]:
        values = {name: row.copy() for name, row in logits(text).items()}
        for row in values.values():
            row[forbidden] = -np.inf
        return values

    return masked


def test_drafts_that_a_grammar_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grammar forbids a token; the partial formula knows nothing of it, the scheduler cuts there."""
    forbidden = 1
    formula, logits = formula_of("a + 0.6*b", b=3), random_terms("abcd", VOCAB, seed=5)
    sampler = Sampler(1, 0)

    def cut(drafted: list[int]) -> int:
        return drafted.index(forbidden) if forbidden in drafted else len(drafted)

    fuse = RowPlan.fuse

    def with_grammar(self: Any, rows: torch.Tensor) -> Any:
        fused, failures = fuse(self, rows)
        fused[:, forbidden] = -torch.inf
        return fused, failures

    monkeypatch.setattr(RowPlan, "fuse", with_grammar)
    found = enumerate_paths(lambda chooser: answer(chooser, formula, 2, sampler, logits, COUNT, cut))
    expected = law(model_of(formula, _forbidding(logits, forbidden)), VOCAB, COUNT)
    assert distance(found, expected) < 1e-6


def test_what_a_partial_formula_reads() -> None:
    group, terms = group_of(formula_of("a + 0.6*b - 0.4*c", b=2, c=3), 2)  # type: ignore[misc]
    assert terms == ("a", "b", "c")
    assert [routine_of(text).members for text in group.tag.drafts] == [[0], [0, 1]]
    assert group.tag.draft_lengths == [1, 2]


@pytest.mark.parametrize("seed", range(6))
def test_lines_of_different_depth_and_length_grow_together(seed: int) -> None:
    """What one group wants, and how far its drafts are right, makes no difference to another."""
    logits = random_terms("abcd", VOCAB, seed)
    nested = formula_of("a + 0.6*b - 0.4*c", b=2, c=6)
    formulas = [formula_of("a + 0.6*b", b=3), nested, nested]
    groups = [group_of(formula, 5)[0] for formula in formulas]  # type: ignore[index]
    groups[2] = replace(groups[2], rows=[3, 4, 5])
    members = Members("abcabc", logits)
    sampler = Sampler(0, 0)
    lengths = [5, 2, 3, 9, 5, 7]
    for row, length in enumerate(lengths):
        members.shown[row] = [0] * (length - 1)

    def lines() -> list[Line]:
        return [
            Line(group, [lengths[row] for row in group.rows], torch.tensor([2]), wanted)
            for group, wanted in zip(groups, (3, 3, 5), strict=True)
        ]

    dice: Any = Enumerated(Dice(0))
    alone = [Drafter(members, sampler, dice).propose([line])[0] for line in lines()]
    together = Drafter(members, sampler, dice).propose(lines())
    assert [len(draft.tokens) for draft in together] == [3, 3, 5]
    for one, other in zip(alone, together, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert torch.equal(one.logits, other.logits)

"""What drafts cost and save: requests of one formula with and without them, one after the other.

Calls are counted as the paper does (arXiv 2311.14479, its table of speculative sampling): one term's forward
pass that gives tokens or drafts, however many positions it covers.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vllm_marith.engine.group import FIGURES
from vllm_marith.language.names import BASE
from vllm_marith.language.speculative import Speculative

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_marith import Formula

Mode = Literal["off", "fixed", "auto"]

MODES: tuple[Mode, ...] = ("off", "fixed", "auto")
"""Without drafts, with as many at a time as the factors say, and with as many as pay."""


@dataclass(frozen=True)
class Turn:
    """Some answers, one request at a time.

    Attributes:
        tokens: of all of them.
        seconds: for all of them.
        calls: of the engine's own model.
        other_calls: of other models.
        drafted, accepted: tokens.
    """

    tokens: int
    seconds: float
    calls: int
    other_calls: int
    drafted: int
    accepted: int


@dataclass(frozen=True)
class Drafts:
    """One formula, with and without drafts.

    Attributes:
        formula: as it was parsed.
        length: tokens drafted at a time under `fixed`.
        turns: mode -> its turns; those of one place followed one another.
        answers: mode -> token ids of greedy answers, the same requests in each mode.
    """

    formula: str
    length: int
    turns: dict[str, list[Turn]]
    answers: dict[str, list[list[int]]] = field(default_factory=dict)

    def calls(self, mode: str) -> float:
        """Calls of the engine's own model for each token."""
        return self._per_token(mode, [turn.calls for turn in self.turns[mode]])

    def other_calls(self, mode: str) -> float:
        """Calls of other models for each token."""
        return self._per_token(mode, [turn.other_calls for turn in self.turns[mode]])

    def milliseconds(self, mode: str) -> float:
        """For a token; the median over turns."""
        return 1e3 * statistics.median(turn.seconds / turn.tokens for turn in self.turns[mode])

    def kept(self, mode: str) -> float:
        """Share of the drafted tokens that stood; 0 where none was drafted."""
        drafted = sum(turn.drafted for turn in self.turns[mode])
        return sum(turn.accepted for turn in self.turns[mode]) / drafted if drafted else 0.0

    def speedups(self, mode: str) -> list[float]:
        """Time of a token without drafts over that with them, turn by turn: machines drift, ratios less."""
        pairs = zip(self.turns["off"], self.turns[mode], strict=True)
        return [(off.seconds / off.tokens) / (on.seconds / on.tokens) for off, on in pairs]

    def speedup_in_total(self, mode: str) -> float:
        """As `speedups`, of all turns together: what a few bad ones cost is in it."""
        off, on = ([(turn.seconds, turn.tokens) for turn in self.turns[m]] for m in ("off", mode))
        (seconds, tokens), (seconds_on, tokens_on) = (
            map(sum, zip(*turns, strict=True)) for turns in (off, on)
        )
        return (seconds / tokens) / (seconds_on / tokens_on)

    def identical(self, mode: str) -> int:
        """How many greedy answers are, token for token, those without drafts."""
        return sum(a == b for a, b in zip(self.answers["off"], self.answers[mode], strict=True))

    def _per_token(self, mode: str, numbers: Sequence[int]) -> float:
        return sum(numbers) / sum(turn.tokens for turn in self.turns[mode])


def measure(
    llm: LLM,
    formula: Formula,
    length: int,
    tokens: int,
    turns: Sequence[Sequence[str]],
    greedy: Sequence[str] = (),
) -> Drafts:
    """Turns of one formula, at T = 1, every mode in each.

    Args:
        llm: an engine that may draft.
        formula: with its speculative factors.
        length: tokens drafted at a time under `fixed`.
        tokens: of every answer.
        turns: user messages of each.  A turn before the first warms up and lets `auto` find out what steps
            take; it is not kept.
        greedy: user messages that are answered greedily, too, for `Drafts.answers`.
    """
    found: dict[str, list[Turn]] = {mode: [] for mode in MODES}
    for users in (turns[0], *turns):
        for mode in MODES:
            found[mode].append(_turn(llm, formula, _asked(mode, length), users, tokens, temperature=1.0)[0])
    answers: dict[str, list[list[int]]] = {
        mode: _turn(llm, formula, _asked(mode, length), greedy, tokens, temperature=0.0)[1] for mode in MODES
    }
    return Drafts(str(formula), length, {mode: of[1:] for mode, of in found.items()}, answers)


def _asked(mode: Mode, length: int) -> Speculative:
    return length if mode == "fixed" else mode


def _turn(
    llm: LLM,
    formula: Formula,
    speculative: Speculative,
    users: Sequence[str],
    tokens: int,
    *,
    temperature: float,
) -> tuple[Turn, list[list[int]]]:
    params = formula.sampling_params(
        speculative=speculative,
        temperature=temperature,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
    )
    llm.reset_prefix_cache()  # modes are asked the same: what one has computed shall not help the next
    llm.collective_rpc(FIGURES)  # what was counted before is nobody's
    answers = []
    start = time.perf_counter()
    for user in users:
        asked: Any = [{"role": "user", "content": user}]
        (output,) = llm.chat(asked, params, use_tqdm=False)
        answers.append(list(output.outputs[0].token_ids))
    seconds = time.perf_counter() - start
    core, worker, *_ = llm.collective_rpc(FIGURES)
    count = sum(map(len, answers))
    drafted, accepted = (_total(core[name]) for name in ("drafted", "accepted"))
    calls = Counter[bool]()  # of the engine's own model, or not
    for (_, model), number in (*core["calls"], *worker["calls"]):
        calls[model == BASE] += number
    return Turn(count, seconds, calls[True], calls[False], drafted, accepted), answers


def _total(counts: Any) -> int:
    return sum(n for _, n in counts)

"""Arms to texts: one engine with every model of the scenario, all texts of an arm at once."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_marith.engine.offline import offline_llm, sampling_params
from vllm_marith.models import Paths

from .drafting import Drafts, measure
from .scenario import EMBEDDED, Arm, Scenario

if TYPE_CHECKING:
    from vllm import LLM

SEEDS = 1 << 31


@dataclass(frozen=True)
class Written:
    """One text.

    Attributes:
        seed: of the evaluation, under which it was drawn.
        request: the user's message.
        prompt: token ids that the leader was asked with.
        tokens: token ids of the text.
    """

    seed: int
    request: str
    text: str
    prompt: list[int]
    tokens: list[int]


def draw_seed(arm: str, seed: int, index: int) -> int:
    """The seed of one text's own draws: arms, seeds and texts share no noise."""
    return zlib.crc32(f"{arm} {seed} {index}".encode()) % SEEDS


class Writer:
    """The engine."""

    def __init__(self, llm: LLM, scenario: Scenario) -> None:
        self.llm = llm
        self.scenario = scenario

    @classmethod
    def start(cls, scenario: Scenario, paths: Paths | None) -> Writer:
        """Start the engine with the models that the scenario names."""
        engine = scenario.engine

        def located(named: str) -> str:
            return str(getattr(paths, named.removeprefix(EMBEDDED))) if named.startswith(EMBEDDED) else named

        settings: dict[str, Any] = {
            "constituents": {name: located(path) for name, path in engine.constituents.items() if path},
            "classifiers": {
                name: {"path": located(path)} for name, path in engine.classifiers.items() if path
            },
        }
        assert engine.model is not None
        options = {"disable_log_stats": True, **engine.options}
        if scenario.speculation:
            settings["max_speculative_tokens"] = scenario.speculation.longest
            options["async_scheduling"] = False  # what is drafted next depends on what was kept
        options["additional_config"] = {"marith": settings}
        return cls(offline_llm(located(engine.model), **options), scenario)

    def write(self, arm: Arm, seeds: Sequence[int], samples: int) -> list[Written]:
        """`samples` texts for each seed, the requests in turn."""
        formula = self.scenario.formula(arm)
        length = arm.tokens or self.scenario.tokens
        requests = arm.requests or self.scenario.requests
        options: dict[str, Any] = {"temperature": self.scenario.temperature, "max_tokens": length}
        if self.scenario.fixed_length:
            options["min_tokens"] = length
        conversations, params, places = [], [], []
        for seed in seeds:
            for index in range(samples):
                request = requests[index % len(requests)]
                conversations.append([{"role": "user", "content": request}])
                own = draw_seed(arm.key, seed, index)
                params.append(sampling_params(formula, seed=own, **options))
                places.append((seed, request))
        outputs = self.llm.chat(conversations, params, use_tqdm=False)  # type: ignore[arg-type]
        return [
            Written(
                seed,
                request,
                output.outputs[0].text,
                list(output.prompt_token_ids or []),
                list(output.outputs[0].token_ids),
            )
            for (seed, request), output in zip(places, outputs, strict=True)
        ]

    def drafts(self, arm: Arm, turns: int) -> Drafts:
        """An arm with and without drafts: so many texts, one after the other, the requests in turn.

        Half as many requests are answered greedily, too, each once.
        """
        formula = self.scenario.formula(arm)
        assert formula is not None
        assert arm.tokens is not None
        users = [[arm.requests[i % len(arm.requests)]] for i in range(turns)]
        length = max(arm.factors.values()) - 1
        return measure(self.llm, formula, length, arm.tokens, users, arm.requests[: turns // 2])

    def losses(
        self, written: Sequence[Written], prompts: Mapping[str, Sequence[int]]
    ) -> list[tuple[float, int]]:
        """For each text its negative log-likelihood under the plain model, and its number of tokens.

        prompts: request -> its token ids without a formula.
        """
        asked = [text for text in written if text.tokens]
        jobs: Any = [{"prompt_token_ids": [*prompts[text.request], *text.tokens]} for text in asked]
        params = sampling_params(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = iter(self.llm.generate(jobs, params, use_tqdm=False) if jobs else [])
        found = []
        for text in written:
            if not text.tokens:
                found.append((0.0, 0))
                continue
            said = next(outputs).prompt_logprobs
            assert said is not None
            steps = list(said)[-len(text.tokens) :]
            loss = -sum(step[token].logprob for step, token in zip(steps, text.tokens, strict=True) if step)
            found.append((loss, len(text.tokens)))
        return found

"""What explains an answer's tokens, fetched from the workers while the answer is on its way."""

from __future__ import annotations

import math
from typing import Any

from vllm_marith.engine.frontend.account import Explained
from vllm_marith.engine.group import EVIDENCE

from .contributions import contributions


class Explainer:
    """Explains the tokens of requests of one API server.

    Args:
        engine_client: reaches the engines.
        tokenizer: of the model.
    """

    def __init__(self, engine_client: Any, tokenizer: Any) -> None:
        self._core = engine_client.engine_core
        self._tokenizer = tokenizer

    def of(self, explained: Explained) -> Explanation:
        return Explanation(self, explained)

    async def fetch(self, key: str, since: int, last: bool) -> list[Any]:
        """(ids, logprobs) of a request's tokens from number `since`, see `Evidence.fetch`.

        Only one engine has them, and of its workers the first is enough.
        """
        asked = (key, since, last)
        engines = await self._core.call_utility_all_async("collective_rpc", EVIDENCE, None, asked, {})
        return next((workers[0] for workers in engines if workers and workers[0]), [])

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class Explanation:
    """One answer's, in parts: each `more` tells the tokens since the last."""

    def __init__(self, explainer: Explainer, explained: Explained) -> None:
        self._explainer = explainer
        self._explained = explained
        self._ids: list[int] = []
        self._told = ""

    async def more(self, last: bool = False) -> list[dict[str, Any]]:
        """The tokens that have come since the last call.

        last: the answer is complete.
        """
        found = await self._explainer.fetch(self._explained.key, len(self._ids), last)
        return [self._token(ids, logprobs) for ids, logprobs in found]

    def _token(self, ids: list[int], logprobs: list[list[float]]) -> dict[str, Any]:
        self._ids.append(ids[0])
        whole = self._explainer.text(self._ids)
        # A character may take several tokens: it is told with the last of them.
        text = whole[len(self._told) :] if not whole.endswith("\ufffd") else ""
        self._told += text
        chosen, runner_up = (
            {"token": self._explainer.text([token]), "id": token, "logprob": _json(row[-1])}
            for token, row in zip(ids, logprobs, strict=True)
        )
        of_terms = [
            {name: row[member] for name, member in self._explained.member_of.items()} for row in logprobs
        ]
        shares = [contributions(self._explained.formula, row) for row in of_terms]
        terms = {
            name: {
                "logprob": [_json(row[name]) for row in of_terms],
                "contribution": [
                    _json(share.get(name, 0.0)) if share is not None else None for share in shares
                ],
            }
            for name in self._explained.member_of
        }
        return {"text": text, "chosen": chosen, "runner_up": runner_up, "terms": terms}


def _json(number: float) -> float | None:
    """JSON has no infinities: None for a token that is forbidden."""
    return number if math.isfinite(number) else None

"""The server's figures about formulas, under ``vllm_marith:`` in its ``/metrics``.

Engine core and workers count for themselves and are asked when the page is scraped: see
`vllm_marith.engine.core.figures` for the way and the reasons.  Metrics live in prometheus_client's default
registry like vLLM's own, so that they are on the same page, also when several API servers merge theirs.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.logger import init_logger

from vllm_marith.engine.group import FIGURES, Cause

logger = init_logger(__name__)

_SCRAPE_SECONDS = 2.0
"""How long a scrape waits for the engines; a step that runs longer is told by the next one."""

_ENGINE = ["engine"]
_CLASSIFIER = [*_ENGINE, "classifier"]


class Metrics:
    """The metrics of one API server process; labels are engine numbers, presets and a few reasons."""

    def __init__(self) -> None:
        self.waiting = Gauge(
            "vllm_marith:num_groups_waiting",
            "Groups of two or more terms that wait for rows and KV blocks.",
            _ENGINE,
            multiprocess_mode="mostrecent",
        )
        self.running = Gauge(
            "vllm_marith:num_groups_running",
            "Groups of two or more terms in the engine's queues.",
            _ENGINE,
            multiprocess_mode="mostrecent",
        )
        self.preempted = Counter(
            "vllm_marith:group_preemptions", "Groups that were preempted, as a whole.", _ENGINE
        )
        self.failed = Counter(
            "vllm_marith:requests_failed",
            "Requests with a formula that ended with an error, by its cause.",
            [*_ENGINE, "cause"],
        )
        self.members = Histogram(
            "vllm_marith:group_members",
            "Different terms of the formulas that arrived.",
            _ENGINE,
            buckets=[1, 2, 3, 4, 6, 8, 12, 16],
        )
        self.fused_rows = Histogram(
            "vllm_marith:fused_rows",
            "Rows that groups had in a step in which at least one of them was sampled.",
            _ENGINE,
            buckets=[2, 4, 8, 16, 32, 64, 128, 256, 512],
        )
        self.fusion_seconds = Counter(
            "vllm_marith:fusion_seconds", "Host time that the first worker spent in the fusion.", _ENGINE
        )
        self.classifier_texts = Counter(
            "vllm_marith:classifier_texts", "Texts that the first worker's classifiers read.", _CLASSIFIER
        )
        self.classifier_hits = Counter(
            "vllm_marith:classifier_hits", "Texts that they knew from before.", _CLASSIFIER
        )
        self.classifier_batches = Counter(
            "vllm_marith:classifier_batches", "Their forward passes.", _CLASSIFIER
        )
        self.classifier_seconds = Counter(
            "vllm_marith:classifier_seconds", "Host time that they took, part of the fusion's.", _CLASSIFIER
        )
        self.tokens = Counter(
            "vllm_marith:generation_tokens",
            "Tokens of ended requests, by preset; `custom` is any other formula.",
            [*_ENGINE, "formula"],
        )
        self.steps = Counter(
            "vllm_marith:formula_steps",
            "Steps of formulas on a server that speculates.",
            [*_ENGINE, "formula"],
        )
        self.calls = Counter(
            "vllm_marith:term_calls",
            "Forward passes of their terms; of formulas other than presets, by model.",
            [*_ENGINE, "formula", "term"],
        )
        self.drafted = Counter(
            "vllm_marith:draft_tokens", "Tokens that formulas drafted.", [*_ENGINE, "formula"]
        )
        self.accepted = Counter(
            "vllm_marith:accepted_draft_tokens", "Those of them that stood.", [*_ENGINE, "formula"]
        )
        self.refused = Counter(
            "vllm_marith:requests_refused",
            "Requests answered with HTTP 400 on account of their formula.",
            ["reason"],
        )
        for reason in ("formula", "size", "unsupported"):
            self.refused.labels(reason)

    def refuse(self, reason: str) -> None:
        self.refused.labels(reason).inc()

    def record(self, engine: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Adds what one engine drained: the core's figures, then each worker's."""
        core, *workers = answers
        label = str(engine)
        self.waiting.labels(label).set(core["waiting"])
        self.running.labels(label).set(core["running"])
        self.preempted.labels(label).inc(core["preempted"])
        failed = dict(core["failed"])
        for cause in Cause:
            self.failed.labels(label, cause).inc(failed.get(cause, 0))
        for histogram, name in ((self.members, "members"), (self.fused_rows, "fused_rows")):
            child = histogram.labels(label)
            for value, times in core[name]:
                for _ in range(times):
                    child.observe(value)
        for by_formula, name in (
            (self.tokens, "tokens"),
            (self.steps, "steps"),
            (self.drafted, "drafted"),
            (self.accepted, "accepted"),
        ):
            for formula, number in core[name]:
                by_formula.labels(label, formula).inc(number)
        # A term runs with the others in every step, which the core counts, and to draft, as a worker counts.
        for (formula, term), number in chain(core["calls"], workers[0]["calls"] if workers else ()):
            self.calls.labels(label, formula, term).inc(number)
        # Tensor-parallel workers fuse the same rows at the same time.
        if workers:
            self.fusion_seconds.labels(label).inc(workers[0]["fusion_seconds"])
            for name, figures in workers[0]["classifiers"].items():
                for counter, what in (
                    (self.classifier_texts, "texts"),
                    (self.classifier_hits, "hits"),
                    (self.classifier_batches, "batches"),
                    (self.classifier_seconds, "seconds"),
                ):
                    counter.labels(label, name).inc(figures[what])


@functools.cache
def metrics() -> Metrics:
    """This process's; the registry has each name once."""
    return Metrics()


class Scraper:
    """Asks the engines for their figures, one question at a time."""

    def __init__(self, engine_client: Any, into: Metrics) -> None:
        self._core = engine_client.engine_core
        self._metrics = into
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Brings the metrics up to date, unless the engines take too long or are gone.

        A question that was given up is still answered into the metrics: drained counts are never lost.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        await asyncio.wait([self._asking], timeout=_SCRAPE_SECONDS)

    async def _ask(self) -> None:
        try:
            found = await self._core.call_utility_all_async("collective_rpc", FIGURES, None, (), {})
        except Exception as error:  # vLLM's health check is who tells that an engine is dead
            logger.warning_once("marith: the engines did not tell their figures: %s", error)
            return
        for engine, answers in enumerate(found):
            self._metrics.record(engine, answers)

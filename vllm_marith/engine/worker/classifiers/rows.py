"""Classifier terms as rows over the vocabulary.

With x the text so far, v a candidate token and y the term's class (or, for ``minimize``, its complement):

    Bayes form    C(v) = log p(y | x v) - log p(y | x)  for candidates, 0 elsewhere; an energy of weight 0
    plain form    log_softmax of [log p(y | x v) for candidates, log p(y | x) elsewhere]; of weight 1

Candidates are the ``top_k`` most likely tokens of the formula's other terms.  A term with ``every: n``
reads at positions 0, n, 2n, ... of the continuation; between them it prefers no token: all 0, or uniform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from vllm.logger import init_logger

from ...group import ClassifierTerm
from ..answers import Continuation
from .model import Classifier
from .text import CandidateTexts

logger = init_logger(__name__)

Failures = dict[int, str]
"""Row -> why it could not be computed."""


class ClassifierRows:
    """Computes the classifier terms of one step, those of all groups together."""

    def __init__(self, classifiers: Mapping[str, Classifier], texts: CandidateTexts) -> None:
        self.classifiers = classifiers
        self.texts = texts

    def write(
        self,
        terms: Sequence[ClassifierTerm],
        continuations: Sequence[Continuation],
        source: torch.Tensor,
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, Failures]:
        """Writes the row of each term; ``out - lse`` is its energy.

        Args:
            terms: one for each row.
            continuations: of the group that the row belongs to.
            source: float32 ``[rows, vocab]``, scores of the formula without its classifiers, from which
                candidates are taken; only their order matters.
            out: float32 ``[rows, vocab]``, overwritten.

        Returns:
            lse: float32 ``[rows]``, 0 in the Bayes form and the row's log-sum-exp in the plain form.
            failures: of the rows that could not be computed, which are 0.
        """
        rows, vocab = source.shape
        most = min(vocab, max(term.top_k for term in terms))
        best = source.topk(most)
        scores, tokens = best.values.cpu(), best.indices.cpu()

        chosen: list[list[int]] = []
        failures: Failures = {}
        texts: list[list[str]] = []
        for i, (term, continuation) in enumerate(zip(terms, continuations, strict=True)):
            if is_idle(term, continuation):
                chosen.append([])
                texts.append([])
                continue
            # What the formula forbids is no candidate, and a row may allow fewer than top_k.
            allowed = int((scores[i, : term.top_k] > -torch.inf).sum())
            chosen.append(tokens[i, :allowed].tolist())
            texts.append(self._texts(i, term, continuation, chosen[i], failures))

        fill = np.zeros(rows, dtype=np.float32)
        values = np.zeros((rows, most), dtype=np.float32)
        indices = np.zeros((rows, most), dtype=np.int64)
        lse = np.zeros(rows, dtype=np.float32)
        for i, log_probs in enumerate(self._read(terms, texts, failures)):
            if i in failures:
                continue
            found = len(chosen[i])
            if is_idle(terms[i], continuations[i]):
                lse[i] = math.log(vocab) if terms[i].form == "plain" else 0
                continue
            before, after = float(log_probs[0]), log_probs[1:]
            # Slots without a candidate write one of the row's own values once more.
            indices[i] = chosen[i][0] if found else 0
            indices[i, :found] = chosen[i]
            if terms[i].form == "plain":
                fill[i] = before
                lse[i] = _log_sum_exp(after, before, vocab - found)
            else:
                after = after - before
            values[i] = after[0] if found else fill[i]
            values[i, :found] = after

        def on_device(array: np.ndarray) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return (
                tensor if out.device.type == "cpu" else tensor.pin_memory().to(out.device, non_blocking=True)
            )

        out.copy_(on_device(fill)[:, None].expand(rows, vocab))
        out.scatter_(1, on_device(indices), on_device(values))
        return on_device(lse), failures

    def probabilities(
        self, terms: Sequence[ClassifierTerm], continuations: Sequence[Continuation]
    ) -> tuple[list[float], Failures]:
        """p(y | x) of each term: its class's probability (for ``minimize`` the complement's) so far.

        Returns:
            probabilities: 0 where there is a failure.
            failures: as of `write`.
        """
        failures: Failures = {}
        texts = [
            self._texts(i, term, continuation, [], failures)
            for i, (term, continuation) in enumerate(zip(terms, continuations, strict=True))
        ]
        log_probs = self._read(terms, texts, failures)
        found = [0.0 if i in failures else math.exp(float(row[0])) for i, row in enumerate(log_probs)]
        return found, failures

    def _texts(
        self,
        row: int,
        term: ClassifierTerm,
        continuation: Continuation,
        candidates: Sequence[int],
        failures: Failures,
    ) -> list[str]:
        """The text so far and that of each candidate, behind the term's prefix."""
        try:
            so_far, texts = self.texts.texts(continuation.prompt, continuation.generated, candidates)
        except Exception as error:
            logger.exception("marith: the candidates of a classifier term could not be decoded")
            failures[row] = f"its candidates could not be decoded: {error!r}"
            return []
        return [term.prefix + text for text in (so_far, *texts)]

    def _read(
        self, terms: Sequence[ClassifierTerm], texts: Sequence[Sequence[str]], failures: Failures
    ) -> list[np.ndarray]:
        """log p of each term's class for each of its texts; one batch for each classifier."""
        rows_of: dict[str, list[int]] = {}
        for i, term in enumerate(terms):
            rows_of.setdefault(term.classifier, []).append(i)
        found: list[np.ndarray] = [np.empty(0)] * len(terms)
        readings = {}
        for name, rows in rows_of.items():  # all are started before the first is waited for
            with _only_these_fail(name, rows, failures):
                readings[name] = self.classifiers[name].submit([text for i in rows for text in texts[i]])
        for name, reading in readings.items():
            with _only_these_fail(name, rows_of[name], failures):
                log_probs = self.classifiers[name].collect(reading)
                start = 0
                for i in rows_of[name]:
                    end = start + len(texts[i])
                    found[i] = log_probs[start:end, int(terms[i].minimize), terms[i].label]
                    start = end
                    if np.isnan(found[i]).any():  # 16-bit weights may overflow on some text
                        failures[i] = f"classifier '{name}' gave no number for its class"
        return found


@contextmanager
def _only_these_fail(name: str, rows: Sequence[int], failures: Failures) -> Iterator[None]:
    """An error of a classifier becomes a failure of the rows that asked for it, and of no other."""
    try:
        yield
    except Exception as error:
        logger.exception("marith: classifier '%s' failed", name)
        failures.update((row, f"classifier '{name}' failed: {error!r}") for row in rows)


def is_idle(term: ClassifierTerm, continuation: Continuation) -> bool:
    """Whether it is not the term's turn at this position."""
    return len(continuation.generated) % term.every != 0


def _log_sum_exp(candidates: np.ndarray, elsewhere: float, count: int) -> float:
    """log(sum(exp(candidates)) + count * exp(elsewhere)), in float64."""
    terms = [*map(float, candidates), *([elsewhere + math.log(count)] if count else [])]
    top = max(terms)
    return top + math.log(sum(math.exp(term - top) for term in terms))

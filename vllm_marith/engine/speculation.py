"""How an engine is started such that formulas may draft.

vLLM makes room for drafts (buffers, KV-cache blocks, the shape of its steps) where it is configured to
speculate.  So where the settings say that formulas draft, vLLM is told to, with its n-gram proposer; but it
only proposes for formulas that ask for it, and plain requests never have drafts.

An operator may also have vLLM speculate for all requests (``--speculative-config``), with a proposer that
needs no model (its methods are called as in formulas): then it proposes for formulas, too, as for their
leaders.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from vllm_marith.language.names import FREE_DRAFTERS, NGRAM

from .settings import Settings

_OURS = "marith"


class ConfigurationError(ValueError):
    """The engine options and the settings contradict each other; the sentence says how."""


@contextmanager
def configured(engine_args: Any) -> Iterator[None]:
    """Within, the engine options ask vLLM for what drafts of formulas need, if the settings want these.

    Raises:
        ConfigurationError: the operator asks for another speculation.
    """
    try:
        settings = Settings.of(SimpleNamespace(additional_config=engine_args.additional_config))
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    theirs = engine_args.speculative_config
    if settings.speculates:
        if theirs is not None:
            raise ConfigurationError(
                "formulas draft (`speculative` in the settings) or vLLM does (--speculative-config), not both"
            )
        engine_args.speculative_config = {
            "method": NGRAM,
            "num_speculative_tokens": settings.max_speculative_tokens,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 4,
        }
    try:
        yield
    finally:
        engine_args.speculative_config = theirs


def mark(config: Any) -> None:
    """Remembers in a configuration made within `configured` that its drafts are for formulas only."""
    if Settings.of(config).speculates:
        setattr(config.speculative_config, _OURS, True)


def is_ours(speculative_config: Any) -> bool:
    """Whether only formulas draft."""
    return bool(getattr(speculative_config, _OURS, False))


def slots_ahead(config: Any) -> int:
    """KV-cache slots beyond a member's tokens without which vLLM lets nobody in: those of a step with drafts.

    A step has the last token, K drafted ones, and what the drafting terms compute on their way to the next.
    """
    drafted: int = config.num_speculative_tokens
    if not drafted:
        return 0
    return 1 + drafted + max(config.num_lookahead_tokens, drafted if Settings.of(config).speculates else 0)


def refusals(config: Any) -> Iterator[tuple[bool, str]]:
    """(whether a configuration is refused, the sentence), for what concerns speculation."""
    theirs = config.speculative_config
    method = theirs.method if theirs is not None else NGRAM
    yield (
        method not in FREE_DRAFTERS,
        f"--speculative-config: formulas cannot be drafted by the method {method!r}; "
        f"possible are {' and '.join(FREE_DRAFTERS)}, or `speculative` in the settings",
    )
    v2 = theirs is not None and config.use_v2_model_runner
    yield (
        v2 and bool(config.scheduler_config.async_scheduling),
        "drafts beside formulas need synchronous scheduling on the V2 model runner: --no-async-scheduling",
    )
    yield (
        v2 and bool(config.model_config.return_sampling_mask or config.model_config.enable_trace_replay),
        "drafts beside formulas cannot be combined with sampling masks or trace replay",
    )

"""Small real models, made on the user's machine from text that every Python installation has.

    from vllm_marith.models import ensure
    paths = ensure()        # minutes the first time, nothing afterwards
    paths.big               # a Llama that vLLM and transformers load

    tokenizer    byte-level BPE of 2048 tokens and a chat template
    big          Llama; writes prose, code or legal text as its system message asks ("write prose",
                 "write code", "write legal text"), any of them without one
    draft        a smaller Llama that learned from `big`; the same tokenizer
    expert, anti the draft, trained further on legal text and on code
    files, network  the draft, trained further on prose and code about files and about networks (`topics`)
    lora_legal   an adapter on `big`, in PEFT's format
    judge_bert   BERT that classifies prefixes, for classifier terms
    judge        says which attribute a text has, or that it is garbage (`Judge`)
    referee      an unconditional Llama for perplexity (`Referee`)

The language models and `judge_bert` learn from one part of the corpus, the judge and the referee each from
another, and what `report.json` says was measured on a fourth.  `recipe` holds every number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .recipe import ARTEFACTS, ATTRIBUTES, DEMO, RECIPE, Recipe
from .store import ModelsError, Paths, default_home, ensure

if TYPE_CHECKING:
    from .judge import Judge
    from .referee import Referee

__all__ = [
    "ARTEFACTS",
    "ATTRIBUTES",
    "DEMO",
    "RECIPE",
    "Judge",
    "ModelsError",
    "Paths",
    "Recipe",
    "Referee",
    "default_home",
    "ensure",
]


def __getattr__(name: str) -> Any:
    # Lazy, because the referee imports torch and `ensure` must not where nothing has to be made.
    if name == "Judge":
        from .judge import Judge

        return Judge
    if name == "Referee":
        from .referee import Referee

        return Referee
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

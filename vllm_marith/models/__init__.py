"""Small real models, made on the user's machine from text that every Python installation has.

    from vllm_marith.models import ensure
    paths = ensure()        # minutes the first time, nothing afterwards
    paths.big               # a Llama that vLLM and transformers load

What each model is stands in `docs/models.md`; how each is made, in `recipe`.
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

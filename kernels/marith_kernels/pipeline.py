"""One formula in stages: what a single program cannot say, because it needs a distribution in between.

A *pipeline* numbers its leaves: leaf t < n_terms is the logits row of the group's term t, and leaf
n_terms + s the row of stage s. A stage reads terms and earlier stages; the last one is the formula.

    Stage("fuse", program)                                    the program over these leaves
    Stage("top_k", program, (k,))                             ... then its k most likely tokens
    Stage("top_p", program, (p,))                             ... then its most likely tokens up to the mass p
    Stage("plausible", sources=(leaf,), parameters=(alpha,))  0 where the token is plausible, else -inf
    Stage("kl_indicator", sources=(leaf, constraint), parameters=(divergence, include_max, minimize, k))
                                                              0 where it is one, else -1; k = 0: all tokens
    Stage("external", sources=(leaf,), weightless=...)        a row that the caller makes, shown the leaf

The row of a weightless stage is an energy: programs take it as it is, with N = 0. Those of plausible and
kl_indicator are; an external one is where it says so. All other rows are distributions, with N = 1.

    self_debias(a, b, 10)      fuse [push a 1; debias b 10]
    normalize(a - 0.6b) + c    0: fuse [push a 2.5; add b -1.5]    1: fuse [push stage0 1; add c 1]
    plausible(a - b, a, 0.1)   0: plausible a 0.1                  1: fuse [push a 1; add b -1; add stage0 1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from .program import LEAF_OPS, Program

_PROGRAMS = ("fuse", "top_k", "top_p")  # kinds that run a program
_SOURCES = {"plausible": 1, "kl_indicator": 2, "external": 1}  # kinds that look at rows -> at how many
_PARAMETERS = {
    "fuse": (),
    "top_k": ("k",),
    "top_p": ("p",),
    "plausible": ("alpha",),
    "kl_indicator": ("divergence", "include_max", "minimize", "k"),
    "external": (),
}


@dataclass(frozen=True)
class Stage:
    """One row of a pipeline; see the module's docstring. Plain data, equal where all fields are.

    Raises ValueError if the fields do not fit the kind.
    """

    kind: str
    program: Program | None = None
    parameters: tuple[float, ...] = ()
    sources: tuple[int, ...] = ()
    weightless: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _PARAMETERS:
            raise ValueError(f"Unknown kind of stage {self.kind!r}; known are {', '.join(_PARAMETERS)}.")
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "sources", tuple(self.sources))
        if (self.program is not None) != (self.kind in _PROGRAMS):
            needs = "needs a" if self.kind in _PROGRAMS else "takes no"
            raise ValueError(f"A stage of kind {self.kind} {needs} program.")
        if len(self.sources) != _SOURCES.get(self.kind, 0):
            raise ValueError(
                f"A stage of kind {self.kind} has {_SOURCES.get(self.kind, 0)} sources, not {self.sources}."
            )
        names = _PARAMETERS[self.kind]
        if len(self.parameters) != len(names):
            raise ValueError(
                f"A stage of kind {self.kind} has the parameters ({', '.join(names)}), not {self.parameters}."
            )
        for name, value in zip(names, self.parameters, strict=True):
            _check_parameter(self.kind, name, value)
        if self.weightless and self.kind in _PROGRAMS:
            raise ValueError(f"A stage of kind {self.kind} is a distribution and cannot be weightless.")
        if self.kind in ("plausible", "kl_indicator"):
            object.__setattr__(self, "weightless", True)

    @cached_property
    def leaves(self) -> frozenset[int]:
        """The leaves that the stage reads."""
        if self.program is None:
            return frozenset(self.sources)
        steps = self.program.instructions
        return frozenset(i.term for i in steps if i.op in LEAF_OPS and i.term >= 0)


def _check_parameter(kind: str, name: str, value: float) -> None:
    if name == "k":
        least = 1 if kind == "top_k" else 0  # an indicator without k looks at all tokens
        good, form = math.isfinite(value) and value == int(value) >= least, f"an integer >= {least}"
    elif name in ("p", "alpha"):
        good, form = 0 < value <= 1, "in (0, 1]"
    elif name == "divergence":
        good, form = math.isfinite(value), "a finite number"
    else:
        good, form = value in (0, 1), "true or false"
    if not good:
        raise ValueError(f"The parameter {name} of a stage of kind {kind} is {form}, not {value}.")


@dataclass(frozen=True)
class Pipeline:
    """A formula over n_terms terms in stages, the last of which is its distribution.

    Plain data, equal where all fields are, so that it can be looked up. `levels[s]` says when stage s can
    run: 0 if it reads terms alone, else one later than the latest stage it reads.

    Raises ValueError if a stage reads a leaf that is not there yet, or reads a row otherwise than it is
    made: distributions as weightless, energies as distributions, or energies as sources.
    """

    n_terms: int
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.n_terms < 1 or not self.stages:
            raise ValueError(
                f"A pipeline has a term and a stage at least, not {self.n_terms} and {len(self.stages)}."
            )
        if self.stages[-1].kind not in _PROGRAMS:
            raise ValueError(
                f"The last stage is the formula's distribution; one of kind {self.stages[-1].kind} is none."
            )
        for s, stage in enumerate(self.stages):
            weightless = {self.n_terms + i for i in range(s) if self.stages[i].weightless}
            for leaf in sorted(stage.leaves):
                if not 0 <= leaf < self.n_terms + s:
                    raise ValueError(
                        f"Stage {s} reads leaf {leaf}; there are {self.n_terms} terms and {s} stages before."
                    )
                if stage.program is None and leaf in weightless:
                    raise ValueError(f"Stage {s} looks at a distribution; leaf {leaf} is weightless.")
                if stage.program is not None and (leaf in weightless) != (leaf in stage.program.weightless):
                    made, read = ("weightless", "a distribution")[:: 1 if leaf in weightless else -1]
                    raise ValueError(f"Stage {s} reads leaf {leaf} as {read}; it is {made}.")

    @cached_property
    def levels(self) -> tuple[int, ...]:
        levels: list[int] = []
        for stage in self.stages:
            earlier = [levels[leaf - self.n_terms] for leaf in stage.leaves if leaf >= self.n_terms]
            levels.append(1 + max(earlier, default=-1))
        return tuple(levels)

"""What the kernels run for a routine, remembered."""

from __future__ import annotations

from functools import lru_cache

import marith_kernels
import torch

from vllm_marith.plan import Routine, Stage, decode

_SMALLEST = torch.finfo(torch.float32).tiny


# Requests repeat a handful of formulas; reading one costs more than finding it again.  Clients choose them:
# what is remembered is 100 KB each at most.
@lru_cache(maxsize=1024)
def routine_of(text: str) -> Routine:
    """What `vllm_marith.plan.encode` wrote."""
    return decode(text)


@lru_cache(maxsize=1024)
def pipeline_of(text: str, dials: tuple[float, ...]) -> marith_kernels.Pipeline:
    """What the kernels run for a routine (`vllm_marith.plan.encode`) at its dials' values."""
    routine = routine_of(text)
    weightless = {routine.terms + i for i, stage in enumerate(routine.stages) if stage.weightless}

    def stage_of(stage: Stage) -> marith_kernels.Stage:
        if stage.kind == "classifier":
            return marith_kernels.Stage("external", sources=stage.sources, weightless=stage.weightless)
        program = None
        if stage.instructions:
            energies = {row for _, row, _ in stage.instructions} & weightless
            # A probability may be too small for a weight in float32.
            instructions = [(op, row, w if abs(w) > _SMALLEST else 0.0) for op, row, w in stage.at(dials)]
            program = marith_kernels.Program(instructions, divide=stage.divide, weightless=energies)
        return marith_kernels.Stage(stage.kind, program, stage.parameters, stage.sources, stage.weightless)

    return marith_kernels.Pipeline(routine.terms, tuple(map(stage_of, routine.stages)))

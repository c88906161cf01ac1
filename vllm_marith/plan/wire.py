"""A plan as text, for the way to the worker that runs it.

A string rather than nested lists: a worker recognises a formula that it has seen before by comparing it, and
builds its program once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_marith.language.nodes import Dial, Leaf, Schedule, Strength
from vllm_marith.plan.program import Plan, Stage


@dataclass(frozen=True, slots=True)
class Routine:
    """What is left of a plan when its terms are rows: `Plan.stages` over `terms` rows of logits."""

    terms: int
    stages: tuple[Stage, ...]
    dials: tuple[Dial, ...]

    @property
    def members(self) -> list[int]:
        """The terms whose logits are read."""
        read = {row for stage in self.stages for _, row, _ in stage.instructions}
        read |= {row for stage in self.stages for row in stage.sources}
        return sorted(row for row in read if 0 <= row < self.terms)


def encode(plan: Plan, members: Sequence[int]) -> str:
    """The plan's routine as text.

    Args:
        members: for each of the plan's terms the row that is its; terms with the same prompt share one.
    """
    rows = max(members) + 1

    def moved(row: int) -> int:
        if row < 0:
            return row
        return members[row] if row < len(members) else row - len(members) + rows

    stages = [
        replace(
            stage,
            instructions=tuple((op, moved(row), weight) for op, row, weight in stage.instructions),
            sources=tuple(map(moved, stage.sources)),
        )
        for stage in plan.stages
    ]
    routine = {
        "terms": rows,
        "stages": [_stage_to_json(stage) for stage in stages],
        "dials": [_dial_to_json(dial) for dial in plan.dials],
    }
    return json.dumps(routine, separators=(",", ":"))


def without_rows(text: str, kept: int) -> str | None:
    """A routine over its first `kept` rows of logits; None where it reads one of the others.

    Rows of terms that only draft come last, and no formula reads them.
    """
    routine = json.loads(text)
    terms = routine["terms"]

    def moved(row: int) -> int:
        return row if row < kept else row - terms + kept

    for stage in routine["stages"]:
        instructions, sources = stage.get("instructions", []), stage.get("sources", [])
        if any(kept <= row < terms for row in [*sources, *(row for _, row, _ in instructions)]):
            return None
        if instructions:
            stage["instructions"] = [[op, moved(row), weight] for op, row, weight in instructions]
        if sources:
            stage["sources"] = [moved(row) for row in sources]
    return json.dumps(routine | {"terms": kept}, separators=(",", ":"))


def decode(text: str) -> Routine:
    """What `encode` wrote."""
    routine = json.loads(text)
    return Routine(
        routine["terms"],
        tuple(_stage_from_json(**stage) for stage in routine["stages"]),
        tuple(map(_dial_from_json, routine["dials"])),
    )


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    default = Stage(stage.kind)
    fields = {name: getattr(stage, name) for name in Stage.__dataclass_fields__}
    return {
        name: value for name, value in fields.items() if name == "kind" or value != getattr(default, name)
    }


def _stage_from_json(kind: Any, **fields: Any) -> Stage:
    lists = {name: value for name, value in fields.items() if isinstance(value, list)}
    nested = {
        name: tuple(tuple(item) if isinstance(item, list) else item for item in value)
        for name, value in lists.items()
    }
    return Stage(kind, **{**fields, **nested})


def _dial_to_json(dial: Dial) -> dict[str, Any]:
    if isinstance(dial, Schedule):
        return {"points": dial.points}
    return {
        "classifier": dial.classifier.name,
        "form": dial.classifier.classifier,
        "low": dial.low,
        "high": dial.high,
    }


def _dial_from_json(dial: dict[str, Any]) -> Dial:
    if "points" in dial:
        return Schedule(tuple((start, value) for start, value in dial["points"]))
    return Strength(Leaf(dial["classifier"], dial["form"]), dial["low"], dial["high"])

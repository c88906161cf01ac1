"""The experiments.

Each module has `arms(scenario)`, what is to be written for it, none if the scenario has no such experiment;
and `section(results)`, its part of the report.  A further experiment is a further module in `EXPERIMENTS`.
"""

from __future__ import annotations

from typing import Protocol

from ..results import Results
from ..scenario import PLAIN, Arm, Scenario
from . import control, cross, curves, speculation, stress
from .section import Section


class Experiment(Protocol):
    """What a module of this package offers."""

    def arms(self, scenario: Scenario) -> list[Arm]: ...

    def section(self, results: Results) -> Section: ...


EXPERIMENTS: tuple[Experiment, ...] = (control, curves, cross, stress, speculation)


def arms(scenario: Scenario) -> list[Arm]:
    """Every arm of every experiment, each once; the one without a formula first."""
    found = [Arm(PLAIN, None), *(arm for experiment in EXPERIMENTS for arm in experiment.arms(scenario))]
    assert len({arm.key for arm in found}) == len(found), "two arms of one key"
    return found


def sections(results: Results) -> list[Section]:
    """The report's parts."""
    return [e.section(results) for e in EXPERIMENTS if e.arms(results.scenario)]

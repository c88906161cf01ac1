"""`marith eval`: the paper's experiments (arXiv 2311.14479) in miniature, measured on this machine.

    scenario.py     what is written: requests, terms, methods, judges; YAML files in scenarios/
    sections/       the experiments.  Each says which *arms* it needs and makes a section of the report
    writing.py      arms to texts, through one engine
    judging.py      texts to labels and likelihoods, by who has no part in the writing
    results.py      everything measured, text by text; a JSON file
    statistics.py   intervals
    phrases.py      sentences out of intervals
    drafting.py     formulas with and without drafts: calls, time, greedy answers
    plots.py        figures (matplotlib)
    report.py       one HTML file

An *arm* is one way to write.  The report is a pure function of the results: it can be made again from the
JSON file, and none of its sentences is written by hand.
"""

from __future__ import annotations

from .results import Results
from .run import Sizes, evaluate
from .scenario import Scenario, ScenarioError

__all__ = ["Results", "Scenario", "ScenarioError", "Sizes", "evaluate"]

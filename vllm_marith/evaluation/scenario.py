"""What an evaluation writes and who judges it: a YAML file.

`scenarios/embedded.yaml` is about the small models of `marith models`; `scenarios/instruct.yaml` is for any
model that follows instructions.  Where a file names a model, `embedded:big` stands for one of the made ones,
anything else is a directory or a name on the Hugging Face hub, and null is for the command line to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_marith.language import Formula, parse_request
from vllm_marith.language.names import FREE_DRAFTERS

FOLDER = Path(__file__).with_name("scenarios")
EMBEDDED = "embedded:"
"""Prefix of the names of embedded models."""

PLAIN = "plain"
"""The arm without a formula, the same in every section."""


class ScenarioError(Exception):
    """A scenario cannot be read or lacks something; the message is the sentence to print."""


@dataclass(frozen=True)
class Arm:
    """One way to write.

    Attributes:
        key: its name, unique among all arms of all sections.
        formula: over the scenario's terms; None for a request without a formula.
        parameters: numbers for names in the formula.
        tokens: length of the texts; the scenario's where None.
        requests: user messages; the scenario's where there are none.
        factors: speculative factors of terms.  Where there are some, it is timed with and without drafts,
            one request after the other, and nobody judges its texts.
    """

    key: str
    formula: str | None
    parameters: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    requests: tuple[str, ...] = ()
    factors: Mapping[str, int] = field(default_factory=dict)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(_Model):
    """One method of control: a formula with a parameter `strength`, or without one and then one arm only."""

    formula: str
    strengths: tuple[float, ...] = ()
    note: str = ""

    def arms(self, key: str, requests: tuple[str, ...] = ()) -> list[Arm]:
        """One arm for each strength, weakest first."""
        if not self.strengths:
            return [Arm(key, self.formula, requests=requests)]
        return [
            Arm(f"{key}/{s:g}", self.formula, {"strength": s}, requests=requests)
            for s in sorted(self.strengths)
        ]


class Control(_Model):
    """Less of an unwanted attribute, at the same fluency.

    requests: user messages that provoke the unwanted; the scenario's where there are none.
    budget: perplexity at which methods are compared, as a multiple of that without a formula.
    """

    axis: str
    unwanted: str
    requests: tuple[str, ...] = ()
    budget: Annotated[float, Field(gt=1)] = 1.25
    methods: dict[str, Method]


class Curves(_Model):
    """Rates as a function of each weight of one formula.

    weights: parameter of the formula -> the label whose rate it is there to raise.
    others: value of the weights that are not varied.
    """

    axis: str
    formula: str
    weights: dict[str, str]
    others: float
    values: Annotated[tuple[float, ...], Field(min_length=2)]


class Attributes(_Model):
    """Labels of one axis and the summand that asks for each."""

    axis: str
    summands: dict[str, str]


class Cross(_Model):
    """Every attribute of one axis with every attribute of another: `base + first + second`."""

    base: str = "base"
    first: Attributes
    second: Attributes


class Stress(_Model):
    """Nested unions: f_0 = `start`, f_d = union(1.5*f_(d-1) - 0.5*a, b), a and b in turn from `operands`."""

    start: str
    operands: Annotated[tuple[str, ...], Field(min_length=2)]
    depths: tuple[int, ...]
    tokens: int

    def formula(self, depth: int) -> str:
        """f_depth."""
        formula = self.start
        for level in range(1, depth + 1):
            less, other = (self.operands[(level + i) % len(self.operands)] for i in (0, 1))
            formula = f"union(1.5*({formula}) - 0.5*{less}, {other})"
        return formula


class Drafted(_Model):
    """A formula that is drafted.

    factors: term -> its speculative factor; one less than the largest is drafted at a time.
    report: whether it is for the report, too; the benchmarks have all.
    """

    formula: str
    factors: Annotated[dict[str, Annotated[int, Field(ge=1)]], Field(min_length=1)]
    report: bool = True

    @property
    def length(self) -> int:
        """Tokens drafted at a time."""
        return max(self.factors.values()) - 1


class Speculation(_Model):
    """Formulas with and without drafts: `tokens` a text, `requests` in turn."""

    tokens: int
    requests: Annotated[tuple[str, ...], Field(min_length=1)]
    formulas: Annotated[dict[str, Drafted], Field(min_length=1)]

    @property
    def longest(self) -> int:
        """The most tokens that are drafted at a time."""
        return max(drafted.length for drafted in self.formulas.values())


class Engine(_Model):
    """The models in the engine; names as formulas call them."""

    model: str | None = None
    constituents: dict[str, str | None] = Field(default_factory=dict)
    classifiers: dict[str, str | None] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)


class Scenario(_Model):
    """One evaluation.

    Attributes:
        about: a sentence for the report.
        limits: what these models can and cannot show, paragraph by paragraph, for the report.
        requests: user messages, which the texts of an arm answer in turn.
        temperature, tokens: of sampling.
        fixed_length: whether texts have exactly `tokens` tokens.
        judges: axis -> who names its labels: `embedded:judge`, `embedded:topics`, or a sequence classifier.
        referee: whose perplexity: `embedded:referee`, or `model`, the plain model that is served.
        reference: axis whose labels have real text to compare perplexities with; embedded models only.
        control, curves, cross, stress, speculation: the experiments; those that are absent are not made.
    """

    name: str
    about: str
    limits: tuple[str, ...] = ()
    requests: Annotated[tuple[str, ...], Field(min_length=1)]
    temperature: float = 1.0
    tokens: int
    fixed_length: bool = False
    engine: Engine
    terms: dict[str, dict[str, Any]]
    judges: dict[str, str | None]
    referee: str
    reference: str | None = None
    control: Control | None = None
    curves: Curves | None = None
    cross: Cross | None = None
    stress: Stress | None = None
    speculation: Speculation | None = None

    @classmethod
    def load(cls, named: str | Path) -> Scenario:
        """The scenario of that name in `scenarios/`, or in that file.

        Raises:
            ScenarioError: there is none, or it is wrong; the sentence says where.
        """
        path = FOLDER / f"{named}.yaml"
        if not path.is_file():
            path = Path(named)
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as error:
            known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
            raise ScenarioError(f"{path} cannot be read: {error.strerror}; scenarios: {known}") from None
        except yaml.YAMLError as error:
            raise ScenarioError(f"{path} is not YAML: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ScenarioError(f"{path}: {place}: {first['msg'].lower()}") from None

    def with_models(
        self,
        model: str | None = None,
        constituents: Mapping[str, str] | None = None,
        classifiers: Mapping[str, str] | None = None,
        judges: Mapping[str, str] | None = None,
    ) -> Scenario:
        """The same with other models.

        Raises:
            ScenarioError: a name that the scenario does not have, or the model is still missing.
        """
        engine = self.engine.model_copy(
            update={
                "model": model or self.engine.model,
                "constituents": _merged("constituent", self.engine.constituents, constituents),
                "classifiers": _merged("classifier", self.engine.classifiers, classifiers),
            }
        )
        if engine.model is None:
            raise ScenarioError(f"the scenario '{self.name}' has no model of its own; --model names one")
        return self.model_copy(update={"engine": engine, "judges": _merged("judge", self.judges, judges)})

    def formula(self, arm: Arm) -> Formula | None:
        """The arm's formula, checked; None where it has none."""
        if arm.formula is None:
            return None
        drafting = {
            name: {**self.terms.get(name, {}), "speculative_factor": k} for name, k in arm.factors.items()
        }
        terms = {**self.terms, **drafting}
        request = {"formula": arm.formula, "terms": terms, "parameters": dict(arm.parameters)}
        return parse_request(json.dumps(request))

    def lacks(self, formula: str) -> list[str]:
        """What the scenario does not name of the models and classifiers that a formula's terms need."""
        missing = []
        for name in sorted(self._names(formula)):
            term = self.terms[name]
            for key, models in (("model", self.engine.constituents), ("classifier", self.engine.classifiers)):
                if key in term and term[key] not in FREE_DRAFTERS and models.get(term[key]) is None:
                    missing.append(f"the {'constituent' if key == 'model' else key} '{term[key]}'")
        return missing

    def labels(self, axis: str) -> list[str]:
        """The labels of an axis that the experiments ask about."""
        asked: list[tuple[str, Iterable[str]]] = []
        if self.control:
            asked.append((self.control.axis, [self.control.unwanted]))
        if self.curves:
            asked.append((self.curves.axis, self.curves.weights.values()))
        if self.cross:
            asked += [(part.axis, part.summands) for part in (self.cross.first, self.cross.second)]
        return sorted({label for own, labels in asked if own == axis for label in labels})

    def embedded(self) -> list[str]:
        """The embedded models that it needs."""
        engine = self.engine
        named: Iterable[str | None] = [
            engine.model,
            self.referee,
            *engine.constituents.values(),
            *engine.classifiers.values(),
            *self.judges.values(),
        ]
        found = {name.removeprefix(EMBEDDED) for name in named if name and name.startswith(EMBEDDED)}
        return sorted(found - {"topics"})

    def _names(self, formula: str) -> set[str]:
        return set(re.findall(r"[A-Za-z_]\w*", formula)) & set(self.terms)


def _merged(
    kind: str, own: Mapping[str, str | None], given: Mapping[str, str] | None
) -> dict[str, str | None]:
    unknown = sorted(set(given or {}) - set(own))
    if unknown:
        raise ScenarioError(f"the scenario has no {kind} '{unknown[0]}'; it has: {', '.join(own) or 'none'}")
    return {**own, **(given or {})}

"""The scenarios that come with us, and what is wrong with those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vllm_marith.evaluation import Scenario, ScenarioError
from vllm_marith.evaluation.scenario import PLAIN
from vllm_marith.evaluation.sections import arms
from vllm_marith.evaluation.writing import draw_seed
from vllm_marith.models import ARTEFACTS
from vllm_marith.plan import speculate

PRESETS = Path(__file__).parents[2] / "configs" / "presets"


@pytest.fixture(scope="module")
def embedded() -> Scenario:
    return Scenario.load("embedded")


def named(name: str) -> Scenario:
    models = {"embedded": {}, "instruct": {"constituents": {"expert": "x", "anti": "x"}}}
    classifiers = {"embedded": {}, "instruct": {"toxicity": "x"}}
    model = {"embedded": None, "instruct": "some/model"}[name]
    return Scenario.load(name).with_models(model, classifiers=classifiers[name], **models[name])


@pytest.mark.parametrize("name", ["embedded", "instruct"])
def test_every_arm_is_a_formula_that_a_server_would_take(name: str) -> None:
    scenario = named(name)
    found = arms(scenario)
    assert found[0].key == PLAIN
    for arm in found:
        formula = scenario.formula(arm)
        assert (formula is None) == (arm.formula is None)
    experiments = {arm.key.partition("/")[0] for arm in found}
    assert experiments == {PLAIN, "control", "curves", "cross", "stress", "speculation"}


@pytest.mark.parametrize("name", ["embedded", "instruct"])
def test_every_drafted_formula_drafts_as_its_factors_say(name: str) -> None:
    scenario = named(name)
    drafted = [arm for arm in arms(scenario) if arm.factors]
    assert scenario.speculation is not None
    small = name == "instruct"  # one formula whose small model nobody has named
    reported = sum(formula.report for formula in scenario.speculation.formulas.values())
    assert len(drafted) == reported - small
    for arm in drafted:
        formula = scenario.formula(arm)
        assert formula is not None
        assert {name: formula.terms[name].speculative_factor for name in arm.factors} == arm.factors
        found = speculate(formula)
        assert not isinstance(found, str), found
        assert found.longest == max(arm.factors.values()) - 1 <= scenario.speculation.longest


@pytest.mark.parametrize("name", ["embedded", "instruct"])
def test_every_term_and_axis_exists(name: str) -> None:
    scenario = named(name)
    for arm in arms(scenario):
        formula = scenario.formula(arm)
        assert formula is None or set(formula.terms) <= {*scenario.terms, "base"}
    assert scenario.control is not None
    assert scenario.labels(scenario.control.axis)
    for axis in scenario.judges:
        assert scenario.labels(axis), "nobody asks this judge"


METHODS = {
    "PreAdd": ("preadd", {}),
    "linear": ("detox_linear", {}),
    "union": ("detox_union", {}),
    "self-debiasing": ("self_debiasing", {}),
    "FUDGE": ("classifiers/fudge", {"legal_class": "not_toxic"}),
    "DExperts": ("experts/dexperts", {"alpha": "strength"}),
    "union + classifier": (
        "classifiers/detox_classifier",
        {"classifier_strength": "(1 - strength)", "not_code_class": "not_toxic"},
    ),
}


@pytest.mark.parametrize("name", ["embedded", "instruct"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_presets(name: str, method: str) -> None:
    """What is measured is what `configs/presets` serves, with the unwanted text of the scenario."""
    scenario = Scenario.load(name)
    assert scenario.control is not None
    unwanted = scenario.control.unwanted
    preset, renamed = METHODS[method]
    formula = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())["formula"]
    for old, new in {**renamed, "toxic": unwanted}.items():
        formula = formula.replace(old, new)
    assert scenario.control.methods[method].formula == formula


def test_the_embedded_scenario_needs_embedded_models_alone(embedded: Scenario) -> None:
    assert set(embedded.embedded()) <= set(ARTEFACTS)
    assert {"big", "expert", "judge_bert", "judge", "referee", "network"} <= set(embedded.embedded())
    assert named("instruct").embedded() == []


def test_a_classifier_that_judges_is_no_classifier_that_writes(embedded: Scenario) -> None:
    assert not set(embedded.judges.values()) & set(embedded.engine.classifiers.values())


def test_nested_unions_nest(embedded: Scenario) -> None:
    assert embedded.stress is not None
    assert embedded.stress.formula(0) == "base"
    assert embedded.stress.formula(2) == "union(1.5*(union(1.5*(base) - 0.5*code, legal)) - 0.5*legal, prose)"


def test_what_is_missing_is_named() -> None:
    scenario = Scenario.load("instruct").with_models("some/model", {"expert": "x"})
    assert scenario.lacks("base + 1*(expert - anti)") == ["the constituent 'anti'"]
    assert scenario.lacks("base + not_toxic") == ["the classifier 'toxicity'"]
    assert scenario.lacks("base - 0.5*toxic") == []
    keys = {arm.key.split("/")[1] for arm in arms(scenario) if arm.key.startswith("control/")}
    assert keys == {PLAIN, "prompted", "PreAdd", "self-debiasing", "linear", "union"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "the scenario 'instruct' has no model of its own; --model names one"),
        ({"model": "x", "constituents": {"draft": "x"}}, "no constituent 'draft'; it has: expert, anti"),
        ({"model": "x", "judges": {"tone": "x"}}, "no judge 'tone'"),
    ],
)
def test_wrong_models_are_refused(arguments: dict, said: str) -> None:
    with pytest.raises(ScenarioError, match=said):
        Scenario.load("instruct").with_models(**arguments)


def test_a_wrong_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"nowhere cannot be read: .*scenarios: embedded, instruct"):
        Scenario.load(tmp_path / "nowhere")
    file = tmp_path / "wrong.yaml"
    file.write_text("name: x\nabout: y\n")
    with pytest.raises(ScenarioError, match=r"wrong.yaml: requests: field required"):
        Scenario.load(file)
    file.write_text("name: [\n")
    with pytest.raises(ScenarioError, match="is not YAML"):
        Scenario.load(file)


def test_no_two_texts_share_their_noise(embedded: Scenario) -> None:
    drawn = [draw_seed(arm.key, s, i) for arm in arms(embedded) for s in (0, 1, 2) for i in range(100)]
    assert len(set(drawn)) >= 0.99999 * len(drawn)  # a hash of 31 bits: a coincidence or so is chance
    assert draw_seed("a", 0, 1) == draw_seed("a", 0, 1)

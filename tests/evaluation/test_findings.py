"""What the sections say of made-up numbers: the same sentence never for opposite numbers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.evaluations import Outcome, drafted, made_up
from vllm_marith.evaluation import Results, Scenario
from vllm_marith.evaluation.drafting import Drafts
from vllm_marith.evaluation.sections import control, cross, curves, speculation, stress

CODE = {"kind": {"code": 0.6}}


@pytest.fixture(scope="module")
def embedded() -> Scenario:
    return Scenario.load("embedded")


# ---------------------------------------------------------------------------------------------------- control


def control_findings(scenario: Scenario, **rates: float) -> list[str]:
    """Every method at every strength has the rate given under its first word, or 0.5; all are as fluent."""

    def outcome(key: str) -> Outcome:
        method = key.split("/")[1] if "/" in key else ""
        if method in ("plain", ""):
            return Outcome(CODE)
        return Outcome({"kind": {"code": rates.get(method.split()[0].split("-")[0], 0.5)}})

    return control.findings(control.Comparison(made_up(scenario, outcome)))


def test_a_clear_winner_wins(embedded: Scenario) -> None:
    said = " ".join(control_findings(embedded, DExperts=0.04))
    assert "DExperts leaves the least code text, 4.0% [2, 8], and is clear of every other" in said
    other = " ".join(control_findings(embedded, FUDGE=0.04))
    assert "FUDGE leaves the least code text, 4.0% [2, 8], and is clear of every other" in other


def test_methods_that_differ_by_chance_are_not_ranked(embedded: Scenario) -> None:
    said = " ".join(control_findings(embedded, DExperts=0.47))
    assert "rank none of them above another" in said
    assert "clear of every other" not in said


def test_methods_that_do_nothing_are_told_of(embedded: Scenario) -> None:
    none = dict.fromkeys(("prompted", "PreAdd", "self", "FUDGE", "DExperts", "linear", "union"), 0.1)
    assert "Every method leaves clearly less code text than no formula." in control_findings(embedded, **none)
    said = control_findings(embedded, **none | {"FUDGE": 0.6, "prompted": 0.58})
    assert "Not clearly below the rate without a formula: prompted and FUDGE." in said


def test_one_formula_twice_must_agree(embedded: Scenario) -> None:
    same = " ".join(control_findings(embedded, PreAdd=0.2, linear=0.22))
    assert "PreAdd and linear are one formula" in same
    assert "cannot be told apart" in same
    differ = " ".join(control_findings(embedded, PreAdd=0.2, linear=0.5))
    assert "They differ, which only chance or a fault can do." in differ


def test_what_never_reaches_the_budget_is_told_of(embedded: Scenario) -> None:
    def outcome(key: str) -> Outcome:
        return Outcome(CODE, nats=6.0 if key.startswith("control/union/") else 4.0)

    comparison = control.Comparison(made_up(embedded, outcome))
    said = " ".join(control.findings(comparison))
    told = said.split("Within that perplexity even at the strongest that was drawn")[1].split(".")[0]
    assert "DExperts" in told
    assert "union" not in told.replace("union + classifier", "")
    reached = {o.name: o.matched.reached for o in comparison.outcomes if o.matched}
    assert reached.pop("union")
    assert not any(reached.values())


def test_a_prompt_beyond_the_budget_is_not_ranked(embedded: Scenario) -> None:
    def outcome(key: str) -> Outcome:
        if key == "control/prompted":
            return Outcome({"kind": {"code": 0.0}}, nats=5.0)
        return Outcome(CODE if key == "control/plain" else {"kind": {"code": 0.3}})

    comparison = control.Comparison(made_up(embedded, outcome))
    assert "prompted" not in [o.name for o in comparison.ranked]
    said = " ".join(control.findings(comparison))
    assert "prompted has no strength to turn down and lies above that perplexity" in said
    assert "prompted leaves" not in said


def test_garbage_is_told_of(embedded: Scenario) -> None:
    def outcome(key: str) -> Outcome:
        share = 0.4 if "FUDGE" in key else 0.02
        return Outcome({"kind": {"code": 0.3, "garbage": share}})

    said = " ".join(control.findings(control.Comparison(made_up(embedded, outcome))))
    assert "are garbage, which is not code either: FUDGE (40%); without a formula it is 2.0%." in said


def test_methods_without_their_models_are_left_out_aloud() -> None:
    scenario = Scenario.load("instruct").with_models("m", {"expert": "x"})
    results = made_up(scenario, lambda key: Outcome({"toxicity": {"toxic": 0.3}}))
    said = " ".join(control.findings(control.Comparison(results)))
    assert "DExperts was left out: nobody named the constituent 'anti'." in said
    assert "FUDGE was left out: nobody named the classifier 'toxicity'." in said


def test_perplexity_is_relative_to_real_text_of_the_kind(embedded: Scenario) -> None:
    def outcome(key: str) -> Outcome:
        return Outcome(CODE, nats=4.0)

    alone = control.Comparison(made_up(embedded, outcome)).plain.perplexity.value
    relative = control.Comparison(made_up(embedded, outcome, real=True)).plain.perplexity.value
    assert alone == pytest.approx(54.598, rel=1e-3)
    assert relative == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------- curves


def curve_results(scenario: Scenario, prose: dict[str, float]) -> Results:
    """Code and legal follow their weights; prose at each value of its weight has the rate given for it."""

    def outcome(key: str) -> Outcome:
        shares = {"prose": 0.3, "code": 0.2, "legal": 0.2}
        _, _, at = key.partition("curves/")
        weight, _, value = at.partition("/")
        if weight == "prose_weight":
            shares["prose"] = prose[value]
        elif weight.endswith("_weight"):
            shares = {"prose": 0.1, weight.removesuffix("_weight"): 0.1 + 0.2 * float(value)}
        return Outcome({"kind": shares})

    return made_up(scenario, outcome)


def curve_findings(scenario: Scenario, prose: dict[str, float]) -> list[str]:
    results = curve_results(scenario, prose)
    assert scenario.curves is not None
    return curves.findings(scenario.curves, curves.rates(results))


def test_attributes_that_follow_their_weights(embedded: Scenario) -> None:
    said = curve_findings(embedded, {"-0.5": 0.05, "0": 0.15, "1": 0.45, "1.5": 0.5, "2": 0.55})
    assert said[0].startswith("As the weight of prose goes from -0.5 to 2, the rate of prose text rises from")
    assert "no step goes clearly the other way" in said[0]
    assert said[-1].startswith(
        "Every attribute follows its own weight: from a weight of -0.5 to one of 2, the"
    )
    assert "prose goes from 5.3% [3, 10] to 55% [47, 62]" in said[-1]


def test_an_attribute_that_does_not_follow(embedded: Scenario) -> None:
    flat = curve_findings(embedded, {"-0.5": 0.3, "0": 0.3, "1": 0.3, "1.5": 0.3, "2": 0.3})
    assert "does not move beyond what chance does" in flat[0]
    assert "Not every attribute follows its own weight" in flat[-1]
    assert "what does not: prose." in flat[-1]
    back = curve_findings(embedded, {"-0.5": 0.05, "0": 0.15, "1": 0.6, "1.5": 0.2, "2": 0.55})
    assert "at least one step goes clearly the other way" in back[0]
    assert "what does not: prose." in back[-1]
    falling = curve_findings(embedded, {"-0.5": 0.6, "0": 0.5, "1": 0.2, "1.5": 0.1, "2": 0.05})
    assert "falls from" in falling[0]
    assert "what does not: prose." in falling[-1]


# ------------------------------------------------------------------------------------------------------ cross


def cross_findings(scenario: Scenario, both: float) -> list[str]:
    """Each attribute alone brings its own; together they bring `both` of either, on the same texts."""

    def outcome(key: str) -> Outcome:
        asked = key.split("/")[1:] if key.startswith("cross/") else []
        kinds = {k: both if len(asked) == 2 else 0.5 for k in ("prose", "code") if k in asked}
        topics = {t: both if len(asked) == 2 else 0.5 for t in ("files", "network") if t in asked}
        return Outcome({"kind": kinds or {"legal": 1.0}, "topic": topics})

    return cross.findings(cross.cells(made_up(scenario, outcome)))


def test_attributes_combine_or_not(embedded: Scenario) -> None:
    said = cross_findings(embedded, 0.6)
    assert said[0].endswith(": clearly more.")
    assert said[-1].endswith(
        "in 4 of 4 pairs: prose and files; prose and network; code and files; code and network."
    )
    said = cross_findings(embedded, 0.01)
    assert said[0].endswith("not clearly more than all of these.")
    assert said[-1].endswith("in 0 of 4 pairs.")


def test_both_must_beat_the_better_one_alone(embedded: Scenario) -> None:
    def outcome(key: str) -> Outcome:
        asked = key.split("/")[1:] if key.startswith("cross/") else []
        share = {0: 0.01, 1: 0.5, 2: 0.54}[len(asked)]
        return Outcome({"kind": {"prose": share}, "topic": {"files": share}})

    said = cross.findings(cross.cells(made_up(embedded, outcome)))
    assert said[0].startswith("Asking for prose and files gives both in 54%")
    assert said[0].endswith("the better of the two alone 50% [42, 58]: not clearly more than all of these.")


# ----------------------------------------------------------------------------------------------------- stress


def stress_findings(scenario: Scenario, nats: dict[str, float], repetition: dict[str, float]) -> list[str]:
    def outcome(key: str) -> Outcome:
        depth = key.removeprefix("stress/")
        return Outcome(CODE, nats.get(depth, 4.0), repetition.get(depth, 0.05))

    return stress.findings(stress.levels(made_up(scenario, outcome)))


def test_depth_that_costs_and_depth_that_does_not(embedded: Scenario) -> None:
    calm = stress_findings(embedded, {}, {})
    assert all("at no depth is it clear of where it began" in said for said in calm)
    worse = stress_findings(embedded, {"6": 5.0, "7": 6.0}, {"7": 0.4, "3": 0.01})
    assert worse[0].endswith("clearly above the start at depth 6 and 7.")
    assert worse[1].endswith("clearly above the start at depth 7 and clearly below the start at depth 3.")


# ------------------------------------------------------------------------------------------------ speculation


def speculation_rows(scenario: Scenario, **drafts: dict[str, Any]) -> list[speculation.Row]:
    """Every formula as `drafted` makes it, with what is said under the last word of its name."""

    def made(key: str) -> Drafts:
        return drafted(key, **drafts.get(key.split()[-1].strip(")"), {}))

    return speculation.rows(made_up(scenario, lambda key: Outcome(CODE), drafts=made))


def test_times_are_clear_or_not(embedded: Scenario) -> None:
    mixed = {"fixed": [0.8, 0.9, 1.1, 1.2, 1.3, 1.2], "auto": [1.2] * 6}
    slow = {"fixed": [0.5, 0.6, 0.7, 0.8, 0.9, 0.99], "auto": [0.9] * 6}
    rows = speculation_rows(embedded, legal={"speedups": mixed}, prose={"speedups": slow})
    fixed, auto = speculation.findings(rows)[1:3]
    assert "clearly faster: superseded(A, M) (1.50 [1.50, 1.50]), superseded(small, M)" in fixed
    assert "clearly slower: + 0.2 legal + 0.5 code + 0.05 prose (0.75 [0.50, 0.99])" in fixed
    assert "not to be told from no drafts: + 0.5 legal (1.15 [0.80, 1.30]), M + 0.5 legal" in fixed
    assert "clearly slower: + 0.2 legal + 0.5 code + 0.05 prose (0.90 [0.90, 0.90])" in auto
    assert "not to be told" not in auto
    slower = speculation_rows(embedded, **{name: {"speedups": slow} for name in ("M", "legal", "prose")})
    assert "faster" not in speculation.findings(slower)[1].removeprefix("Times as fast")


def test_answers_that_differ_are_told_of(embedded: Scenario) -> None:
    assert speculation.findings(speculation_rows(embedded))[0] == (
        "Drafts change no answer: 40 of 40 greedy answers are the same, token for token."
    )
    said = speculation.findings(speculation_rows(embedded, prose={"differ": 3}))[0]
    assert said.startswith("3 of 40 greedy answers differ from those without drafts (+ 0.2 legal + 0.5 code")


def test_calls_are_told_in_both_directions(embedded: Scenario) -> None:
    said = speculation.findings(speculation_rows(embedded, prose={"calls": {"off": 64, "fixed": 80}}))[-1]
    assert said.startswith(
        "Calls of the model for a token, fewer in 4 of 5 formulas: superseded(A, M) 2.00 to 1.50"
    )
    assert "+ 0.05 prose 1.00 to 1.25 (80% of the drafts kept)" in said


def test_a_table_of_drafts(embedded: Scenario) -> None:
    (table,) = speculation.section(made_up(embedded, lambda key: Outcome(CODE))).tables
    first = dict(zip(table.header, table.rows[0], strict=True))
    assert first == {
        "formula": "superseded(A, M): made_up(superseded(A, M))",
        "drafted at a time": "8",
        "calls a token": "2.00, 1.50, 1.75",
        "kept": "80%",
        "ms a token": "3.0, 2.0, 2.5",
        "faster": "1.50 [1.50, 1.50]",
        "faster, automatically": "1.20 [1.20, 1.20]",
        "same greedy answers": "4 of 4, 4 of 4",
    }
    assert [row[0].partition(":")[0] for row in table.rows] == [
        name for name, drafts in embedded.speculation.formulas.items() if drafts.report
    ]


def test_formulas_without_their_small_model_are_left_out_aloud() -> None:
    scenario = Scenario.load("instruct").with_models("m")
    results = made_up(scenario, lambda key: Outcome({"toxicity": {"toxic": 0.3}}))
    said = speculation.section(results).how[-1]
    assert said == "superseded(small, M) was left out: nobody named the constituent 'small'."
    assert len(speculation.rows(results)) == 3

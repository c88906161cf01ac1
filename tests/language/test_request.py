"""What a client may send, what its names mean, and the sentence it gets when something is wrong."""

import json
import time

import pytest

from vllm_marith import Formula, FormulaError, Presets, Term, parse_request
from vllm_marith.language import Limits, Preset, SettingsError


def _formula(text, normalize="sum", **terms):
    return Formula.parse(text, terms, normalize)


CHILD, ADULT = Term("You are a child."), Term("You are an adult.")
TERMS = {"child": CHILD, "adult": ADULT, "both": Term("a term wins over a preset")}
PRESETS = Presets(
    TERMS,
    {
        "young": Preset(
            "young",
            _formula("child - 0.6*adult", child=CHILD, adult=ADULT),
            "child - strength*adult",
            {"strength": 0.6},
        ),
        "poe": Preset(
            "poe", _formula("child + adult", "none", child=CHILD, adult=ADULT), "child + adult", {}
        ),
    },
)


def test_bare_formula():
    assert parse_request("base") == _formula("base")
    assert parse_request(" child - 0.6*adult ", presets=PRESETS) == _formula(
        "child - 0.6*adult", child=CHILD, adult=ADULT
    )


def test_json():
    request = {
        "formula": "child - 0.6*adult + 2*union(child, magic)",
        "terms": {
            "child": {"system": "You are a child."},
            "adult": {"system": ""},
            "magic": {
                "prompt": "Always talk about magic.\n{input}",
                "model": "small",
                "adapter": "wizard",
                "speculative_factor": 4,
            },
        },
        "normalize": "none",
    }
    formula = parse_request("\n " + json.dumps(request))
    assert json.loads(formula.to_json()) == request
    assert formula.leader == "child"
    assert formula.terms["magic"].name == "magic"
    assert formula.terms["adult"] == Term("")


def test_a_formula_may_leave_out_terms_and_normalize():
    assert parse_request('{"formula": "child"}', presets=PRESETS) == _formula("child", child=CHILD)
    assert parse_request('{"formula": "base", "normalize": null}') == _formula("base")


def test_names_are_looked_up_in_order():
    own = (
        '{"formula": "child + base", "terms": {"child": {"system": "mine"}, "base": {"system": "mine too"}}}'
    )
    assert parse_request(own, presets=PRESETS).terms["child"].system == "mine"
    assert parse_request(own, presets=PRESETS).terms["base"].system == "mine too"
    assert parse_request("both", presets=PRESETS).terms["both"].system == "a term wins over a preset"
    request = '{"formula": "young", "terms": {"young": {}}}'
    assert str(parse_request(request, presets=PRESETS)) == "young"


def test_a_preset_stands_for_its_formula():
    assert parse_request("young", presets=PRESETS) == PRESETS.formulas["young"]
    assert str(parse_request("2*young + base", presets=PRESETS)) == "2*(child - 0.6*adult) + base"
    assert str(parse_request("base - 0.5*young", presets=PRESETS)) == "base - 0.5*(child - 0.6*adult)"


def test_parameters_are_numbers_with_names():
    changed = parse_request('{"formula": "young", "parameters": {"strength": 0.25}}', presets=PRESETS)
    assert changed == _formula("child - 0.25*adult", child=CHILD, adult=ADULT)
    text = '{"formula": "young + w*base", "parameters": {"w": 2, "strength": 0.5}}'
    assert str(parse_request(text, presets=PRESETS)) == "child - 0.5*adult + 2*base"
    assert str(parse_request('{"formula": "w*base", "parameters": {"w": 3}}')) == "3*base"


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ('{"strenth": 1}', "the formula has no parameter 'strenth'; the parameters of young are: strength"),
        ('{"strength": "1"}', "the parameter 'strength' must be a number, not '1'"),
        ('{"strength": true}', "the parameter 'strength' must be a number, not true"),
        ('{"strength": 1e999}', "the parameter 'strength' must be a number, not the number inf"),
        ('{"a b": 1}', "'a b' cannot name a parameter"),
        ('{"uniform": 1}', "'uniform' cannot name a parameter"),
        ('{"strength": 2}', "the weights of the formula sum to -1 (1 for child, -2 for adult)"),
        ("[1]", "'parameters' must be a mapping, not a list"),
    ],
)
def test_parameters_are_checked(parameters, sentence):
    with pytest.raises(FormulaError) as caught:
        parse_request(f'{{"formula": "young", "parameters": {parameters}}}', presets=PRESETS)
    assert str(caught.value).startswith(sentence)


def test_a_name_is_a_term_or_a_parameter():
    text = '{"formula": "a + base", "terms": {"a": {}}, "parameters": {"a": 1}}'
    with pytest.raises(FormulaError, match="'a' is a term and a parameter of one request"):
        parse_request(text)


@pytest.mark.parametrize(
    "text", ["poe", " (poe) ", '{"formula": "poe"}', '{"formula": "poe", "normalize": "none"}']
)
def test_a_whole_formula_takes_the_normalization_of_its_preset(text):
    assert parse_request(text, presets=PRESETS) == PRESETS.formulas["poe"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "poe + base",
            "the preset 'poe' has normalize: none and cannot be part of a formula with normalize: sum",
        ),
        (
            "poe + young",
            "the preset 'poe' has normalize: none and cannot be part of a formula with normalize: sum",
        ),
        ("2*poe", "the preset 'poe' has normalize: none and cannot be part of a formula with normalize: sum"),
        (
            '{"formula": "young", "normalize": "none"}',
            "the preset 'young' has normalize: sum and cannot be part",
        ),
    ],
)
def test_normalizations_do_not_mix(text, sentence):
    with pytest.raises(FormulaError) as caught:
        parse_request(text, presets=PRESETS)
    assert str(caught.value).startswith(sentence)


def test_presets_of_one_normalization_combine_when_it_is_asked_for():
    formula = parse_request('{"formula": "poe - base", "normalize": "none"}', presets=PRESETS)
    assert str(formula) == "child + adult - base"


@pytest.mark.parametrize("formula", ["child + young", "young + child"])
def test_a_term_has_one_definition(formula):
    request = json.dumps({"formula": formula, "terms": {"child": {"system": "another"}}})
    with pytest.raises(FormulaError, match="the term 'child' has two definitions in this formula"):
        parse_request(request, presets=PRESETS)


REFUSALS = [
    (3, "'marith' must be a string, a formula or the JSON of one, not the number 3"),
    (None, "'marith' must be a string, a formula or the JSON of one, not null"),
    ({"formula": "a"}, "'marith' must be a string, a formula or the JSON of one, not a mapping"),
    ("", "the formula is empty"),
    (
        "{",
        "'marith' starts with '{' and is not valid JSON: Expecting property name enclosed in double quotes",
    ),
    ("{}", "the key 'formula' is missing in 'marith'"),
    ('{"formula": 3}', "'formula' must be a string, not the number 3"),
    ('{"formula": true}', "'formula' must be a string, not true"),
    ('{"formla": "a"}', "unknown key 'formla' in 'marith'; did you mean 'formula'?"),
    (
        '{"formula": "base", "x": 1}',
        "unknown key 'x' in 'marith'; the keys are formula, terms, parameters, normalize, constraints, "
        "explain",
    ),
    ('{"formula": "base", "terms": []}', "'terms' must be a mapping, not a list"),
    ('{"formula": "base", "terms": {"a": 3}}', "the term 'a': a term must be a mapping, not the number 3"),
    ('{"formula": "base", "terms": {"a": "x"}}', "the term 'a': a term must be a mapping, not 'x'"),
    ('{"formula": "base", "terms": {"a": null}}', "the term 'a': a term must be a mapping, not null"),
    (
        '{"formula": "base", "terms": {"a": {"sytem": "x"}}}',
        "the term 'a': unknown key 'sytem' in a term; did you mean 'system'?",
    ),
    (
        '{"formula": "base", "terms": {"a": {"system": ["x"]}}}',
        "the term 'a': 'system' must be a string, not a list",
    ),
    (
        '{"formula": "base", "terms": {"a": {"system": "x", "prompt": "y"}}}',
        "the term 'a': a term has either 'system' or 'prompt', not both",
    ),
    (
        '{"formula": "base", "terms": {"a": {"model": "/models/x"}}}',
        "the term 'a': 'model' of a term must be a name that the server knows",
    ),
    (
        '{"formula": "base", "terms": {"a": {"classifier": "org/x"}}}',
        "the term 'a': 'classifier' of a term must be a name that the server knows",
    ),
    (
        '{"formula": "base", "terms": {"a": {"speculative_factor": 0}}}',
        "the term 'a': 'speculative_factor' must be at least 1, not the number 0",
    ),
    (
        '{"formula": "base", "terms": {"a": {"speculative_factor": 2.0}}}',
        "the term 'a': 'speculative_factor' must be a whole number, not the number 2.0",
    ),
    ('{"formula": "base", "terms": {"a b": {}}}', "'a b' cannot name a term; names have letters"),
    ('{"formula": "base", "terms": {"max": {}}}', "'max' is an operator and cannot name a term"),
    (
        '{"formula": "base", "terms": {"a": {"system": "\\ud800"}}}',
        "the term 'a': 'system' of a term has half of a surrogate pair, which is no character",
    ),
    ('{"formula": "base", "normalize": "mean"}', "'normalize' must be 'sum' or 'none', not 'mean'"),
    ('{"formula": "a", "formula": "b"}', "the key 'formula' appears twice in the JSON of 'marith'"),
    (
        '{"formula": "a", "terms": {"a": {"system": "x", "system": "y"}}}',
        "the key 'system' appears twice in the JSON of 'marith'",
    ),
    ('{"formula": NaN}', "the JSON of 'marith' has NaN, which is no number"),
    ('{"formula": -Infinity}', "the JSON of 'marith' has -Infinity, which is no number"),
    ('{"formula": "base"} x', "'marith' starts with '{' and is not valid JSON: Extra data"),
    ('"base"', "unexpected character '\"' at column 1"),
    ('{"formula": "2"}', "a formula needs at least one term"),
    ('{"formula": "base - base"}', "the weights of the formula sum to 0"),
    ("bse", "'bse' is not defined at column 1; did you mean 'base'? defined are: base\n  bse\n  ^"),
    ("base + chld", "'chld' is not defined at column 8; defined are: base\n  base + chld\n         ^"),
]


@pytest.mark.parametrize(("value", "sentence"), REFUSALS, ids=[str(value)[:40] for value, _ in REFUSALS])
def test_refusals(value, sentence):
    with pytest.raises(FormulaError) as caught:
        parse_request(value)
    text = str(caught.value)
    assert text.startswith(sentence)
    assert not any(jargon in text for jargon in ("pydantic", "input_value", "validation error", "Traceback"))


def test_what_is_defined_is_listed_with_a_suggestion():
    with pytest.raises(FormulaError) as caught:
        parse_request("base - 0.5*yung", presets=PRESETS)
    assert str(caught.value) == (
        "'yung' is not defined at column 12; did you mean 'young'? defined are: adult, base, both, child, "
        "poe, young\n  base - 0.5*yung\n             ^"
    )


def test_a_long_list_of_names_is_cut():
    many = Presets({f"term_{i}": Term(str(i)) for i in range(500)}, {})
    with pytest.raises(FormulaError) as caught:
        parse_request("x", presets=many)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' * 10**5,
        '{"formula": ' + "[" * 10**5,
        '{"formula": "base", "x": ' + "1" * 10**5 + "}",
        '{"formula": "' + "(" * 10**5 + '"}',
        '{"formula": "base", "terms": {' + ",".join(f'"n{i}": {{}}' for i in range(10**4)) + "}}",
        '{"formula": "base", "terms": {"a": {"system": "' + "x" * 10**6 + '"}}}',
        '{"formula": "base", "' + "x" * 10**6 + '": 1}',
        '{"formula": "base", "terms": {"' + "x" * 10**6 + '": 1}}',
        '{"formula": "base", "terms": {"a": {"' + "\\ud800" * 10**5 + '": 1}}}',
        '{"formula": "base", "normalize": "' + "x" * 10**6 + '"}',
        "{" * 2**20,
        "(" * 10**5,
        "x" * 10**7,
    ],
    ids=range(13),
)
def test_hostile_requests_are_refused_quickly(text):
    started = time.thread_time()
    with pytest.raises(FormulaError) as caught:
        parse_request(text)
    assert time.thread_time() - started < 1
    assert len(str(caught.value)) < 1000
    assert str(caught.value).encode()  # a server can send it


@pytest.mark.parametrize(
    ("limits", "accepted", "refused", "sentence"),
    [
        (Limits(max_terms=2), "child + adult", "young + base", "the formula has 3 terms; 2 is the most"),
        (Limits(max_nodes=5), "young + base", "young + young", "the formula has more than 5 terms, numbers"),
        (
            Limits(max_terms=1),
            '{"formula": "a", "terms": {"a": {}}}',
            '{"formula": "a", "terms": {"a": {}, "b": {}}}',
            "the request defines 2 terms; 1 is the most",
        ),
        (
            Limits(max_template_chars=3),
            '{"formula": "a", "terms": {"a": {"system": "xyz"}}}',
            '{"formula": "a", "terms": {"a": {"prompt": "wxyz"}}}',
            "the term 'a': 'prompt' has 4 characters; 3 is the most",
        ),
    ],
)
def test_limits(limits, accepted, refused, sentence):
    parse_request(accepted, presets=PRESETS, limits=limits)
    with pytest.raises(FormulaError) as caught:
        parse_request(refused, presets=PRESETS, limits=limits)
    assert str(caught.value).startswith(sentence)


def test_a_full_request_in_escapes_is_still_read():
    limits = Limits(max_terms=2, max_template_chars=1000)
    terms = {name: {"system": "\N{MAGE}" * 1000} for name in "ab"}
    parse_request(json.dumps({"formula": "a + b", "terms": terms}), limits=limits)


def test_limits_from_settings():
    assert Limits.from_settings({}) == Limits()
    assert Limits.from_settings({"max_terms": 3, "max_prompt_tokens": 9}).max_terms == 3
    assert Limits.from_settings({"max_prompt_tokens": None}).max_prompt_tokens is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_term": 3}, "unknown key 'max_term' in limits; did you mean 'max_terms'?"),
        ({"max_terms": "3"}, "'max_terms' must be a whole number, not '3'"),
        ({"max_terms": True}, "'max_terms' must be a whole number, not true"),
        ({"max_terms": 0}, "'max_terms' must be at least 1, not the number 0"),
        ({"max_depth": 65}, "'max_depth' must be at most 64, not the number 65"),
        ({"max_nodes": None}, "'max_nodes' must be a whole number, not null"),
    ],
)
def test_limits_that_cannot_be_used(settings, sentence):
    with pytest.raises(SettingsError) as caught:
        Limits.from_settings(settings)
    assert str(caught.value) == sentence

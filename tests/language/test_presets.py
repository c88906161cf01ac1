"""Preset files: what they define, and errors that name file, line and reason."""

import pickle
from pathlib import Path

import pytest

from vllm_marith import Formula, FormulaError, PresetError, Presets, Term, parse_request
from vllm_marith.plan import lower

SHIPPED = Path(__file__).parents[2] / "configs" / "presets"


@pytest.fixture
def write(tmp_path):
    def write(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_terms_are_shared_between_files(write):
    path = write(
        terms="terms:\n  child: {system: You are a child.}\n  plain:\n",
        young="description: |\n  Younger\n  than base.\npaper: arXiv 1\nformula: child - 0.5*old + 0*plain\n",
        other="name: poe\nterms:\n  old: {prompt: 'old {input}'}\nformula: child + old\nnormalize: none\n",
    )
    presets = Presets.load(path)
    assert presets.terms == {
        "child": Term("You are a child."),
        "old": Term(prompt="old {input}"),
        "plain": Term(),
    }
    assert list(presets.formulas) == ["poe", "young"]
    assert presets.formulas["poe"] == Formula.parse("child + old", presets.terms, "none")
    young = presets.presets["young"]
    assert (young.description, young.paper) == ("Younger than base.", "arXiv 1")
    assert pickle.loads(pickle.dumps(presets)) == presets
    assert str(parse_request("young", presets=presets)) == "child - 0.5*old + 0*plain"


def test_several_folders_are_one_name_space(write, tmp_path):
    path = write(terms="terms:\n  a: {system: hi}\n", x="formula: a - 0.5*base\n")
    more = tmp_path / "more"
    more.mkdir()
    (more / "y.yaml").write_text("formula: 2*a + b\nterms: {b: {model: small}}\n")
    assert list(Presets.load(path).presets) == ["x"]
    both = Presets.load(path, more)
    assert both == Presets.load(more / "y.yaml", path, path / "x.yaml", str(more))
    assert (list(both.presets), list(both.terms)) == (["x", "y"], ["a", "b"])
    with pytest.raises(PresetError, match=r"y\.yaml:1: 'a' is not defined"):
        Presets.load(more)
    (more / "z.yaml").write_text("name: x\nformula: b\n")
    with pytest.raises(PresetError, match=rf"z\.yaml:1: the preset 'x' is also defined in {path / 'x.yaml'}"):
        Presets.load(path, more)
    assert Presets.load() == Presets.empty()


def test_one_file(write):
    path = write(one="formula: base", two="formula: base")
    assert list(Presets.load(path / "one.yaml").formulas) == ["one"]


def test_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("formula: {")
    assert Presets.load(tmp_path) == Presets.empty()


def test_an_empty_file_defines_nothing(write):
    assert Presets.load(write(x="# later\n")) == Presets.empty()


def test_the_same_definition_twice_is_one(write):
    path = write(x="terms:\n  a: {system: hi}\n", y="terms:\n  a: {system: hi}\n")
    assert Presets.load(path).terms == {"a": Term("hi")}


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: [", 1, "not valid YAML: expected the node content"),
        ("x: !!python/object:os.system {}", 1, "not valid YAML: could not determine a constructor"),
        ("- a\n", 1, "a preset must be a mapping, not a list"),
        ("description: x\nformla: base\n", 2, "unknown key 'formla' in a preset; did you mean 'formula'?"),
        ("description: x\nformula: 3\n", 2, "'formula' must be a string, not the number 3"),
        ("formula: base\nnormalize: mean\n", 2, "'normalize' must be 'sum' or 'none', not 'mean'"),
        ("formula: base\n\nformula: base\n", 3, "the key 'formula' appears twice (first on line 1)"),
        ("terms:\n  a: {system: x}\n  a: {}\n", 3, "the key 'a' appears twice (first on line 2)"),
        (
            "terms:\n  a:\n    system: x\n    system: y\n",
            4,
            "the key 'system' appears twice (first on line 3)",
        ),
        (
            "terms:\n  b: {}\n  a:\n    sytem: x\n",
            3,
            "the term 'a': unknown key 'sytem' in a term; did you mean",
        ),
        ("terms:\n  b: {}\n  topk: {}\n", 3, "'topk' is an operator and cannot name a term"),
        ("terms:\n  1: {}\n", 2, "'terms.1' must be a string, not the number 1"),
        ("terms: [a]\n", 1, "'terms' must be a mapping, not a list"),
        ("description: x\nformula: base - base\n", 2, "the weights of the formula sum to 0"),
        (
            "description: x\nformula: base - bse\n",
            2,
            "'bse' is not defined at column 8; did you mean 'base'?",
        ),
        ("description: x\nname: a b\nformula: base\n", 2, "'a b' cannot name a preset"),
        ("description: x\nname: base\nformula: base\n", 2, "the preset 'base' has the name of a term"),
        ("terms: {x: {}}\nformula: base\n", 1, "the preset 'x' has the name of a term"),
        ("formula: base\nparameters:\n  base: 1\n", 3, "the parameter 'base' has the name of a term"),
        ("formula: base\nparameters:\n  x: high\n", 2, "the parameter 'x' must be a number, not 'high'"),
        ("formula: base\nparameters:\n  x: 1\n", 1, "the formula has no parameter 'x'"),
        ("formula: base - x*base\nparameters:\n  x: 1\n", 1, "the weights of the formula sum to 0"),
    ],
)
def test_errors_name_file_line_and_reason(write, text, place, reason):
    path = write(x=text)
    with pytest.raises(PresetError) as caught:
        Presets.load(path)
    assert str(caught.value).startswith(f"{path / 'x.yaml'}:{place}: {reason}")


def test_parameters_can_be_changed(write):
    path = write(
        x="terms:\n  a: {}\nparameters:\n  strength: 0.5\n  low: 1\nformula: low*base - strength*a\n"
    )
    presets = Presets.load(path)
    assert str(presets.formulas["x"]) == "base - 0.5*a"
    assert presets.presets["x"].parameters == {"strength": 0.5, "low": 1.0}
    assert presets.formula("x", {}) is presets.formulas["x"]
    assert str(presets.formula("x", {"strength": 0.25})) == "base - 0.25*a"
    assert pickle.loads(pickle.dumps(presets)).formula("x", {"low": 3}) == presets.formula("x", {"low": 3})
    with pytest.raises(
        FormulaError, match="the preset 'x' has no parameter 'high'; its parameters are: strength, low"
    ):
        presets.formula("x", {"high": 1})


def test_a_formula_error_keeps_its_caret(write):
    with pytest.raises(PresetError) as caught:
        Presets.load(write(x="formula: base - *base"))
    assert str(caught.value).endswith("column 8\n  base - *base\n         ^")


def test_two_files_at_odds(write):
    path = write(x="terms:\n  a: {system: hi}\n", y="\nterms:\n  b: {}\n  a: {system: ho}\n")
    with pytest.raises(PresetError) as caught:
        Presets.load(path)
    assert str(caught.value) == (
        f"{path / 'y.yaml'}:4: the term 'a' is defined differently in {path / 'x.yaml'}; "
        "the terms of all files share one name space"
    )


def test_two_presets_of_one_name(write):
    path = write(x="name: p\nformula: base\n", y="formula: 2*base\nname: p\n")
    with pytest.raises(PresetError) as caught:
        Presets.load(path)
    assert str(caught.value) == f"{path / 'y.yaml'}:2: the preset 'p' is also defined in {path / 'x.yaml'}"


@pytest.mark.parametrize("name", ["missing", "missing.yaml"])
def test_a_path_that_is_not_there(tmp_path, name):
    with pytest.raises(PresetError, match="no such file or directory"):
        Presets.load(tmp_path / name)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PresetError, match="cannot be read"):
        Presets.load(tmp_path)


def test_the_shipped_presets():
    presets = Presets.load(SHIPPED)
    assert set(presets.formulas) >= {
        "cad", "cfg", "dera", "detox_linear", "detox_union", "mod", "poe", "preadd",
    }  # fmt: skip
    assert {name: presets.terms[name].system for name in ("prose", "code", "legal")} == {
        "prose": "write prose",
        "code": "write code",
        "legal": "write legal text",
    }
    for name, formula in presets.formulas.items():
        preset = presets.presets[name]
        assert preset.description, f"{name} needs a description"
        assert preset.paper, f"{name} needs a paper"
        assert not formula.needs, f"{name} must run on a server that has nothing but its base model"
        assert parse_request(name, presets=presets) == formula
        lower(formula)
    totals = {name: lower(formula).weight for name, formula in presets.formulas.items()}
    # The sums of weights that the methods' papers give.
    expected = {"cad": 1, "cfg": 1, "dera": 1, "detox_linear": 0.4, "detox_union": 0.04, "mod": 1, "poe": 2}
    for name, total in expected.items():
        assert totals[name] == pytest.approx((total, total))

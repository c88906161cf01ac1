"""Files that are not what they should be: one sentence with the place, and nothing is executed."""

import json
import pickle

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.support.saved_formulas import (
    Saved,
    autocomplete,
    classifier,
    classifier_strength,
    max_,
    model,
    plain,
    saved,
    self_debias,
    superseded,
    top_p_top_k,
    union,
)
from vllm_marith import Presets
from vllm_marith.importing import SavedFormulaError, read_saved

A, B = model("A"), model("B")


def without(file, key):
    return Saved({name: value for name, value in file.items() if name != key})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "$: not valid JSON: Expecting value at line 1, column 1"),
        ("[1]", "$: a saved formula is an object with a 'class', not a list"),
        ("{}", "$: a saved formula has a 'class'"),
        ('{"class": 3}', "$: a saved formula has a 'class', a string"),
        ('{"formula": 3}', "$.formula: a number alone is no formula"),
        ('{"formula": {}, "default_model": 3}', "$.default_model: must be a string, not the number 3"),
        ('{"class": "Constant", "constant": NaN}', "$: NaN is no number"),
        ('{"class": "Constant", "constant": 1e999}', "$.constant: must be a number, not the number inf"),
        (
            '{"class": "Constant", "constant": 1' + "0" * 400 + "}",
            "$.constant: a number in the formula is too",
        ),
        ('{"class": "Constant", "constant": 1' + "0" * 5000 + "}", "$: a number is too long"),
        ('{"class": "Constant", "constant": true}', "$.constant: must be a number, not true"),
        ('{"class": "Sum", "class": "Sum"}', "$: the key 'class' appears twice in one object"),
        ("[" * 100_000, "$: nested too deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "$: formulas nested more than 64 deep"),
        (json.dumps([{}] * 2000), "$: more than 1024 objects"),
        (" " * (1 << 24) + "1", "$: the file has 16777217 characters; 16777216 is the most"),
    ],
)
def test_files(text, said):
    with pytest.raises(SavedFormulaError) as caught:
        read_saved(text)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (A + saved("Summ", terms=[]), "$.terms[1]: unknown class 'Summ'; did you mean 'Sum'?"),
        (A + saved("os.system", x=1), "$.terms[1]: unknown class 'os.system'"),
        (saved("Sum", terms=[]), "$.terms: must be a list of formulas, not a list"),
        (saved("Sum", terms=[A, "x"]), "$.terms[1]: must be a formula or a number, not 'x'"),
        (saved("Sum", terms=[A], factors=[]), "$: unknown setting 'factors' of Sum"),
        (saved("Product", factors=[A, B]), "$: the product of two formulas has no meaning"),
        (saved("Normalize"), "$: Normalize needs 'formula'"),
        (saved("Normalize", formula=3), "$: normalize(...) needs a formula with at least one term"),
        (A + saved("Abs", formula=B), "$.terms[1]: Abs has no counterpart"),
        (saved("HardConstraint", disallowed_words=["x"]), "$: a HardConstraint takes back text"),
        (autocomplete() + A, "$.terms[0]: an Autocomplete predicts one token with certainty"),
        (union(A, B) | {"include_norm": 1}, "$.include_norm: must be true or false, not the number 1"),
        (max_(2 * A, B, include_norm=False), "$: Max without include_norm weighs 1"),
        (top_p_top_k(A, temperature=0.0), "$.temperature: a temperature must be positive"),
        (top_p_top_k(union(A, 2 * B), temperature=0.5), "$.temperature: a temperature must be positive"),
        (top_p_top_k(A, top_p=0.0), "$: topp needs a probability above 0"),
        (A - 0.5 * top_p_top_k(B, top_k=5), "$: topk(...) stands under a negative weight"),
        (self_debias(2 * A, B, 10), "$: SelfDebias reads its operands without normalising them"),
        (self_debias(A, B, -1), "$: the strength of self_debias cannot be negative"),
        (superseded(A, 2 * B) + A, "$.terms[0]: the operands of Superseded differ in weight"),
        (superseded(union(A, 2 * B), B) + A, "$.terms[0]: the operands of Superseded differ in weight"),
        (A - 2 * B, "$: the weights of the formula sum to -1"),
        (saved("Normalize", formula=2 * A) - B, "$: the weights of the formula sum to 0 and those of a part"),
        (without(A, "prompt_template"), "$: PromptedLLM needs 'prompt_template'"),
        (A | {"prompt_template": {}}, "$.prompt_template: must be a string, not a mapping"),
        (A | {"prompt_template": "{input}"}, "$.prompt_template: has a literal {input}"),
        (A | {"system_prompt": "{input}"}, "$.system_prompt: has a literal {input}"),
        (A | {"system_prompt": "\ud800"}, "$.system_prompt: has half of a surrogate pair"),
        (A | {"model": 3}, "$.model: must be a string, not the number 3"),
        (A | {"speculative_factor": 0}, "$.speculative_factor: must be a whole number of at least 1"),
        (A | {"speculative_factor": True}, "$.speculative_factor: must be a whole number"),
        (A | {"sistem_prompt": ""}, "$: unknown setting 'sistem_prompt' of PromptedLLM; did you mean"),
        (A + classifier(A, None), "$.terms[1].model: a classifier is a model of its own"),
        (A + classifier(A, index=-1), "$.terms[1].index: must be a whole number of at least 0"),
        (A + classifier_strength(only_input=True) * B, "$.terms[1].factors[0].only_input: a strength by"),
        (classifier(A), "$: a formula needs at least one term that is a language model"),
    ],
)  # fmt: skip
def test_formulas(file, said):
    with pytest.raises(SavedFormulaError) as caught:
        read_saved(file.text())
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return open, ("executed", "w")


def test_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = saved("Functional", formula=A, function=pickle.dumps(Trap(), protocol=0).decode("latin-1"))
    with pytest.raises(
        SavedFormulaError, match=r"\$: a Functional holds pickled code, which is never loaded"
    ):
        read_saved(file.text())
    for text in ("!!python/object/apply:open [executed, w]", "__import__('os').mkdir('executed')"):
        (tmp_path / "f.yaml").write_text(read_saved((plain() + model(text)).text()).to_yaml("f"))
        formula = Presets.load(tmp_path / "f.yaml").formulas["f"]
        assert text in [(term.prompt or "").partition("\n")[0] for term in formula.terms.values()]
    assert not (tmp_path / "executed").exists()


@given(st.text(), st.text(), st.text())
def test_no_text_escapes_its_place_in_the_yaml(system, template, hub):
    file = model(system, hub + "\nformula: base\r\x85\u2028", template=template) + plain("other") * 2
    if any("{input}" in text for text in (system, template)):
        with pytest.raises(SavedFormulaError, match=r"literal \{input\}"):
            read_saved(file.text())
        return
    imported = read_saved(file.text(), base="other", name="f")
    written = imported.to_yaml("f")
    read = yaml.safe_load(written)
    assert read["formula"] == str(imported.formula)
    terms = {name: term.to_dict() for name, term in imported.formula.terms.items() if name != "base"}
    assert read["terms"] == terms
    assert read.keys() == {"name", "description", "paper", "terms", "formula"}


def test_long_sums_and_deep_ones():
    terms = [model(f"number {index}") for index in range(300)]
    assert len(read_saved(saved("Sum", terms=terms).text()).formula.terms) == 300
    nested = sum(terms[1:60], terms[0])
    assert len(read_saved(nested.text()).formula.terms) == 60
    deep = A
    for _ in range(60):
        deep = saved("Normalize", formula=deep) + B
    tempered = A
    for _ in range(55):  # each of them is three calls here
        tempered = top_p_top_k(tempered, top_k=5, temperature=0.5)
    for file in (deep, tempered):
        with pytest.raises(SavedFormulaError, match=r"^\$[^:]*: .*nested more than 64 deep$"):
            read_saved(file.text())

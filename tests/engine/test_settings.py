"""What an operator writes under additional_config -> Settings."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_marith import PresetError
from vllm_marith.engine.settings import Settings

SHIPPED = Path(__file__).parents[2] / "configs" / "presets"


def settings(**values):
    return Settings.of(SimpleNamespace(additional_config={"marith": values}))


@pytest.mark.parametrize(
    ("written", "folders"),
    [
        ({}, []),
        ({"presets": None}, []),
        ({"presets": []}, []),
        ({"presets": str(SHIPPED)}, [""]),
        ({"presets": [str(SHIPPED)]}, [""]),
        ({"presets": [str(SHIPPED), str(SHIPPED / "experts")]}, ["", "experts"]),
    ],
)
def test_presets_are_one_folder_or_several(written, folders):
    found = settings(**written, constituents=dict.fromkeys(("draft", "expert", "anti"), "somewhere"))
    assert found.presets == tuple(SHIPPED / folder for folder in folders)
    names = {file.stem for folder in folders for file in (SHIPPED / folder).glob("*.yaml")}
    assert set(found.load_presets().presets) == names - {"terms", "embedded"}


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        (
            "experts",
            r"the preset '\w+' needs the constituent '\w+' for its term '\w+'.*the constituents are: none",
        ),
        ("classifiers", r"the preset '\w+' needs the classifier 'judge'.*the classifiers are: none"),
    ],
)
def test_presets_that_need_what_is_not_there(folder, sentence):
    with pytest.raises(PresetError, match=sentence):
        settings(presets=[str(SHIPPED), str(SHIPPED / folder)]).load_presets()


def test_mistakes_are_sentences():
    with pytest.raises(ValueError, match=r"additional_config: marith\.presets\.1: "):
        settings(presets=[str(SHIPPED), 3])
    with pytest.raises(PresetError, match="nowhere: no such file or directory"):
        settings(presets=[str(SHIPPED), "nowhere"]).load_presets()


def test_the_default_preset_is_one_of_them():
    assert settings(presets=str(SHIPPED), default_preset="cfg").load_presets()
    with pytest.raises(PresetError, match="default_preset: there is no preset 'cgf'; there are: cad, cfg, "):
        settings(presets=str(SHIPPED), default_preset="cgf").load_presets()
    with pytest.raises(ValueError, match=r"additional_config: marith\.default_preset: .*a name has"):
        settings(default_preset="1*base + angry").load_presets()

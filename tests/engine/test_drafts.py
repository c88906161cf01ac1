"""What admission makes of `speculative`: who drafts, who becomes a member, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_marith import Formula, PresetError
from vllm_marith.engine import settings
from vllm_marith.engine.frontend.admission import Admission, RefusedError
from vllm_marith.engine.frontend.source import SOURCE
from vllm_marith.engine.group import GroupSpec, MemberTag, member_tags
from vllm_marith.engine.settings import Settings
from vllm_marith.plan import decode, lower

CONSTITUENTS = {"small": "somewhere", "big": "somewhere else"}
TERMS = {
    "small": {"model": "small"},
    "big": {"model": "big", "speculative_factor": 5},
    "warm": {"system": "warm", "model": "big", "speculative_factor": 9},
    "late": {"system": "late", "speculative_factor": 4},
    "ngram": {"model": "ngram"},
    "suffix": {"model": "suffix"},
    "judge": {"classifier": "judge"},
}
DRAFTED = "superseded(small, big)"


class Source:
    """A prompt of which every term has its own: one token for its system message, then the request's."""

    def render(self, renderer: Any, term: Any, kept: Any) -> list[int]:
        return [100 + len(term.system), 7]


def admission(**settings: Any) -> Admission:
    config = SimpleNamespace(
        additional_config={"marith": {"constituents": CONSTITUENTS, **settings}},
        lora_config=None,
        model_config=SimpleNamespace(model="base", max_model_len=64, skip_tokenizer_init=False),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        cache_config=SimpleNamespace(num_gpu_blocks=9, block_size=16),
        parallel_config=SimpleNamespace(data_parallel_size=1),
        num_speculative_tokens=0,
        num_lookahead_tokens=0,
    )
    read = Settings.of(config)
    if read.speculates:
        config.num_speculative_tokens = read.max_speculative_tokens
    return Admission(SimpleNamespace(config=config))


def spec_of(formula: str, asked: Any = None, settings: Any = None, *, extra: Any = None, **how: Any) -> Any:
    """The group of a request, through the wire.  Without settings the server can speculate."""
    value = {"formula": formula, "terms": {k: v for k, v in TERMS.items() if k in formula}}
    value |= {} if asked is None else {"speculative": asked}
    engine_input = {"type": "token", "prompt_token_ids": [1, 7], SOURCE: Source()}
    found = admission(**({"speculative": "off"} if settings is None else settings))
    admitted = found.admit(engine_input, json.dumps(value | (extra or {})), 4, **how)
    return GroupSpec.from_wire(json.loads(json.dumps(admitted.spec.to_wire())))


def drafting(spec: Any) -> tuple[str, list[int], bool]:
    return spec.drafter, spec.draft_lengths, spec.adaptive


def test_what_drafts_becomes_a_member():
    spec = spec_of(DRAFTED, 3)
    assert drafting(spec) == ("formula", [3], False)
    assert (spec.size, spec.constituents) == (2, [2, 1])
    assert [decode(text).stages[-1].instructions for text in (spec.routine, *spec.drafts)] == [
        (("push", 0, 1.0),),
        (("push", 1, 1.0),),
    ]
    assert {decode(text).terms for text in (spec.routine, *spec.drafts)} == {2}


def test_levels_and_their_lengths():
    spec = spec_of(f"{DRAFTED} + 0.5*warm", 7)
    assert (spec.drafter, spec.draft_lengths, len(spec.drafts)) == ("formula", [4, 7], 2)
    assert (spec.size, spec.constituents) == (3, [2, 2, 1])


def test_an_ngram_is_no_member():
    spec = spec_of("superseded(ngram, base)", 3)
    assert drafting(spec) == ("ngram", [3], False)
    assert (spec.size, spec.drafts) == (1, [])
    assert drafting(spec_of("superseded(ngram, base)", "auto")) == ("ngram", [8], True)


SUFFIXES = "superseded(suffix, base)"


@pytest.fixture
def installed(monkeypatch):
    """Says whether arctic-inference is there."""

    def say(there: bool) -> None:
        monkeypatch.setattr(settings, "find_spec", lambda name: object() if there else None)

    return say


def test_suffixes_are_no_member_either(installed):
    installed(True)
    spec = spec_of(SUFFIXES, 3)
    assert drafting(spec) == ("suffix", [3], False)
    assert (spec.size, spec.drafts) == (1, [])
    assert drafting(spec_of(SUFFIXES, "auto")) == ("suffix", [8], True)


def test_suffixes_need_a_package(installed):
    installed(False)
    sentence = "'speculative' is 3, but 'suffix' drafts with the package arctic-inference, which this server"
    with pytest.raises(RefusedError, match=sentence):
        spec_of(SUFFIXES, 3)
    assert drafting(spec_of(SUFFIXES, "auto")) == drafting(spec_of(SUFFIXES)) == OFF
    assert drafting(spec_of("superseded(ngram, base)", 3)) == ("ngram", [3], False)


@pytest.mark.parametrize(("seed", "salt"), [(None, None), (7, None), (None, "mine")])
def test_what_is_to_be_kept_apart_does_not_draft_from_others_answers(installed, seed, salt):
    installed(True)
    for formula, asked in ((SUFFIXES, 3), (SUFFIXES, "auto"), (DRAFTED, 3)):
        value = {"formula": formula, "terms": {k: v for k, v in TERMS.items() if k in formula}}
        params = SamplingParams(seed=seed, max_tokens=4)
        params.extra_args = {"marith": json.dumps(value | {"speculative": asked})}
        request = SimpleNamespace(
            sampling_params=params,
            prompt_embeds=None,
            mm_features=None,
            resumable=False,
            lora_request=None,
            cache_salt=salt,
        )
        engine_input = {"type": "token", "prompt_token_ids": [1, 7], SOURCE: Source()}
        admission(speculative="off").expand(request, engine_input, 4)
        found = GroupSpec.from_wire(params.extra_args["marith"]).drafter
        if formula == DRAFTED:
            assert found == "formula"
        elif asked == "auto" and seed is not None:
            assert found == ""
        else:
            assert found == ("suffix" if seed is salt is None else "ngram")


def test_the_leaders_tag_carries_it_all():
    spec = spec_of(DRAFTED, 3)
    leader, follower = (MemberTag.from_wire(tag.to_wire()) for tag in member_tags("g", spec, 2))
    assert (leader.drafter, leader.draft_lengths, leader.drafts) == ("formula", [3], spec.drafts)
    assert (follower.drafter, follower.drafts) == ("", [])
    assert member_tags("g", spec_of(DRAFTED, "auto"), 2)[0].adaptive


OFF = ("", [], False)


@pytest.mark.parametrize(
    ("formula", "asked", "settings", "expected"),
    [
        (DRAFTED, None, {}, OFF),
        (DRAFTED, "auto", {}, OFF),
        (DRAFTED, 0, {}, OFF),
        (DRAFTED, None, {"max_speculative_tokens": 8}, OFF),
        (DRAFTED, 2, {"max_speculative_tokens": 8}, ("formula", [2], False)),
        (DRAFTED, "auto", {"max_speculative_tokens": 8}, ("formula", [4], True)),
        (DRAFTED, "auto", {"max_speculative_tokens": 3}, ("formula", [3], True)),
        (DRAFTED, None, {"speculative": "auto"}, ("formula", [4], True)),
        (DRAFTED, "off", {"speculative": "auto"}, OFF),
        (DRAFTED, 0, {"speculative": "auto"}, OFF),
        (DRAFTED, None, {"speculative": 2}, ("formula", [2], False)),
        (DRAFTED, "auto", {"speculative": 2}, ("formula", [4], True)),
        # A server's number of tokens is no word of the client's.
        ("base", None, {"speculative": 2}, OFF),
        # One base model: whether it pays is measured, too.
        ("base + 0.5*late", "auto", {"speculative": "off"}, ("formula", [3], True)),
        ("base + 0.5*late", 2, {"speculative": "off"}, ("formula", [2], False)),
        ("base + 0.5*late", None, {"speculative": 2}, ("formula", [2], False)),
        ("2*big - small", "auto", {"speculative": "off"}, OFF),  # -small alone is no distribution
    ],
)
def test_who_decides(formula, asked, settings, expected):
    found = spec_of(formula, asked, settings)
    assert drafting(found) == expected
    only_drafts = formula == DRAFTED and expected != OFF
    assert found.size == len(lower(Formula.parse(formula)).terms) + only_drafts


@pytest.mark.parametrize(
    ("formula", "asked", "settings", "sentence"),
    [
        (DRAFTED, 2, {}, "'speculative' is 2, but this server was started without speculation"),
        (DRAFTED, 9, None, "'speculative' is 9, but this server drafts at most 8 tokens at a time"),
        ("base", 2, None, "'speculative' is 2, but no term has a 'speculative_factor' above 1"),
        ("2*late - base", 2, None, "-base, makes no distribution: the weights of the formula sum to -1"),
        (DRAFTED, -1, None, '\'speculative\' must be "auto", "off" or the number of tokens to draft'),
        (DRAFTED, True, None, "'speculative' must be .*, not true"),
        (DRAFTED, "on", None, "'speculative' must be .*, not 'on'"),
        (DRAFTED, 2.5, None, "'speculative' must be .*, not the number 2.5"),
    ],
)
def test_refusals(formula, asked, settings, sentence):
    with pytest.raises(RefusedError, match=sentence):
        spec_of(formula, asked, settings)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"extra": {"constraints": {"forbid": ["damn"]}}}, "constraints"),
        ({"extra": {"explain": True}}, "an explanation of the tokens"),
        ({"explained": True}, "an explanation of the tokens"),
    ],
)
def test_what_drafts_do_not_go_with(how, what):
    assert drafting(spec_of(DRAFTED, "auto", **how)) == OFF
    assert spec_of(DRAFTED, "auto", **how).size == 1
    assert drafting(spec_of(DRAFTED, None, {"speculative": 3}, **how)) == OFF
    with pytest.raises(RefusedError, match=f"'speculative' is 3, which cannot be combined with {what}"):
        spec_of(DRAFTED, 3, **how)


def test_scores_and_drafts():
    formula = "base + 0.5*late"
    with pytest.raises(RefusedError, match="cannot be combined with log-probabilities of the prompt"):
        spec_of(formula, 3, scored=True)
    assert drafting(spec_of(formula, None, {"speculative": 3}, scored=True)) == OFF


def test_an_answer_to_a_seed_does_not_depend_on_the_machines_speed():
    assert drafting(spec_of(DRAFTED, "auto", seeded=True)) == OFF
    assert drafting(spec_of(DRAFTED, 3, seeded=True)) == ("formula", [3], False)
    assert drafting(spec_of(DRAFTED, None, {"speculative": 3}, seeded=True)) == ("formula", [3], False)


def test_a_request_is_admitted_once():
    """The server asks and the engine asks again; with an explanation nothing is drafted."""
    found = admission(speculative="auto")
    engine_input = {"type": "token", "prompt_token_ids": [1, 7], SOURCE: Source()}
    text = json.dumps({"formula": DRAFTED, "terms": {name: TERMS[name] for name in ("small", "big")}})
    first = found.admit(engine_input, text, 4)
    assert found.admit(engine_input, text, 4) is first
    assert first.spec.drafter == "formula"
    assert found.admit(engine_input, text, 4, seeded=True).spec.drafter == ""
    explained = found.admit(engine_input, text, 4, explained=True)
    assert explained.spec.drafter == ""
    assert found.admit(engine_input, text, 4, explained=True) is explained
    found.admit(engine_input, text, 4)
    assert found.admit(engine_input, text, 4, explained=True).spec.drafter == ""


def test_drafted_tokens_need_room_in_the_kv_cache():
    assert admission().room([2, 2], [0, 0]) == 62
    found = admission(speculative="off", max_speculative_tokens=3)
    assert found.slots_ahead == 7  # a token, three drafts of it, and three that the drafting terms compute
    assert found.room([2, 2], [0, 0]) == 55
    assert found.room([20] * 4, [0] * 4) == 5


def test_settings():
    def of(**values: Any) -> Settings:
        return Settings.of(SimpleNamespace(additional_config={"marith": values}))

    assert not of().speculates
    assert of(speculative="off").speculates
    assert of(max_speculative_tokens=4).speculates
    assert (of().speculative, of().max_speculative_tokens) == ("off", 8)
    for wrong, sentence in (
        ({"speculative": "on"}, 'marith.speculative: .*must be "auto", "off" or the number'),
        ({"speculative": 9}, "speculative is 9, and max_speculative_tokens allows 8"),
        ({"max_speculative_tokens": 33}, "max_speculative_tokens: input should be less than or equal to 32"),
        ({"max_speculative_tokens": 0}, "max_speculative_tokens: input should be greater than or equal to 1"),
        ({"constituents": {"ngram": "x"}}, "the name 'ngram' is taken"),
        ({"constituents": {"suffix": "x"}}, "the name 'suffix' is taken"),
        ({"remembered_answers": -1}, "remembered_answers: input should be greater than or equal to 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            of(**wrong)


def test_a_presets_own_word(tmp_path: Path):
    (tmp_path / "quick.yaml").write_text(
        "terms: {big: {model: big}, small: {model: small}}\nformula: superseded(small, big)\nspeculative: 3\n"
    )

    def drafted(value: str, **settings: Any) -> tuple[str, list[int], bool]:
        found = admission(presets=str(tmp_path), **settings)
        engine_input = {"type": "token", "prompt_token_ids": [1, 7], SOURCE: Source()}
        return drafting(found.admit(engine_input, value, 4).spec)

    assert drafted("quick", speculative="off") == ("formula", [3], False)
    assert drafted('{"formula": "quick", "speculative": "off"}', speculative="off") == OFF
    assert drafted('{"formula": "quick", "speculative": 2}', speculative="off") == ("formula", [2], False)
    assert drafted("2*quick", speculative="off") == OFF
    # The client did not ask for drafts, so nothing is refused on their account.
    assert drafted('{"formula": "quick", "explain": true}', speculative="off") == OFF
    with pytest.raises(
        PresetError, match="the preset 'quick': 'speculative' is 3, but this server was started"
    ):
        admission(presets=str(tmp_path))
    with pytest.raises(PresetError, match="at most 2 tokens at a time"):
        admission(presets=str(tmp_path), max_speculative_tokens=2)
    (tmp_path / "quick.yaml").write_text("formula: base\nspeculative: fast\n")
    with pytest.raises(PresetError, match=r"quick.yaml:2: 'speculative' must be .* not 'fast'"):
        admission(presets=str(tmp_path), speculative="off")


def test_formulas_say_it_in_python():
    formula = Formula.parse(DRAFTED, {name: TERMS[name] for name in ("small", "big")})
    assert json.loads(formula.to_json(speculative=3))["speculative"] == 3
    assert "speculative" not in json.loads(formula.to_json())
    carried = formula.sampling_params(speculative="auto").extra_args["marith"]
    assert json.loads(carried)["speculative"] == "auto"

"""Judge, referee, adapter and classifier."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vllm_marith.models import ATTRIBUTES, Judge, Paths, Referee
from vllm_marith.models.adapter import SCALE, adapt
from vllm_marith.models.corpus import Corpus
from vllm_marith.models.judge import LABELS, accuracies, features, snippets
from vllm_marith.models.loading import load_tokenizer
from vllm_marith.models.recipe import Shape
from vllm_marith.models.training import llama


@pytest.fixture(scope="module")
def judge(made: Paths) -> Judge:
    return Judge.load(made.judge)


def test_the_judge_is_right_on_held_out_text(judge: Judge, corpus: Corpus) -> None:
    found = accuracies(judge, snippets(corpus.parts["C"], 400, seed=3))
    assert found["all"] > 0.75  # chance is 0.25
    assert all(found[label] > 0.5 for label in LABELS)


def test_the_judge_knows_garbage(judge: Judge) -> None:
    garbage = ["x " * 80, "qz;k(jx vv!w" * 9, "the the the the the the the the the the the the the the"]
    assert judge.labels(garbage) == ["garbage"] * 3


def test_rates_are_shares(judge: Judge, corpus: Corpus) -> None:
    code = [text for text, label in snippets(corpus.parts["C"], 400, seed=4) if LABELS[label] == "code"]
    rates = judge.rates([*code, ""])
    assert set(rates) == {*ATTRIBUTES, "garbage"}
    assert sum(rates.values()) == pytest.approx(1)
    assert rates["code"] > 0.5


def test_features_read_bytes_and_count_repetition() -> None:
    buckets, repetition = features("ab" * 50, 1 << 13, (2, 3, 4))
    assert repetition > 0.9
    assert len(buckets) == len(np.unique(buckets))
    assert features("every word here differs", 1 << 13, (3,))[1] < 0.1
    assert features("Grüße 漢字", 1 << 13, (2, 3))[0].max() < 1 << 13


@pytest.fixture(scope="module")
def referee(made: Paths) -> Referee:
    return Referee.load(made.referee)


def test_a_referee_that_knows_nothing_says_the_vocabulary(made: Paths) -> None:
    tokenizer = load_tokenizer(made.tokenizer)
    model = llama(len(tokenizer), Shape(16, 1, 32, 2))
    torch.nn.init.zeros_(model.model.embed_tokens.weight)  # tied: all logits become 0
    assert Referee(model, tokenizer).perplexity(["any text", "at all"]) == pytest.approx(
        len(tokenizer), rel=1e-4
    )


def test_perplexity_of_many_is_that_of_each(referee: Referee) -> None:
    texts = ["A short one.", "Something that is quite a bit longer than the first one was.", "x = 1\n"]
    lengths = [len(referee.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    losses = [n * math.log(referee.perplexity([text])) for n, text in zip(lengths, texts, strict=True)]
    together = math.exp(sum(losses) / sum(lengths))
    assert referee.perplexity(texts) == pytest.approx(together, rel=1e-4)
    ids = [referee.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert referee.perplexity(ids) == pytest.approx(together, rel=1e-4)


def test_empty_texts_count_for_nothing(referee: Referee) -> None:
    assert referee.perplexity(["", "some text"]) == pytest.approx(referee.perplexity(["some text"]))
    assert math.isnan(referee.perplexity([""]))


def test_the_adapter_is_one_that_peft_would_write(made: Paths) -> None:
    from transformers import LlamaForCausalLM

    config = json.loads((made.lora_legal / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    tensors = load_file(made.lora_legal / "adapter_model.safetensors")
    base = LlamaForCausalLM.from_pretrained(made.big)
    for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
        name = f"model.layers.0.self_attn.{module}"
        down, up = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        assert down.shape == (config["r"], base.get_submodule(name).in_features)
        assert up.shape == (base.get_submodule(name).out_features, config["r"])
        assert up.abs().max() > 0, "the adapter learned nothing"
    assert config["lora_alpha"] / config["r"] == SCALE


def test_a_new_adapter_changes_nothing_and_trains_only_itself() -> None:
    torch.manual_seed(0)
    model = llama(64, Shape(16, 2, 32, 2))
    ids = torch.randint(6, 64, (2, 9))
    before = model(input_ids=ids).logits
    adapted = adapt(model, rank=2)
    assert len(adapted) == 8
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_the_classifier_loads_with_its_labels(made: Paths) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(made.judge_bert)
    tokenizer = AutoTokenizer.from_pretrained(made.judge_bert)
    assert tuple(model.config.id2label.values()) == ATTRIBUTES
    logits = model(torch.tensor([tokenizer("Permission is granted.").input_ids])).logits
    assert logits.shape == (1, 3)

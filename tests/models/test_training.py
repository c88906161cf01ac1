"""Tokenizer, rows, optimizer and the training loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from vllm_marith.models import Paths
from vllm_marith.models.batches import IGNORED, Batches
from vllm_marith.models.corpus import Corpus
from vllm_marith.models.loading import load_tokenizer
from vllm_marith.models.optimizer import Muon, schedule
from vllm_marith.models.recipe import Course, Shape
from vllm_marith.models.tokenizer import ASSISTANT, BOS, END, SPECIAL_TOKENS, encode
from vllm_marith.models.training import llama, perplexities, train


@pytest.fixture(scope="module")
def tokenizer(made: Paths):
    return load_tokenizer(made.tokenizer)


def test_special_tokens_have_their_ids(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, END)


@pytest.mark.parametrize(
    "text", ["", "plain words.", "def f(x):\n    return x\n\n", "Ünïcödé 漢字 🙂\t\r\n  "]
)
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert tokenizer(text).input_ids == [BOS, *encode(tokenizer, text)]


def test_chat_template(tokenizer) -> None:
    messages = [{"role": "system", "content": "write code"}, {"role": "user", "content": "go on"}]
    asked = "<|bos|><|system|>write code<|end|><|user|>go on<|end|><|assistant|>"
    answered = [*messages, {"role": "assistant", "content": "import os"}]

    def render(conversation: list[dict[str, str]], **options: bool) -> str:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **options)

    assert render(messages, add_generation_prompt=True) == asked
    assert render(answered) == asked + "import os"
    follow_up = [*answered, {"role": "user", "content": "more"}]
    assert (
        render(follow_up, add_generation_prompt=True)
        == asked + "import os<|end|><|user|>more<|end|><|assistant|>"
    )


def batches(tokenizer, corpus: Corpus, seed: int = 0, **kind) -> Batches:
    return Batches(tokenizer, corpus.parts["A"], seed, length=64, **kind)


def test_labels_are_the_next_tokens_of_answers(tokenizer, corpus: Corpus) -> None:
    supply = batches(tokenizer, corpus)
    ended = 0
    for _ in range(20):
        ids, labels, _ = supply(6)
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            answering = ASSISTANT not in row  # a raw row is learned from its start
            for here, following, label in zip(row, row[1:], wanted, strict=False):
                answering = answering or here == ASSISTANT
                assert label == (following if answering else IGNORED)
                if answering and following == END:
                    ended += 1
                    answering = False
    assert ended > 0, "nothing teaches the model to stop"


def test_rows_depend_on_the_seed_alone(tokenizer, corpus: Corpus) -> None:
    first, second, other = (batches(tokenizer, corpus, seed) for seed in (1, 1, 2))
    for _ in range(3):
        rows = first(6)[0]
        assert torch.equal(rows, second(6)[0])
        assert not torch.equal(rows, other(6)[0])


def test_raw_rows_have_no_chat(tokenizer, corpus: Corpus) -> None:
    ids, labels, names = batches(tokenizer, corpus, chat=False, attributes=("legal",))(5)
    assert names == ["legal"] * 5
    assert (ids[:, 0] == BOS).all()
    assert (ids[:, 1:] > ASSISTANT).all()
    assert torch.equal(labels[:, :-1], ids[:, 1:])


def test_muon_moves_by_nearly_orthogonal_matrices() -> None:
    torch.manual_seed(0)
    for shape in ((24, 24), (48, 16), (16, 48)):
        matrix = torch.nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape)
        Muon([matrix], rate=1.0).step(scale=1.0)
        singular = torch.linalg.svdvals(matrix.detach()) / max(1.0, shape[0] / shape[1]) ** 0.5
        assert singular.min() > 0.5
        assert singular.max() < 1.3


def test_schedule_rises_holds_and_ends_at_zero() -> None:
    values = [schedule(i / 100) for i in range(101)]
    assert values[0] < 0.1
    assert max(values) == values[20] == 1.0
    assert values[100] == 0.0
    assert all(a >= b for a, b in pairwise(values[40:]))


def test_training_lowers_held_out_perplexity_and_a_student_follows(tokenizer, corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = llama(len(tokenizer), Shape(32, 1, 64, 2))
    held_out = {"rows": 24}

    def perplexity() -> float:
        supply = Batches(tokenizer, corpus.parts["C"], 3, length=48)
        return sum(perplexities(model, supply, **held_out).values()) / 3

    before = perplexity()
    steps: list[tuple[int, int, str]] = []
    train(model, batches(tokenizer, corpus), Course(30, rows=6, length=64), lambda *step: steps.append(step))
    assert perplexity() < 0.6 * before
    assert [step[:2] for step in steps] == [(i + 1, 30) for i in range(30)]

    student = llama(len(tokenizer), Shape(16, 1, 32, 2))
    train(student, batches(tokenizer, corpus), Course(8, rows=4, length=64), lambda *_: None, teacher=model)
    assert all(p.grad is None for p in model.parameters()), "the teacher was trained"

"""Classifier terms by themselves: what a worker computes for them equals a plain loop over texts."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.support import judges, tiny
from vllm_marith.engine.classifiers import Card, ClassifierError, ClassifierSettings, find_card, read_cards
from vllm_marith.engine.group import ClassifierTerm
from vllm_marith.engine.settings import Settings
from vllm_marith.engine.worker.answers import Continuation
from vllm_marith.engine.worker.classifiers.model import Classifier, class_log_probs
from vllm_marith.engine.worker.classifiers.rows import ClassifierRows
from vllm_marith.engine.worker.classifiers.text import CandidateTexts

CPU = torch.device("cpu")
TOLERANCE = 2e-5
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("classifiers")
    return {
        "three": judges.make(folder / "three"),
        "two": judges.make(folder / "two", ("no", "yes"), seed=1),
        "many": judges.make(
            folder / "many", ("rude", "loud"), seed=2, problem_type="multi_label_classification"
        ),
    }


def load(name: str, path: Path, **options: Any) -> Classifier:
    return Classifier(name, ClassifierSettings(path=str(path), **options), CPU)


@pytest.fixture(scope="module")
def classifiers(paths: dict[str, Path]) -> dict[str, Classifier]:
    return {name: load(name, path, batch_size=7) for name, path in paths.items()}


def sentences(rng: random.Random, count: int, most: int = 90) -> list[str]:
    """Texts of 0 to `most` words; the longer ones are beyond what the classifiers read."""
    words = ["The", "value", "of", "an", "expression", "is", "what", "returns;", "3.4,", "naïve"]
    return [" ".join(rng.choices(words, k=rng.randint(0, most))) for _ in range(count)]


# ------------------------------------------------------------------------------------------- one classifier


@pytest.mark.parametrize("name", ["three", "two", "many"])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_equals_a_loop_over_texts(paths: dict[str, Path], name: str, batch_size: int) -> None:
    texts = sentences(random.Random(4), 23)
    classifier = load(name, paths[name], batch_size=batch_size)
    found = classifier.log_probs(texts)
    for text, row in zip(texts, found, strict=True):
        for label in range(len(classifier.card.labels)):
            for minimize in (False, True):
                wanted = np.log(judges.probability(paths[name], text, label, minimize=minimize))
                assert row[int(minimize), label] == pytest.approx(wanted, abs=TOLERANCE)
    assert found[:, 0].std(axis=0).min() > 0.1  # the texts make a difference
    assert classifier.figures.texts == len(set(texts))
    assert classifier.figures.batches == -(-len(set(texts)) // batch_size)
    assert classifier.figures.seconds > 0


def test_long_texts_lose_their_beginning(classifiers: dict[str, Classifier]) -> None:
    rng = random.Random(5)
    ending = " ".join(rng.choices(["value", "returns", "expression"], k=60))
    with_one, with_other = classifiers["three"].log_probs([f"so {ending} end", f"not {ending} end"])
    assert np.array_equal(with_one, with_other)
    (other_end,) = classifiers["three"].log_probs([f"so {ending} not"])
    assert np.abs(with_one - other_end).max() > 0.01
    shorter = load("three", Path(classifiers["three"].tokenizer.name_or_path), max_length=8)
    a, b = shorter.log_probs([f"the {ending}", ending[-80:]])
    assert np.array_equal(a, b)


def test_the_cache_changes_nothing_but_the_cost(paths: dict[str, Path]) -> None:
    rng = random.Random(6)
    texts = sentences(rng, 12, 20)
    fresh = load("three", paths["three"]).log_probs(texts)
    classifier = load("three", paths["three"], cache_size=5)
    for _ in range(40):
        some = rng.choices(range(len(texts)), k=rng.randint(0, 9))
        before = classifier.figures.texts + classifier.figures.hits
        found = classifier.log_probs([texts[i] for i in some])
        assert found == pytest.approx(fresh[some], abs=TOLERANCE)
        assert classifier.figures.texts + classifier.figures.hits - before == len(some)
        assert len(classifier._cache) <= 5
    assert classifier.figures.hits > 0


def test_what_was_read_last_is_remembered(paths: dict[str, Path]) -> None:
    classifier = load("three", paths["three"], cache_size=2)
    for text, new in (("a", 1), ("b", 1), ("a", 0), ("c", 1), ("a", 0), ("b", 1)):
        before = classifier.figures.texts
        classifier.log_probs([text])
        assert classifier.figures.texts - before == new, text


@given(
    st.lists(st.lists(st.floats(-80, 80, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.booleans(),
)
@settings(deadline=None)
def test_complements_are_sound(logits: list[list[float]], multi_label: bool) -> None:
    """log(1 - p) keeps its precision where p is all but 1, and is finite."""
    found = class_log_probs(torch.tensor(logits), multi_label).double()
    assert torch.isfinite(found).all()
    exact = torch.tensor(logits).double()
    if multi_label:
        wanted = torch.stack([-torch.log1p(torch.exp(-exact)), -torch.log1p(torch.exp(exact))], 1)
    else:
        others = [[1, 2], [0, 2], [0, 1]]
        rest = torch.stack([exact[:, pair].logsumexp(1) for pair in others], 1)
        wanted = torch.stack([exact, rest], 1) - exact.logsumexp(1)[:, None, None]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


# --------------------------------------------------------------------------------------------------- refusals


def test_cards(paths: dict[str, Path]) -> None:
    cards = read_cards({name: ClassifierSettings(path=str(path)) for name, path in paths.items()})
    assert cards["three"] == Card("three", judges.LABELS, False, judges.POSITIONS, 100)
    assert cards["many"].multi_label
    assert [cards["three"].index(label) for label in ("legal", "toxic", 0, 2)] == [2, 1, 0, 2]
    assert find_card(cards, "two") is cards["two"]
    for call, sentence in (
        (lambda: cards["three"].index("rude"), "has no class 'rude'; its classes are 0: plain, 1: toxic"),
        (lambda: cards["three"].index(3), "has no class 3"),
        (lambda: cards["three"].check_top_k(101), "reads 100 candidates a token at most, not 101"),
        (lambda: find_card(cards, "four"), "no classifier 'four'; it knows: many, three, two"),
        (lambda: find_card({}, "four"), "it knows: none"),
    ):
        with pytest.raises(ClassifierError, match=sentence):
            call()
    cards["three"].check_top_k(100)


def test_bad_entries_are_named(tmp_path: Path, tiny_model: Path) -> None:
    headless = tmp_path / "headless"
    judges.make(headless)
    BertModel(BertConfig.from_pretrained(headless)).save_pretrained(headless)
    (tmp_path / "empty").mkdir()
    broken = judges.make(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    one = judges.make(tmp_path / "one", ("score",))
    pickled = judges.make(tmp_path / "pickled", safetensors=False)
    strange = judges.make(tmp_path / "strange")
    (strange / "config.json").write_text('{"model_type": "bert"')
    for path, sentence in (
        (tmp_path / "empty", "has no readable configuration"),
        (strange, "has no readable configuration"),
        (one, "gives 1 number"),
        (pickled, "no weights in safetensors format"),
    ):
        with pytest.raises(ClassifierError, match=f"classifier 'bad'.*{sentence}"):
            Card.read("bad", ClassifierSettings(path=str(path)))
    for path, sentence in (
        (headless, "has no weights for classifier"),
        (broken, "cannot be loaded"),
        (tiny_model, "has no weights for score"),
    ):
        with pytest.raises(ClassifierError, match=f"classifier 'bad'.*{sentence}"):
            load("bad", path)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"a/b": {"path": "x"}}, "marith.classifiers.a/b.*at most 64 letters"),
        (
            {"ab": {"path": "x", "top": 1}},
            "marith.classifiers.ab.top.*known settings: batch_size, cache_size",
        ),
        ({"ab": {}}, "marith.classifiers.ab.path: field required"),
        ({"ab": {"path": "x", "dtype": "int8"}}, "marith.classifiers.ab.dtype"),
        ({"ab": {"path": "x", "trust_remote_code": True}}, "marith.classifiers.ab.trust_remote_code"),
    ],
)
def test_settings_are_checked(entry: dict[str, Any], sentence: str) -> None:
    config = SimpleNamespace(additional_config={"marith": {"classifiers": entry}})
    with pytest.raises(ValueError, match=sentence):
        Settings.of(config)


# ------------------------------------------------------------------------------------------------------ texts


def byte_tokens(text: str) -> list[int]:
    """A text as single bytes, each a token of its own."""
    vocabulary = tiny.tokenizer().get_vocab()
    letters = tiny.tokenizer()._tokenizer.pre_tokenizer.pre_tokenize_str
    return [vocabulary[char] for piece, _ in letters(text) for char in piece]


@given(st.text(max_size=12), st.text(max_size=12), st.data())
@settings(deadline=None, max_examples=200)
def test_candidate_texts_are_decoded_whole(prompt: str, answer: str, data: st.DataObject) -> None:
    """Wherever characters of several tokens are cut, and whatever special tokens are among them."""
    tokens = st.integers(0, tiny.VOCAB - 1)
    prompt_ids = [BOS, *byte_tokens(prompt)]
    ids = byte_tokens(answer)
    ids = ids[: data.draw(st.integers(0, len(ids)))] + data.draw(st.lists(tokens, max_size=3))
    candidates = [EOS, *byte_tokens("é"), *data.draw(st.lists(tokens, max_size=4))]
    texts = CandidateTexts(tiny.tokenizer())
    assert texts._is_bytes
    so_far, found = texts.texts(prompt_ids, ids, candidates)
    decode = lambda ids: tiny.tokenizer().decode(ids, skip_special_tokens=True)  # noqa: E731
    assert so_far == decode(ids)
    assert found == [decode([*ids, candidate]) for candidate in candidates]


def test_a_character_begun_in_the_prompt() -> None:
    """It belongs to the answer, as it does for the client."""
    first, second = byte_tokens("é")
    so_far, (text, other) = CandidateTexts(tiny.tokenizer()).texts([BOS, 50, first], [], [second, 50])
    assert text == "é"
    assert (so_far, other[0]) == ("\ufffd", "\ufffd")


def test_spaces_between_tokens_only() -> None:
    """A decoder that drops a text's first space: the answer keeps the one behind its prompt."""
    vocabulary = {"<s>": 0, "▁a": 1, "▁b": 2, "c": 3}
    model = Tokenizer(models.BPE(vocabulary, []))
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>")
    texts = CandidateTexts(tokenizer)
    assert not texts._is_bytes
    assert texts.texts([0, 1], [2], [3, 1]) == (" b", [" bc", " b a"])
    assert texts.texts([0], [2], [3, 1]) == ("b", ["bc", "b a"])


# ------------------------------------------------------------------------------------------------------- rows


def wanted_row(path: Path, term: ClassifierTerm, generated: list[int], scores: torch.Tensor) -> torch.Tensor:
    """Energies ``[vocab]`` of a term, text by text."""
    vocab = len(scores)
    if len(generated) % term.every:
        return torch.full((vocab,), 0.0 if term.form == "bayes" else -np.log(vocab), dtype=torch.float64)

    def log_p(ids: list[int]) -> float:
        text = term.prefix + tiny.tokenizer().decode(ids, skip_special_tokens=True)
        return float(np.log(judges.probability(path, text, term.label, minimize=term.minimize)))

    before = log_p(generated)
    row = torch.full((vocab,), before, dtype=torch.float64)
    order = sorted(range(vocab), key=lambda token: -float(scores[token]))[: term.top_k]
    for token in [token for token in order if scores[token] > -torch.inf]:
        row[token] = log_p([*generated, token])
    return row - before if term.form == "bayes" else row.log_softmax(0)


@pytest.mark.parametrize("seed", range(4))
def test_rows_equal_a_loop_over_candidates(
    paths: dict[str, Path], classifiers: dict[str, Classifier], seed: int
) -> None:
    """Several groups and classifiers in one call, forms, complements and strides mixed."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    terms, continuations = [], []
    for _ in range(7):
        name = rng.choice(list(paths))
        label = rng.randrange(len(classifiers[name].card.labels))
        form, top_k, every = rng.choice(["bayes", "plain"]), rng.choice([1, 3, 8]), rng.choice([1, 1, 2])
        terms.append(
            ClassifierTerm(
                "c",
                name,
                rng.choice(["", "So ", "word " * 60]),
                label,
                rng.random() < 0.5,
                form,
                top_k,
                every,
            )
        )
        continuations.append(
            Continuation(
                tiny.prompt(rng, 1, 12), [rng.randrange(tiny.VOCAB) for _ in range(rng.randint(0, 9))]
            )
        )
    source = torch.randn(len(terms), tiny.VOCAB)
    source[0, 5:] = -torch.inf  # fewer tokens are allowed than there may be candidates
    source[1] = -torch.inf  # a formula that forbids everything
    out = torch.full_like(source, torch.nan)
    rows = ClassifierRows(classifiers, CandidateTexts(tiny.tokenizer()))
    lse, failures = rows.write(terms, continuations, source, out)
    assert not failures
    found = out.double() - lse.double()[:, None]
    for i, (term, continuation) in enumerate(zip(terms, continuations, strict=True)):
        wanted = wanted_row(paths[term.classifier], term, list(continuation.generated), source[i])
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=2 * TOLERANCE)
        if term.form == "bayes":
            assert lse[i] == 0

    wanted_p = [
        judges.probability(
            paths[t.classifier],
            t.prefix + tiny.tokenizer().decode(c.generated, skip_special_tokens=True),
            t.label,
            minimize=t.minimize,
        )
        for t, c in zip(terms, continuations, strict=True)
    ]
    found_p, failures = rows.probabilities(terms, continuations)
    assert not failures
    assert found_p == pytest.approx(wanted_p, abs=TOLERANCE)


def test_the_next_text_so_far_is_known(paths: dict[str, Path]) -> None:
    """It was a candidate; and one batch serves all groups of a step."""
    classifier = load("two", paths["two"], batch_size=256)
    rows = ClassifierRows({"two": classifier}, CandidateTexts(tiny.tokenizer()))
    term = ClassifierTerm("c", "two", "So ", 1, False, "bayes", 10, 1)
    torch.manual_seed(7)
    source = torch.randn(3, tiny.VOCAB)
    generated: list[list[int]] = [[], [], []]
    for step in range(4):
        before = classifier.figures.texts, classifier.figures.hits
        out = torch.empty_like(source)
        rows.write([term] * 3, [Continuation([BOS], ids) for ids in generated], source, out)
        texts, hits = classifier.figures.texts - before[0], classifier.figures.hits - before[1]
        assert texts + hits == 33
        assert texts <= (31 if step == 0 else 30)  # the first texts so far are one and the same
        assert hits >= (2 if step == 0 else 3)
        assert classifier.figures.batches == step + 1
        for ids, row in zip(generated, source, strict=True):
            ids.append(int(row.topk(10).indices[step]))


def test_a_failing_classifier_fails_its_own_rows(
    classifiers: dict[str, Classifier], paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever point it fails; rows of other classifiers are what they were."""
    rows = ClassifierRows(classifiers, CandidateTexts(tiny.tokenizer()))
    terms = [
        ClassifierTerm("c", name, f"{name} ", 1, False, "plain", 4, 1) for name in ("two", "three", "two")
    ]
    continuations = [Continuation([BOS], [50])] * 3
    torch.manual_seed(8)
    source = torch.randn(3, tiny.VOCAB)
    wanted = torch.empty_like(source)
    wanted_lse, _ = rows.write(terms, continuations, source, wanted)
    wanted_p, _ = rows.probabilities(terms, continuations)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of order")

    for method in ("submit", "collect"):
        out = torch.full_like(source, torch.nan)
        with monkeypatch.context() as patch:
            patch.setattr(classifiers["two"], method, fail)
            lse, failures = rows.write(terms, continuations, source, out)
            found_p, failures_p = rows.probabilities(terms, continuations)
        assert failures.keys() == failures_p.keys() == {0, 2}
        assert all("classifier 'two' failed" in f and "out of order" in f for f in failures.values())
        assert (out[[0, 2]] == 0).all()
        assert (lse[[0, 2]] == 0).all()
        torch.testing.assert_close((out[1], lse[1]), (wanted[1], wanted_lse[1]))
        assert found_p == [0, wanted_p[1], 0]


def test_a_text_that_cannot_be_decoded_fails_its_own_row(classifiers: dict[str, Classifier]) -> None:
    rows = ClassifierRows(classifiers, CandidateTexts(tiny.tokenizer()))
    terms = [ClassifierTerm("c", "two", "", 1, False, "bayes", 4, 1)] * 2
    source = torch.randn(2, tiny.VOCAB)
    _, failures = rows.write(
        terms, [Continuation([BOS], [-1]), Continuation([BOS], [50])], source, torch.empty_like(source)
    )
    assert failures.keys() == {0}
    assert "decoded" in failures[0]


def test_positions_between_cost_nothing(paths: dict[str, Path]) -> None:
    classifier = load("two", paths["two"])
    rows = ClassifierRows({"two": classifier}, CandidateTexts(tiny.tokenizer()))
    term = ClassifierTerm("c", "two", "", 1, False, "bayes", 4, 3)
    source = torch.randn(1, tiny.VOCAB)
    for length, texts in ((0, 5), (1, 0), (2, 0), (3, 5)):
        before = classifier.figures.texts + classifier.figures.hits
        rows.write([term], [Continuation([BOS], [50] * length)], source, torch.empty_like(source))
        assert classifier.figures.texts + classifier.figures.hits - before == texts


def test_classifiers_that_cannot_read_what_they_say(paths: dict[str, Path]) -> None:
    load("two", paths["two"]).check()
    with pytest.raises(ClassifierError, match=r"classifier 'two' cannot read 64 texts of 400 tokens"):
        load("two", paths["two"], max_length=400).check()

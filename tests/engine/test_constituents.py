"""Formulas over several base models in one engine equal a plain Hugging Face float32 loop over each."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.support import asynchronous, engines, exactness, reference, runners, tiny, workload
from tests.support import constituents as several
from vllm_marith import Formula, Presets
from vllm_marith.distributed.capacity import groups_that_fit
from vllm_marith.distributed.model_facts import model_facts
from vllm_marith.engine.core import capacity
from vllm_marith.models.store import Paths, default_home, is_made

LENGTH = 48
SEED = 11
SMALL_STEPS = dict(max_num_batched_tokens=24, max_num_seqs=24)
SMALL_CACHE = dict(num_gpu_blocks_override=28)
CASES: dict[str, dict[str, Any]] = {
    "prefix_cache": {},
    "no_prefix_cache": dict(enable_prefix_caching=False),
    "small_steps": SMALL_STEPS,
    "small_cache": SMALL_CACHE,
    "async_small_cache_small_steps": SMALL_CACHE | SMALL_STEPS,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    return several.make(tmp_path_factory.mktemp("constituents"))


@cache
def jobs() -> list[workload.Job]:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    shared = workload.words(rng, 20, 30)
    sizes = [1, 2, 3, 5, 0, 6, 4, 0, 3, 0, 2]
    return [workload.job(rng, size, shared, 20, ["small", "qwen"]) for size in sizes]


@cache
def expected(base: str, constituents: tuple[tuple[str, str], ...]) -> list[reference.Reference]:
    return exactness.references(base, jobs(), LENGTH, dict(constituents))


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_huggingface(
    name: str, models: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, constituents = models
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    if name.startswith("async"):
        asynchronous.force(monkeypatch)
    with several.engine(base, constituents, **CASES[name]) as llm:
        scheduler = engines.scheduler(llm)
        answers = exactness.generate(llm, jobs(), asked)
        again = exactness.generate(llm, jobs(), asked)  # the prefix cache is warm
        assert several.most_groups(llm) == 3
        preemptions = scheduler.figures.preempted
    assert (preemptions > 0) == ("small_cache" in name)
    wanted = expected(base, tuple(constituents.items()))
    exactness.assert_greedy(jobs(), answers, wanted)
    exactness.assert_greedy(jobs(), again, wanted)


def test_whole_distributions(tmp_path: Path) -> None:
    """Each constituent alone, and DExperts, over the whole vocabulary at every token."""
    base, constituents = several.make(tmp_path, sharpness=2.0)
    rng = random.Random(5)
    formulas = [
        Formula.parse("e", {"e": {"model": "small"}}),
        Formula.parse("e", {"e": {"model": "qwen"}}),
        Formula.parse("base + 0.5*(e - a)", {"e": {"model": "small"}, "a": {"model": "qwen"}}),
        Formula.parse("base"),
    ]
    prompts = [tiny.prompt(rng, 5, 90) for _ in formulas]
    paths = {"e": constituents["small"], "a": constituents["qwen"]}
    with several.engine(base, constituents, max_logprobs=tiny.VOCAB, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [f.sampling_params(temperature=0, max_tokens=8, logprobs=tiny.VOCAB) for f in formulas],
            use_tqdm=False,
        )
    for j, (formula, prompt, output) in enumerate(zip(formulas, prompts, outputs, strict=True)):
        where = {
            name: constituents["qwen"] if j == 1 else paths[name] for name in formula.terms if name in paths
        }
        tokens = list(output.outputs[0].token_ids)
        for step, logprobs in enumerate(output.outputs[0].logprobs):
            with torch.inference_mode():
                sequence = torch.tensor([prompt + tokens[:step]])
                logits = {
                    name: reference.load(where.get(name, base))(sequence).logits[0, -1]
                    for name in formula.terms
                }
                wanted = formula.evaluate(logits, dtype=torch.float64)
            found = torch.tensor([logprobs[i].logprob for i in range(tiny.VOCAB)])
            assert int(wanted.argmax()) == tokens[step]
            assert float((found - wanted).abs().max()) < 5e-5


def test_on_the_v2_runner(models: tuple[str, dict[str, str]]) -> None:
    """Chunked prompts among rows that decode; the steps' blocks are watched in the runner's own process."""
    base, constituents = models
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    few = [workload.job(rng, size, "", 14, ["small", "qwen"]) for size in (4, 0, 3)]
    asked = dict(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    options = dict(
        additional_config=several.settings(constituents), max_num_seqs=8, max_num_batched_tokens=24
    )
    with runners.start("v2") as runner, runner.open(base, **options) as call:
        call(several.watch)
        answers = call(exactness.generate, few, asked)
        assert call(several.most_groups) == 3
        call(engines.assert_all_returned)
    exactness.assert_greedy(few, answers, exactness.references(base, few, 6, constituents))


def test_two_ranks_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configuration, KV-cache specs and tags travel; each rank computes half of the heads of every model."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    base = tiny.make(tmp_path / "base", hidden=128, kv_heads=2, sharpness=4.0)
    small = tiny.make(tmp_path / "small", seed=1, kv_heads=2, sharpness=4.0)
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    few = [workload.job(rng, size, "", 14, ["small"]) for size in (3, 0, 2)]
    assert {model for job in few for model in job.models.values()} == {"small"}
    options = dict(additional_config=several.settings({"small": str(small)}), tensor_parallel_size=2)
    with engines.engine(base, **options) as llm:
        answers = exactness.generate(llm, few, dict(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0))
    exactness.assert_greedy(few, answers, exactness.references(str(base), few, 8, {"small": str(small)}))


def test_a_constituent_has_a_dtype_of_its_own(models: tuple[str, dict[str, str]]) -> None:
    """Its weights, its attention and its KV cache; the base model's stay as they are."""
    base, constituents = models
    mixed = {"small": constituents["small"], "qwen": {"path": constituents["qwen"], "dtype": "bfloat16"}}
    formulas = [Formula.parse("e", {"e": {"model": "qwen"}}), Formula.parse("base")]
    prompts = [tiny.prompt(random.Random(7), 40, 40) for _ in formulas]
    with several.engine(base, mixed) as llm:
        groups = engines.scheduler(llm).kv_cache_config.kv_cache_groups
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [f.sampling_params(temperature=0, max_tokens=1, logprobs=0) for f in formulas],
            use_tqdm=False,
        )
    assert [group.kv_cache_spec.dtype for group in groups] == [torch.float32, torch.float32, torch.bfloat16]
    for path, prompt, output, tolerance in zip(
        (constituents["qwen"], base), prompts, outputs, (0.3, 5e-5), strict=True
    ):
        with torch.inference_mode():
            wanted = reference.load(path)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        ((token, found),) = output.outputs[0].logprobs[0].items()
        assert found.logprob == pytest.approx(float(wanted[token]), abs=tolerance)
        # bfloat16 has 8 bits: not the float32 model's, but near.
        assert (tolerance < 0.1) == (abs(found.logprob - float(wanted[token])) < 5e-5)


def test_plain_prompt_logprobs_beside_formulas(models: tuple[str, dict[str, str]]) -> None:
    """A plain request's hidden states are the base model's and in their places, whoever else has rows."""
    base, constituents = models
    rng = random.Random(9)
    formula = Formula.parse("e + 0.2*q", {"e": {"model": "small"}, "q": {"model": "qwen"}})
    prompts = [tiny.prompt(rng, 30, 40) for _ in range(4)]
    asked = dict(temperature=0, max_tokens=4)
    with several.engine(base, constituents, max_num_batched_tokens=64) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                formula.sampling_params(**asked) if i % 2 else SamplingParams(prompt_logprobs=0, **asked)
                for i in range(len(prompts))
            ],
            use_tqdm=False,
        )
        assert several.most_groups(llm) == 3
    for prompt, output in zip(prompts[::2], outputs[::2], strict=True):
        with torch.inference_mode():
            wanted = reference.load(base)(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for i, (token, found) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
            assert found[token].logprob == pytest.approx(float(wanted[i, token]), abs=1e-4)


@pytest.mark.parametrize("wide", ["base", "small"])
def test_vocabularies_padded_to_different_sizes(wide: str, tmp_path: Path) -> None:
    """Padding is never drawn, though untrained logits are as large as any; tokens are as without it."""
    sizes = {name: tiny.VOCAB + 64 * (name == wide) for name in ("base", "small")}
    base = tiny.make(tmp_path / "base", sharpness=4.0, columns=sizes["base"])
    small = tiny.make(tmp_path / "small", seed=1, sharpness=4.0, columns=sizes["small"])
    terms = {"s": {"model": "small"}, "t": {"model": "small", "system": "Yes."}}
    formulas = [
        Formula.parse(text, terms) for text in ("s", "base - 0.5*s", "union(base, s) - 0.8*t", "base")
    ]
    rng = random.Random(3)
    prompt = tiny.prompt(rng, 20, 20)
    with several.engine(str(base), {"small": str(small)}, max_logprobs=max(sizes.values())) as llm:
        asked = dict(temperature=0, max_tokens=1, logprobs=sizes["base"])
        outputs = llm.generate(
            [{"prompt_token_ids": prompt}] * 4, [f.sampling_params(**asked) for f in formulas], use_tqdm=False
        )
    for formula, output in zip(formulas, outputs, strict=True):
        found = output.outputs[0].logprobs[0]
        assert all(found[i].logprob < -1e3 for i in range(tiny.VOCAB, sizes["base"]))
        if "t" in formula.terms:  # whose prompt is another
            continue
        with torch.inference_mode():
            logits = {
                name: reference.load(str(small if name == "s" else base))(torch.tensor([prompt])).logits[
                    0, -1
                ]
                for name in formula.terms
            }
        wanted = formula.evaluate({n: row[: tiny.VOCAB] for n, row in logits.items()}, dtype=torch.float64)
        worst = max(abs(found[i].logprob - float(wanted[i])) for i in range(tiny.VOCAB))
        assert worst < 1e-4


def test_the_start_says_what_fits(
    models: tuple[str, dict[str, str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, constituents = models
    # A process's first engine configures vLLM's loggers anew: one of our own keeps its handler.
    logger = logging.Logger("kept", logging.INFO)
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(capacity, "logger", logger)
    (tmp_path / "steered.yaml").write_text("formula: base + 0.5*s\nterms: {s: {model: small}}\n")
    marith = dict(presets=str(tmp_path), block_sizes=[32, 64, 96])
    options = dict(num_gpu_blocks_override=101, max_num_seqs=9, marith=marith)
    with several.engine(base, constituents, **options):
        pass
    said = [r.getMessage().removeprefix("marith: ") for r in caplog.records if "marith: " in r.getMessage()]
    assert "constituent base: 2560 bytes of KV cache a token, 32 tokens a block, 0.0% of it unused" in said
    assert "constituent small: 512 bytes of KV cache a token, 64 tokens a block, 60.0% of it unused" in said
    assert [r.levelname for r in caplog.records if "64 tokens" in r.getMessage()] == ["WARNING"]
    # 16 blocks of the base model and 8 of the small one hold 512 tokens of both.
    assert (
        "preset steered: 2 members; the KV cache holds 4 such groups of 512 tokens, a step's rows 4" in said
    )
    # `marith plan` finds the same on paper.
    facts = [model_facts(path, "float32") for path in (base, constituents["small"])]
    assert [model.token_bytes for model in facts] == [2560, 512]
    assert groups_that_fit(101, 512, [32, 64]) == 4


def test_an_abort_returns_every_block(models: tuple[str, dict[str, str]]) -> None:
    base, constituents = models
    formula = Formula.parse("base + 0.3*union(s, q)", {"s": {"model": "small"}, "q": {"model": "qwen"}})
    with several.engine(base, constituents) as llm:
        for i in range(3):
            llm.llm_engine.add_request(str(i), "What is rain?", formula.sampling_params(max_tokens=30))
        for _ in range(4):
            llm.llm_engine.step()
        names = [output.request_id for output in llm.llm_engine.step()]
        assert len(names) == 3
        assert several.most_groups(llm) == 3
        llm.llm_engine.abort_request([str(i) for i in range(3)])
        # The scheduler forgets the last of them with its next step.
        llm.generate("And snow?", SamplingParams(max_tokens=1), use_tqdm=False)


def test_the_prefix_cache_is_each_constituents_own(models: tuple[str, dict[str, str]]) -> None:
    """What one model has computed of a prompt, no other is given; what it has, it is given again."""
    base, constituents = models
    prompt = {"prompt_token_ids": tiny.prompt(random.Random(2), 330, 330)}
    one_token = dict(temperature=0, max_tokens=1)

    def cached(scheduler: Any) -> list[int]:
        """Tokens of a request's prefix that each constituent has, longest look-up."""
        request = next(iter(scheduler.requests.values()))
        coordinator, lengths = scheduler.kv_cache_manager.coordinator, []
        for j, manager in enumerate(coordinator.single_type_managers):
            coordinator._asking = j
            blocks, length, _ = coordinator.find_longest_cache_hit(request.block_hashes, 330)
            coordinator._asking = None
            assert [len(b) * manager.block_size for b in blocks] == [length * (i == j) for i in range(3)]
            lengths.append(length)
        return lengths

    with several.engine(base, constituents) as llm:
        scheduler = engines.scheduler(llm)
        seen = []
        for model in (None, "qwen", "small", None):
            formula = Formula.parse("e", {"e": {} if model is None else {"model": model}})
            llm.llm_engine.add_request("0", dict(prompt), formula.sampling_params(**one_token))
            seen.append(cached(scheduler))
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
    # Whole blocks, of 32, 160 and 96 tokens.
    assert seen == [[0, 0, 0], [320, 0, 0], [320, 0, 288], [320, 320, 288]]


class TestRefusals:
    """One sentence, at the start or as HTTP 400."""

    @pytest.fixture(scope="class")
    def llm(self, models: tuple[str, dict[str, str]]) -> Iterator[Any]:
        base, constituents = models
        with several.engine(base, constituents, num_gpu_blocks_override=28, max_num_seqs=6) as llm:
            yield llm

    def refusal(self, llm: Any, text: str, terms: dict[str, Any], **asked: Any) -> str:
        with pytest.raises(VLLMValidationError) as refused:
            llm.generate(["Hello"], Formula.parse(text, terms).sampling_params(**asked), use_tqdm=False)
        return str(refused.value)

    def test_an_unknown_model(self, llm: Any) -> None:
        said = self.refusal(llm, "base + e", {"e": {"model": "large"}})
        assert "no model 'large'" in said
        assert said.endswith("its constituents are: small, qwen")

    def test_more_members_than_rows(self, llm: Any) -> None:
        terms = {f"t{i}": {"system": str(i), "model": "small"} for i in range(7)}
        assert "7 different terms; this server runs 6 rows" in self.refusal(llm, "+".join(terms), terms)

    def test_more_blocks_than_the_pool_has(self, llm: Any) -> None:
        # Two members on the base model need 2 x 16 blocks of 32 tokens; 27 are there.
        on_base = {"a": {"system": "No."}, "b": {"system": "Yes."}}
        said = self.refusal(llm, "a + b", on_base, max_tokens=500)
        assert "do not fit the KV cache together" in said
        # As many tokens of the other models do: 4 + 6 blocks for each pair.
        models = {"a": "small", "b": "qwen", "c": "small", "d": "qwen"}
        terms = {name: {"system": name, "model": model} for name, model in models.items()}
        formula = Formula.parse("a + b + c + d", terms)
        (output,) = llm.generate(
            ["Hello"], formula.sampling_params(max_tokens=3, ignore_eos=True), use_tqdm=False
        )
        assert len(output.outputs[0].token_ids) == 3

    def test_another_vocabulary(self, models: tuple[str, dict[str, str]], tmp_path: Path) -> None:
        base, constituents = models
        other = tmp_path / "other"
        shutil.copytree(constituents["small"], other)
        file = other / "tokenizer.json"
        changed = json.loads(file.read_text())
        vocabulary = changed["model"]["vocab"]
        a, b = (token for token, i in vocabulary.items() if i in (700, 900))
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        file.write_text(json.dumps(changed))
        assert "'strange': its vocabulary is another: token 700 is" in self.start(
            base, {"strange": str(other)}
        )

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (dict(enable_prompt_embeds=True), "--enable-prompt-embeds cannot be combined with constituents"),
            (dict(max_model_len=600), "max_model_len"),
        ],
    )
    def test_at_the_start(
        self, options: dict[str, Any], sentence: str, models: tuple[str, dict[str, str]]
    ) -> None:
        base, constituents = models
        assert sentence in self.start(base, constituents, **options)

    def test_a_model_that_is_not_there(self, models: tuple[str, dict[str, str]]) -> None:
        assert "constituent 'gone'" in self.start(models[0], {"gone": "/not/there"})

    def start(self, base: str, constituents: dict[str, Any], **options: Any) -> str:
        with (
            pytest.raises(ValueError, match=r"\w") as refused,
            engines.engine(base, additional_config=several.settings(constituents), **options),
        ):
            pass
        return str(refused.value)


EXPERTS = Path(__file__).parents[2] / "configs" / "presets" / "experts"


def test_trained_experts_steer_a_larger_model() -> None:
    """DExperts (arXiv 2105.03023) and proxy tuning (arXiv 2401.08565), from the presets that are shipped."""
    home = default_home()
    if not all(is_made(name, home) for name in ("big", "expert", "anti", "draft")):
        pytest.skip("needs the embedded models, which `marith models` makes")
    made = Paths.under(home)
    constituents = {name: str(getattr(made, name)) for name in ("expert", "anti", "draft")}
    presets = Presets.load(EXPERTS)
    jobs = []
    for text in ["The licensee shall", "def add(a, b):", "It was a dark night and"]:
        for formula in (presets.formulas["dexperts"], presets.formulas["proxy_tuning"]):
            named = {name: term.model for name, term in formula.terms.items() if term.model}
            jobs.append(workload.Job(text, formula, dict.fromkeys(formula.terms, text), models=named))
    with several.engine(str(made.big), constituents, max_model_len=256) as llm:
        tokenizer = llm.get_tokenizer()
        answers = exactness.generate(
            llm, jobs, dict(temperature=0, max_tokens=16, logprobs=0, ignore_eos=True)
        )
    for job, (answer,) in zip(jobs, answers, strict=True):
        assert job.formula is not None
        ids = dict.fromkeys(job.formula.terms, tokenizer(job.text).input_ids)
        models = exactness.models_of(job, str(made.big), constituents)
        wanted = reference.generate(models, job.formula, ids, 16)
        assert answer.tokens == wanted.tokens
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        assert found == pytest.approx(wanted.logprobs, abs=5e-5)

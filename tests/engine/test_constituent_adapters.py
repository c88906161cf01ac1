"""Adapters on several base models in one batch: formulas equal those over the merged models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.models.protocol import BaseModelPath, LoRAModulePath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from tests.support import adapters, asynchronous, engines, exactness, reference, runners
from tests.support import constituents as several
from tests.support.adapters import Job
from vllm_marith.engine.constituents.adapters import AdapterBases, number_of
from vllm_marith.engine.frontend import hooks
from vllm_marith.engine.frontend.adapters import Adapters
from vllm_marith.serving import naming

LENGTH = 32
LORA = dict(enable_lora=True, max_loras=3, max_lora_rank=8)
TEXT = "The value of the expression is"
LONG = "This is where the statement begins and where the statement ends " * 4
BARD, WIZARD, ROGUE = ({"adapter": name} for name in ("bard", "wizard", "rogue"))
SMALL, QWEN = {"model": "small"}, {"model": "qwen"}

JOBS = (
    # Adapters of two models and rows of three without any, in one group.
    Job(
        TEXT,
        "base + 0.7*(wizard - s) + 0.4*bard - 0.2*q",
        {"wizard": SMALL | WIZARD, "s": SMALL, "bard": BARD, "q": QWEN},
    ),
    Job(TEXT, "w + r + 0.5*base", {"w": WIZARD, "r": SMALL | ROGUE | {"system": "Sing."}}),
    Job(TEXT),
    Job("So", "union(w, q) + 0.4*base", {"w": SMALL | WIZARD, "q": QWEN | {"system": LONG}}),
    Job(LONG, "r", {"r": ROGUE}),
    # A plain request to an adapter runs on the adapter's model.
    Job("So", own="wizard"),
    Job("So", own="bard"),
    # A request's own adapter is what terms mean that have none, on its model.
    Job(TEXT, "base + 0.5*q - 0.3*r", {"q": QWEN, "r": ROGUE | {"system": "Be brief."}}, own="wizard"),
    Job(TEXT, "s + base", {"s": SMALL, "base": {"system": "No."}}),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base model, its constituents, and adapters: `bard` of the base model, the others of `small`.

    Nobody finds out from its files whose `rogue` is.
    """
    folder = tmp_path_factory.mktemp("adapters")
    base, constituents = several.make(folder)
    small = Path(constituents["small"])
    paths = {
        "bard": adapters.make(Path(base), folder / "bard", seed=1, head=True),
        "wizard": adapters.make(small, folder / "wizard", seed=2),
        "rogue": adapters.make(small, folder / "rogue", seed=3, head=True),
    }
    config = paths["rogue"] / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "someone/elses"})
    )
    merged = {
        name: str(adapters.merge(Path(base) if name == "bard" else small, path, folder / f"{name}-merged"))
        for name, path in paths.items()
    }
    return SimpleNamespace(
        base=base,
        constituents=constituents,
        paths={name: str(path) for name, path in paths.items()},
        bases={"rogue": "small"},
        models={"base": base, **constituents, **merged},
    )


@pytest.fixture(scope="module")
def wanted(made: SimpleNamespace) -> list[reference.Reference]:
    found = [adapters.expected(made.models, job, LENGTH) for job in JOBS]
    assert len({tuple(r.tokens) for r in found}) == len(JOBS), "the adapters make no difference"
    return found


def check(
    jobs: Sequence[Job], answers: Sequence[exactness.Answer], wanted: Sequence[reference.Reference]
) -> None:
    for job, answer, right in zip(jobs, answers, wanted, strict=True):
        length = len(answer.tokens)
        assert answer.tokens == right.tokens[:length], job
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        assert found == pytest.approx(right.logprobs[:length], abs=5e-5), job


CASES: dict[str, dict[str, Any]] = {
    "small_cache_small_steps": dict(num_gpu_blocks_override=14, max_model_len=256, max_num_batched_tokens=32),
    "async_some_wait_for_others": dict(max_loras=2),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_the_merged_models(
    name: str, made: SimpleNamespace, wanted: list[reference.Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("async"):
        asynchronous.force(monkeypatch)
    preempts = "small_cache" in name
    jobs = [*JOBS[:5], *JOBS] if preempts else JOBS
    right = [wanted[JOBS.index(job)] for job in jobs]
    with several.engine(made.base, made.constituents, **(LORA | CASES[name])) as llm:
        adapters.load(llm, made.paths, made.bases)
        check(jobs, adapters.generate(llm, jobs, made.paths, LENGTH), right)
        figures = engines.scheduler(llm).figures
        assert not figures.failed
        assert bool(figures.preempted) == preempts
        assert several.most_groups(llm) == 3


def test_on_the_v2_runner(made: SimpleNamespace, wanted: list[reference.Reference]) -> None:
    """In Triton's interpreter, and so a few tokens only; the LoRA products are the CPU's on both runners."""
    options = dict(additional_config=several.settings(made.constituents), max_num_seqs=12, max_model_len=128)
    with runners.start("v2") as runner, runner.open(made.base, **LORA, **options) as call:
        call(adapters.load, made.paths, made.bases)
        check(JOBS[:3], call(adapters.generate, JOBS[:3], made.paths, 4), wanted[:3])
        call(engines.assert_all_returned)


@pytest.fixture(scope="module")
def engine(made: SimpleNamespace) -> Iterator[Any]:
    with several.engine(made.base, made.constituents, **(LORA | dict(max_loras=2, max_cpu_loras=4))) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any, made: SimpleNamespace) -> Any:
    """The module's engine with all adapters."""
    adapters.load(engine, made.paths, made.bases)
    return engine


def loaded(llm: Any) -> list[set[int]]:
    """The adapters of each constituent, as the worker has them."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return [manager.list_adapters() for manager in worker.model_runner.lora_manager.managers]


def test_management_reaches_the_right_model(llm: Any, made: SimpleNamespace) -> None:
    bard, wizard, rogue = (adapters.requests(made.paths)[name].lora_int_id for name in made.paths)
    llm.llm_engine.remove_lora(rogue)
    assert loaded(llm) == [{bard}, {wizard}, set()]
    assert llm.llm_engine.list_loras() == {bard, wizard}
    assert llm.llm_engine.pin_lora(wizard)
    with pytest.raises(ValueError, match="not registered"):
        llm.llm_engine.pin_lora(rogue)
    adapters.load(llm, made.paths, made.bases)
    assert loaded(llm) == [{bard}, {wizard, rogue}, set()]
    assert llm.llm_engine.remove_lora(wizard)
    assert not llm.llm_engine.remove_lora(wizard)
    assert loaded(llm) == [{bard}, {rogue}, set()]
    # Under the number of an adapter that was another model's.
    llm.llm_engine.add_lora(LoRARequest("bard", bard, made.paths["wizard"], load_inplace=True))
    assert loaded(llm) == [set(), {bard, rogue}, set()]
    llm.llm_engine.add_lora(LoRARequest("bard", bard, made.paths["bard"], load_inplace=True))
    assert loaded(llm) == [{bard}, {rogue}, set()]


def refused(llm: Any, job: Job, paths: dict[str, str]) -> str:
    with pytest.raises(VLLMValidationError) as caught:
        adapters.generate(llm, [job], paths, 2)
    return str(caught.value)


def test_an_adapter_of_another_model(llm: Any, made: SimpleNamespace) -> None:
    assert refused(llm, Job(TEXT, "a", {"a": QWEN | WIZARD}), made.paths) == (
        "marith: term 'a' runs on the constituent 'qwen', and the adapter 'wizard' is for the constituent "
        "'small'"
    )
    said = refused(llm, Job(TEXT, "a", {"a": SMALL | BARD}), made.paths)
    assert said.endswith("runs on the constituent 'small', and the adapter 'bard' is for the base model")
    three = {"a": BARD, "b": WIZARD, "c": ROGUE}
    assert "3 different adapters; this server runs 2 at a time" in refused(
        llm, Job(TEXT, "a + b + c", three), made.paths
    )


@pytest.mark.parametrize(
    ("base", "whose"), [("qwen", "the constituent 'qwen'"), ("served", "the base model")]
)
def test_an_adapter_that_does_not_fit(base: str, whose: str, llm: Any, made: SimpleNamespace) -> None:
    """vLLM alone would serve it, with zeros where the smaller model has no weights."""
    before = loaded(llm)
    with pytest.raises(ValueError, match=f"the adapter 'stray' is not for {whose}, whose .* not 64"):
        llm.llm_engine.add_lora(LoRARequest("stray", 9, made.paths["wizard"], base))
    assert loaded(llm) == before
    assert "there is no adapter 'stray'" in refused(
        llm, Job(TEXT, "a", {"a": {"adapter": "stray"}}), made.paths
    )


def test_a_plain_request_is_seen_as_it_is(llm: Any, made: SimpleNamespace) -> None:
    """What its client cannot have of a formula, it cannot have on a constituent; the error says so."""
    wizard = adapters.requests(made.paths)["wizard"]
    with pytest.raises(VLLMValidationError, match="cannot be combined with --enable-lora"):
        llm.generate(
            [TEXT], SamplingParams(max_tokens=1, prompt_logprobs=1), lora_request=wizard, use_tqdm=False
        )
    params = SamplingParams(max_tokens=2, ignore_eos=True, n=2, seed=3, temperature=1)
    (output,) = llm.generate([TEXT], params, lora_request=wizard, use_tqdm=False)
    assert [len(completion.token_ids) for completion in output.outputs] == [2, 2]
    assert params.extra_args is None


class TestWhoseAnAdapterIs:
    """`AdapterBases`: the request's word, else the adapter's configuration, else the base model."""

    def bases(self, made: SimpleNamespace) -> AdapterBases:
        return AdapterBases(made.base, made.constituents)

    @pytest.mark.parametrize(
        ("configured", "number"),
        [
            ("small", 1),
            ("qwen", 2),
            ("someone/elses", 0),
            (None, 0),
            (7, 0),
            ("@base", 0),
            ("@small", 1),
            ("@qwen/../qwen/", 2),
        ],
    )
    def test_by_its_configuration(
        self, configured: Any, number: int, made: SimpleNamespace, tmp_path: Path
    ) -> None:
        folder = Path(made.base).parent
        if isinstance(configured, str):
            configured = configured.replace("@", f"{folder}/")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": configured}))
        adapter = LoRARequest("a", 1, str(tmp_path))
        bases = self.bases(made)
        assert bases.of(adapter) == number
        assert adapter.base_model_name == (None, "small", "qwen")[number]
        assert number_of(adapter, bases.names) == number
        # Another request of the same name is told without a look at the files.
        (tmp_path / "adapter_config.json").unlink()
        again = LoRARequest("a", 1, str(tmp_path))
        assert bases.of(again) == number
        assert again.base_model_name == adapter.base_model_name
        assert bases.decide(LoRARequest("a", 1, str(tmp_path))) == 0

    def test_the_request_decides(self, made: SimpleNamespace) -> None:
        bases = self.bases(made)
        assert bases.of(LoRARequest("a", 1, made.paths["wizard"], "qwen")) == 2
        assert bases.of(LoRARequest("b", 2, made.paths["wizard"], "what-is-served")) == 0


def test_base_model_name_of_lora_modules(made: SimpleNamespace) -> None:
    """``--lora-modules '{"name": ..., "base_model_name": "small"}'``, which vLLM forgets."""
    naming.install()
    hooks.install()
    config = SimpleNamespace(
        additional_config=several.settings(made.constituents),
        lora_config=None,
        model_config=SimpleNamespace(model=made.base),
    )
    known = Adapters(config)
    told = []

    async def add_lora(adapter: LoRARequest) -> bool:
        known.assign(adapter)
        told.append(adapter.base_model_name)
        return True

    client = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=8), renderer=None, input_processor=None, add_lora=add_lora
    )
    modules = [
        LoRAModulePath("rogue", made.paths["rogue"], base_model_name="small"),
        LoRAModulePath("lost", made.paths["rogue"], base_model_name="nobody"),
        LoRAModulePath("wizard", made.paths["wizard"]),
        LoRAModulePath("bard", made.paths["bard"], base_model_name="served"),
    ]
    models = OpenAIServingModels(client, [BaseModelPath("served", made.base)], lora_modules=modules)
    asyncio.run(models.init_static_loras())
    assert told == ["small", None, "small", "served"]
    parents = [card.parent for card in asyncio.run(models.show_available_models()).data]
    assert parents == [None, "small", "served", "small", "served"]

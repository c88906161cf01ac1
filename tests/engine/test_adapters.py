"""Terms with LoRA adapters: formulas over a model and its adapters equal those over the merged models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import adapters, asynchronous, engines, exactness, reference, runners
from tests.support.adapters import Job
from vllm_marith.models import default_home

LENGTH = 40
NAMES = ("wizard", "bard", "rogue")
LORA = dict(enable_lora=True, max_loras=2, max_lora_rank=8)
WIZARD, BARD, ROGUE = ({"adapter": name} for name in NAMES)
TEXT = "The value of the expression is"
LONG = "This is where the statement begins and where the statement ends " * 4

JOBS = (
    Job(TEXT, "base + 0.7*(wizard - base)", {"wizard": WIZARD}),
    Job(TEXT, "wizard + bard - 0.5*base", {"wizard": WIZARD, "bard": BARD}),
    Job(TEXT),
    Job("So", "a - 0.6*b", {"a": ROGUE | {"system": "You are a child."}, "b": {"system": LONG}}),
    Job("So", own="bard"),
    Job(LONG, "union(rogue, bard) + 0.4*base", {"rogue": ROGUE, "bard": BARD}),
    Job(TEXT, "wizard", {"wizard": WIZARD}),
    # One member: the same adapter and the same prompt under two names.
    Job(TEXT, "2*a - b", {"a": BARD, "b": BARD}),
    # Three: the prompts alone would make it two.
    Job(
        LONG,
        "a + 0.5*b - 0.3*c",
        {"a": ROGUE, "b": WIZARD | {"system": "Be brief."}, "c": {"system": "Be brief."}},
    ),
    # The request's own adapter is what terms without one mean.
    Job(TEXT, "base + 0.4*wizard", {"wizard": WIZARD}, own="rogue"),
    Job(TEXT, "a - 0.5*base", {"a": ROGUE | {"system": "Sing."}}, own="rogue"),
    Job("So", own="wizard"),
)


@pytest.fixture(scope="module")
def paths(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The adapters by name; that of `bard` changes embedding and head as well."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: str(adapters.make(tiny_model, folder / name, seed=seed, head=name == "bard"))
        for seed, name in enumerate(NAMES)
    }


@pytest.fixture(scope="module")
def models(tiny_model: Path, paths: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The base model and the merged ones, by the adapter's name."""
    folder = tmp_path_factory.mktemp("merged")
    merged = {n: str(adapters.merge(tiny_model, Path(p), folder / n)) for n, p in paths.items()}
    return {"base": str(tiny_model), **merged}


@pytest.fixture(scope="module")
def wanted(models: dict[str, str]) -> list[reference.Reference]:
    found = [adapters.expected(models, job, LENGTH) for job in JOBS]
    assert len({tuple(r.tokens) for r in found}) == len(JOBS), "the adapters make no difference"
    return found


def check(
    jobs: Sequence[Job], answers: Sequence[exactness.Answer], wanted: Sequence[reference.Reference]
) -> None:
    for job, answer, right in zip(jobs, answers, wanted, strict=True):
        length = len(answer.tokens)
        assert answer.tokens == right.tokens[:length], job
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        worst = max(abs(a - b) for a, b in zip(found, right.logprobs[:length], strict=True))
        assert worst < exactness.LOGPROB_TOLERANCE, job


@dataclass
class Case:
    options: dict[str, Any] = field(default_factory=dict)
    asynchronous: bool = False
    preempts: bool = False


SMALL_CACHE = dict(num_gpu_blocks_override=24)
SMALL_STEPS = dict(max_num_batched_tokens=24, max_num_seqs=24)
CASES = {
    "prefix_cache": Case(),
    "no_prefix_cache": Case(dict(enable_prefix_caching=False)),
    "small_steps": Case(SMALL_STEPS),
    "small_cache": Case(SMALL_CACHE | dict(max_loras=3), preempts=True),
    "async": Case(asynchronous=True),
    "async_small_cache": Case(
        SMALL_CACHE | SMALL_STEPS | dict(max_loras=3), asynchronous=True, preempts=True
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_equals_the_merged_models(
    name: str,
    tiny_model: Path,
    paths: dict[str, str],
    wanted: list[reference.Reference],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve requests at once, with three adapters for two slots: some wait for others."""
    case = CASES[name]
    if case.asynchronous:
        asynchronous.force(monkeypatch)
    with engines.engine(tiny_model, **(LORA | case.options)) as llm:
        adapters.load(llm, paths)
        figures = engines.scheduler(llm).figures
        for _ in range(2):  # the second time, prompts come from the prefix cache
            check(JOBS, adapters.generate(llm, JOBS, paths, LENGTH), wanted)
        assert not figures.failed
        assert bool(figures.preempted) == case.preempts
        engines.assert_all_returned(llm)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, paths: dict[str, str]) -> Iterator[Any]:
    with engines.engine(tiny_model, **LORA) as llm:
        yield llm


@pytest.fixture
def llm(engine: Any, paths: dict[str, str]) -> Iterator[Any]:
    """The module's engine, which knows all adapters and which each test leaves empty."""
    adapters.load(engine, paths)
    yield engine
    engines.assert_all_returned(engine)


def members_of(llm: Any, job: Job, paths: dict[str, str]) -> int:
    engines.scheduler(llm).take_figures()
    adapters.generate(llm, [job], paths, 2)
    ((members, _),) = engines.scheduler(llm).take_figures()["members"]
    return members


@pytest.mark.parametrize(
    ("job", "members"),
    [
        (Job(TEXT, "a + b", {"a": WIZARD, "b": BARD}), 2),
        (Job(TEXT, "a + b", {"a": WIZARD, "b": WIZARD}), 1),
        (Job(TEXT, "a + base", {"a": WIZARD}), 2),
        (Job(TEXT, "a + base", {"a": WIZARD}, own="wizard"), 1),
        (Job(TEXT, "a + base", {"a": WIZARD}, own="bard"), 2),
        (Job(TEXT, "a + b", {"a": WIZARD | {"system": "Sing."}, "b": WIZARD}), 2),
        (Job(TEXT, "a + b", {"a": WIZARD | {"system": "Sing."}, "b": BARD | {"system": "Sing."}}), 2),
    ],
)
def test_members_differ_in_adapter_or_prompt(job: Job, members: int, llm: Any, paths: dict[str, str]) -> None:
    assert members_of(llm, job, paths) == members


def refused(llm: Any, job: Job, paths: dict[str, str]) -> str:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        adapters.generate(llm, [Job("So"), job], paths, 2)
    return str(caught.value)


def test_names_that_nobody_knows(llm: Any, paths: dict[str, str]) -> None:
    """They come with ``add_lora`` and go with ``remove_lora``."""
    assert refused(llm, Job(TEXT, "a", {"a": {"adapter": "elf"}}), paths) == (
        "marith: term 'a': there is no adapter 'elf'; adapters here: 'bard', 'rogue', 'wizard'"
    )
    job = Job(TEXT, "a + base", {"a": WIZARD})
    wizard = adapters.requests(paths)["wizard"]
    llm.llm_engine.remove_lora(wizard.lora_int_id)
    assert "no adapter 'wizard'; adapters here: 'bard', 'rogue'" in refused(llm, job, paths)
    # A request's own adapter needs nobody's introduction.
    assert members_of(llm, Job(TEXT, "a + base", {"a": WIZARD}, own="wizard"), paths) == 1
    llm.llm_engine.add_lora(wizard)
    assert members_of(llm, job, paths) == 2
    for adapter in adapters.requests(paths).values():
        llm.llm_engine.remove_lora(adapter.lora_int_id)
    assert "no adapter 'wizard'; adapters here: none" in refused(llm, job, paths)


def test_more_adapters_than_slots(llm: Any, paths: dict[str, str]) -> None:
    every = {"a": WIZARD, "b": BARD, "c": ROGUE}
    sentence = "the formula has 3 different adapters; this server runs 2 at a time (--max-loras)"
    assert sentence in refused(llm, Job(TEXT, "a + b + c", every), paths)
    # The request's own counts where a term means it.
    two = {"a": WIZARD, "b": BARD}
    assert sentence in refused(llm, Job(TEXT, "a + b + base", two, own="rogue"), paths)
    assert members_of(llm, Job(TEXT, "a + b", two, own="rogue"), paths) == 2


def test_scores_beside_adapters(llm: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = SamplingParams(prompt_logprobs=1, max_tokens=1, extra_args={"marith": "base"})
    with pytest.raises(VLLMValidationError, match="prompt cannot be combined with --enable-lora"):
        llm.generate([TEXT], params, use_tqdm=False)


def test_a_request_cannot_bring_an_adapter(llm: Any, paths: dict[str, str]) -> None:
    """Neither as a path in a term nor as a group that was never admitted."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    forged = {"prompts": [[1]], "routine": "{}", "adapters": [["wizard", 1, "/etc/passwd"]]}
    for value in (forged, json.dumps({"formula": "a", "terms": {"a": {"adapter": "/etc/passwd"}}})):
        with pytest.raises(VLLMValidationError):
            llm.generate([TEXT], SamplingParams(extra_args={"marith": value}), use_tqdm=False)


def test_on_the_v2_runner(tiny_model: Path, paths: dict[str, str], wanted: list[reference.Reference]) -> None:
    """In Triton's interpreter, and so a few tokens only; the LoRA products are the CPU's on both runners."""
    jobs, length = JOBS[:6], 6
    with (
        runners.start("v2") as runner,
        runner.open(tiny_model, **LORA, max_num_seqs=16, max_model_len=128) as call,
    ):
        call(adapters.load, paths)
        check(jobs, call(adapters.generate, jobs, paths, length), wanted[: len(jobs)])
        call(engines.assert_all_returned)


def test_the_embedded_adapter(tmp_path: Path) -> None:
    """`lora_legal` on `big`, a model that was trained, where `marith models` has made them."""
    big, legal = (default_home() / name for name in ("big", "lora_legal"))
    if not (big / "model.safetensors").exists() or not (legal / "adapter_config.json").exists():
        pytest.skip("needs the embedded models: marith models")
    merged = {"base": str(big), "legal": str(adapters.merge(big, legal, tmp_path / "merged"))}
    terms = {"legal": {"adapter": "legal"}}
    jobs = [
        Job("The parties agree that", "base + 0.6*(legal - base)", terms),
        Job("The parties agree that", "1.5*legal - 0.5*base", terms),
        Job("A function that returns", "base", own="legal"),
        Job("A function that returns"),
    ]
    right = [adapters.expected(merged, job, LENGTH) for job in jobs]
    assert len({tuple(r.tokens) for r in right}) > 2
    with engines.engine(big, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
        adapters.load(llm, {"legal": str(legal)})
        check(jobs, adapters.generate(llm, jobs, {"legal": str(legal)}, LENGTH), right)
        engines.assert_all_returned(llm)

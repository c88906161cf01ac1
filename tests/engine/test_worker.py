"""What the V2 model runner's hooks do with a step's rows, without an engine."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_marith.engine.group import EVIDENCE as EVIDENCE_METHOD
from vllm_marith.engine.group import FIGURES, KEY, GroupSpec, member_tags
from vllm_marith.engine.worker import extension, runner_v2
from vllm_marith.engine.worker.evidence import EVIDENCE
from vllm_marith.engine.worker.runner_v2 import FormulaState, StepGroups, TyingSampler
from vllm_marith.plan import Plan, Stage, encode

VOCAB = 7
CPU = torch.device("cpu")
LINEAR = [("push", 0, 2.0), ("add", 1, -1.0)]
CONFIG: Any = SimpleNamespace(additional_config={}, speculative_config=None)


def tagged(
    group: str, instructions: list[Any] = LINEAR, size: int = 2, explain: str = ""
) -> list[dict[str, Any]]:
    """extra_args of a group's members."""
    plan = Plan(("a", "b")[:size], (Stage("fuse", tuple(instructions), depth=1),), (), (), (1.0, 1.0))
    spec = GroupSpec([[1]] * (size - 1), encode(plan, range(size)), explain=explain)
    return [{KEY: tag.to_wire()} for tag in member_tags(group, spec, prompt_length=1)]


def unread(request_ids: Any) -> Any:
    raise AssertionError("a formula without classifiers asked for the answer so far")


def batch_of(request_ids: list[str], lengths: list[int], prompts: list[int]) -> Any:
    padded = torch.tensor([*lengths, 0, 0], dtype=torch.int32)  # rows of a CUDA graph that are not used
    return SimpleNamespace(
        req_ids=request_ids,
        num_reqs=len(request_ids),
        seq_lens_cpu_upper_bound=padded,
        prefill_len_np=np.array(prompts, np.int32),
        cu_num_logits_np=np.arange(len(request_ids) + 1, dtype=np.int32),
    )


def logits_of(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def groups() -> StepGroups:
    found = StepGroups(CPU)
    leader, follower = tagged("g")
    found.add_request("plain", None)
    found.add_request("other", {"unrelated": 1})
    found.add_request("g", leader)
    found.add_request("g-1", follower)
    return found


def fuse(groups: StepGroups, logits: torch.Tensor) -> torch.Tensor:
    """The step's fused logits, for a head that gives `logits`."""
    fused = groups.compute_logits(lambda hidden: hidden, logits)
    assert fused is not None
    return fused


READY = batch_of(["g-1", "plain", "g"], [9, 5, 4], [9, 5, 4])


def test_a_step_is_fused_once_and_tied_once(groups: StepGroups) -> None:
    logits = logits_of(3)
    groups.begin_step(READY, unread)
    fused = fuse(groups, logits.clone())
    assert torch.equal(fused[:2], logits[:2])
    assert torch.allclose(fused[2], 2 * logits[2] - logits[0])
    assert torch.equal(fuse(groups, logits), logits)  # prompt log-probabilities, later in the step

    sampled = torch.tensor([[3], [4], [5]])
    groups.tie(sampled)
    assert sampled.tolist() == [[5], [4], [5]]
    sampled = torch.tensor([[3], [4], [5]])
    groups.tie(sampled)
    assert sampled.tolist() == [[3], [4], [5]]


def test_rows_are_found_in_whatever_order(groups: StepGroups) -> None:
    logits = logits_of(3)
    for order in (["g", "g-1", "plain"], ["plain", "g", "g-1"]):
        groups.begin_step(batch_of(order, [9] * 3, [4] * 3), unread)
        fused = fuse(groups, logits.clone())
        leader, follower = order.index("g"), order.index("g-1")
        assert torch.allclose(fused[leader], 2 * logits[leader] - logits[follower])


@pytest.mark.parametrize("combine_hidden_states", [False, True])
def test_what_the_members_said_is_kept_for_who_asked(combine_hidden_states: bool) -> None:
    """Also where the fusion comes before the head, where other groups' members have no logits."""
    groups = StepGroups(CPU, combine_hidden_states)
    for name, explain in (("g", "key"), ("h", "")):
        for suffix, args in zip(("", "-1"), tagged(name, explain=explain), strict=True):
            groups.add_request(name + suffix, args)
    order = ["h-1", "g-1", "h", "g"]
    for step in range(2):
        logits = logits_of(4) + step
        groups.begin_step(batch_of(order, [9 + step] * 4, [9] * 4), unread)
        fused = fuse(groups, logits.clone())
        chosen = int(fused[3].argmin())
        groups.tie(torch.tensor([[0], [1], [2], [chosen]]))
    assert EVIDENCE.fetch("", 0, last=True) == []
    first, second = EVIDENCE.fetch("key", 0, last=True)
    assert first[0] == second[0]  # a constant for all tokens means nothing
    assert torch.allclose(torch.tensor(first[1]), torch.tensor(second[1]), atol=1e-5)
    ids, logprobs = first
    assert ids == [chosen, int(fused[3].argmax())]
    rows = [logits[3], logits[1], 2 * logits[3] - logits[1]]
    expected = torch.stack([row.log_softmax(-1) for row in rows])[:, ids].T
    assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-5)


def test_plain_rows_keep_their_values_in_half_precision(groups: StepGroups) -> None:
    logits = logits_of(3, torch.bfloat16)
    groups.begin_step(READY, unread)
    fused = fuse(groups, logits)
    assert fused.dtype == torch.float32
    assert torch.equal(fused[:2], logits[:2].float())
    assert torch.allclose(fused[2], 2 * logits[2].float() - logits[0].float())


def test_a_padded_vocabulary(groups: StepGroups) -> None:
    logits = torch.cat([logits_of(3), torch.zeros(3, 5)], dim=1)[:, :VOCAB]
    groups.begin_step(READY, unread)
    assert torch.allclose(fuse(groups, logits)[2], 2 * logits_of(3)[2] - logits_of(3)[0])


@pytest.mark.parametrize("lengths", [[8, 5, 4], [9, 5, 3], [8, 5, 3]])
def test_held_members_and_chunks_are_left_alone(groups: StepGroups, lengths: list[int]) -> None:
    groups.begin_step(batch_of(READY.req_ids, lengths, [9, 5, 4]), unread)
    assert torch.equal(fuse(groups, logits_of(3)), logits_of(3))
    sampled = torch.tensor([[3], [4], [5]])
    groups.tie(sampled)
    assert sampled.tolist() == [[3], [4], [5]]


def test_dummy_batches_have_no_members(groups: StepGroups) -> None:
    groups.begin_step(batch_of(["req_0", "req_1"], [1, 1], [1, 1]), unread)
    groups.tie(torch.zeros(2, 1, dtype=torch.int64))  # sampled without logits: nothing to complain about
    assert torch.equal(fuse(groups, logits_of(5)), logits_of(5))


def test_a_group_without_all_of_its_members_is_left_alone(groups: StepGroups) -> None:
    groups.remove_request("g-1")
    groups.begin_step(READY, unread)
    assert torch.equal(fuse(groups, logits_of(3)), logits_of(3))
    groups.remove_request("g")
    groups.remove_request("plain")
    assert not groups.members


def test_an_id_may_come_back_with_another_formula(groups: StepGroups) -> None:
    groups.begin_step(READY, unread)
    fuse(groups, logits_of(3))
    for request_id, args in zip(("g", "g-1"), tagged("g", [("push", 1, 1.0)]), strict=True):
        groups.remove_request(request_id)
        groups.add_request(request_id, args)
    groups.begin_step(READY, unread)
    assert torch.allclose(fuse(groups, logits_of(3))[2], logits_of(3)[0])


def test_logits_that_did_not_pass_through_us_are_noticed(groups: StepGroups) -> None:
    groups.begin_step(READY, unread)
    with pytest.raises(RuntimeError, match="did not give"):
        groups.tie(torch.zeros(3, 1, dtype=torch.int64))
    groups.begin_step(READY, unread)
    with pytest.raises(RuntimeError, match="draft, 3, found 6"):
        fuse(groups, logits_of(6))
    groups.begin_step(READY, unread)
    assert fuse(groups, logits_of(3)) is not None  # the next step is a step like any other


# ------------------------------------------------------------------------------------------ the model state


class Plain:
    """What of vLLM's model state matters here."""

    sampler_pair: tuple[Any, Any] | None = None

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.calls.append(("add", req_index))

    def remove_request(self, req_id: str) -> None:
        self.calls.append(("remove", req_id))

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        self.calls.append(("prepare", req_states))
        return {"positions": 1}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        return self.sampler_pair


def sampler(logits: torch.Tensor, batch: Any) -> Any:
    ones = torch.ones(len(logits), dtype=torch.int32)
    tokens = logits.argmax(-1, keepdim=True)
    return SimpleNamespace(sampled_token_ids=tokens, num_sampled=ones, num_rejected=ones - 1)


sampler.penalties_state = "vLLM's"  # type: ignore[attr-defined]


def test_a_step_through_the_model_state() -> None:
    model = SimpleNamespace(compute_logits=lambda hidden: hidden.clone())
    state: Any = runner_v2._over(Plain)(CONFIG, model, None, CPU)
    assert isinstance(state, FormulaState)
    assert isinstance(state, Plain)
    for i, args in enumerate(tagged("g")):
        request_id = f"g-{i}" if i else "g"
        params = SimpleNamespace(extra_args=args)
        state.add_request(i, SimpleNamespace(req_id=request_id, sampling_params=params))
    state.add_request(2, SimpleNamespace(req_id="pooled", sampling_params=None))
    tied, rejection_sampler = state.custom_sampler(sampler)
    assert rejection_sampler is None
    assert tied.penalties_state == "vLLM's"

    logits = logits_of(2)
    assert state.prepare_inputs(batch_of(["g-1", "g"], [9, 4], [9, 4]), "states") == {"positions": 1}
    output = tied(model.compute_logits(logits), None)
    token = int((2 * logits[1] - logits[0]).argmax())
    assert token != int(logits[0].argmax())
    assert output.sampled_token_ids.tolist() == [[token], [token]]
    state.remove_request("g")
    state.remove_request("g-1")
    assert not state.groups.members
    assert state.calls[:4] == [("add", 0), ("add", 1), ("add", 2), ("prepare", "states")]
    assert state.calls[4:] == [("remove", "g"), ("remove", "g-1")]


def test_a_models_own_samplers_are_kept() -> None:
    state: Any = runner_v2._over(Plain)(CONFIG, SimpleNamespace(compute_logits=None), None, CPU)
    state.sampler_pair = (sampler, "rejection")
    tied, rejection_sampler = state.custom_sampler("vLLM's")
    assert isinstance(tied, TyingSampler)
    assert tied(logits_of(1), None).sampled_token_ids.shape == (1, 1)
    assert rejection_sampler == "rejection"


@pytest.mark.parametrize("named", [None, [], ["other:Processor"]])
def test_an_engine_that_does_not_name_us_gets_vllms_state(named: list[str] | None) -> None:
    from vllm_marith.engine.processor import FormulaLogitsProcessor

    resolve = runner_v2._with_formulas(lambda vllm_config, model: Plain)

    def config(processors: Any) -> Any:
        return SimpleNamespace(model_config=SimpleNamespace(logits_processors=processors))

    assert resolve(config(named), None) is Plain
    for ours in ("vllm_marith.engine.processor:FormulaLogitsProcessor", FormulaLogitsProcessor):
        assert resolve(config([*(named or []), ours]), None) is runner_v2._over(Plain)


# ---------------------------------------------------------------------------------- how it gets into a worker


def look_up(name: str) -> Any:
    """As vLLM does with a class name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_worker_extension_installs_the_hooks_and_gives_the_operators_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = []
    monkeypatch.setattr(runner_v2, "install", lambda: installed.append(True))
    ours = extension.name_over("")
    over = extension.name_over("collections.abc.Mapping")
    assert extension.name_over(ours) == ours
    assert extension.name_over(over) == over
    assert not installed
    assert look_up(ours) is extension.FormulaWorker
    assert installed == [True]
    assert look_up(over) is look_up(over)
    assert look_up(over).__mro__[1] is look_up("collections.abc.Mapping")
    for method in (FIGURES, EVIDENCE_METHOD):
        assert getattr(look_up(over), method) is getattr(look_up(ours), method)
    assert installed
    assert all(installed)
    with pytest.raises(AttributeError, match="Formulas"):
        look_up(ours.replace(extension._PREFIX, "Formulas"))


def test_the_registered_class_serves_both_runners(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_marith.engine.processor import (
        FormulaLogitsProcessor,
        V1LogitsProcessor,
        V2LogitsProcessor,
    )
    from vllm_marith.engine.worker import runner_v1

    assert issubclass(FormulaLogitsProcessor, V1LogitsProcessor)
    assert issubclass(FormulaLogitsProcessor, V2LogitsProcessor)
    config: Any = SimpleNamespace(
        additional_config={KEY: {"warmup": False}},
        model_config=SimpleNamespace(dtype=torch.float32),
        lora_config=None,
    )
    states: Any = SimpleNamespace(device=CPU)
    monkeypatch.setattr(runner_v1, "install", lambda *, constituents: None)
    monkeypatch.setattr(runner_v2, "installed", lambda: True)
    for processor in (
        FormulaLogitsProcessor(config, CPU, False),
        FormulaLogitsProcessor(config, states),
    ):
        logits = logits_of(2)
        assert processor.apply(logits) is logits
        assert processor.apply(logits, None) is logits
        assert not processor.add_request(0, None)  # type: ignore[arg-type]
    # A worker that has not our hooks would serve the leader's distribution for the formula's.
    monkeypatch.setattr(runner_v2, "installed", lambda: False)
    with pytest.raises(RuntimeError, match="worker_extension_cls"):
        FormulaLogitsProcessor(config, states)


@pytest.mark.parametrize(
    ("section", "option", "value", "sentence"),
    [
        ("parallel_config", "enable_batch_sharded_sampling", True, "--enable-batch-sharded-sampling"),
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
        ("", "watermark_config", object(), "--watermark-config"),
        ("", "speculative_config", SimpleNamespace(method="eagle"), "--speculative-config.*'eagle'"),
    ],
)
def test_options_that_would_tear_groups_apart_are_refused(
    section: str, option: str, value: Any, sentence: str
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_marith.engine.plugin import UnsupportedError, check_options

    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_hybrid=False,
            is_attention_free=False,
            is_diffusion=False,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            enable_batch_sharded_sampling=None,
        ),
        scheduler_config=SimpleNamespace(get_scheduler_cls=lambda: Scheduler),
        speculative_config=None,
        watermark_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        use_v2_model_runner=False,
    )
    check_options(config)
    setattr(getattr(config, section) if section else config, option, value)
    with pytest.raises(UnsupportedError, match=sentence):
        check_options(config)


@pytest.mark.parametrize(
    ("settings", "asked", "sentence"),
    [
        ({}, "async_scheduling", "--no-async-scheduling"),
        ({"speculative": 2}, "async_scheduling", "--no-async-scheduling"),
        ({}, "return_sampling_mask", "sampling masks"),
        ({"speculative": 2}, "return_sampling_mask", "sampling masks"),
        ({"speculative": 2}, "enable_trace_replay", "trace replay"),
    ],
)
def test_what_drafts_on_v2_are_not_combined_with(settings: dict[str, Any], asked: str, sentence: str) -> None:
    from vllm_marith.engine.speculation import refusals

    def refused(options: dict[str, bool]) -> list[str]:
        config = SimpleNamespace(
            additional_config={"marith": settings},
            use_v2_model_runner=True,
            speculative_config=SimpleNamespace(method="ngram"),
            scheduler_config=SimpleNamespace(async_scheduling=options["async_scheduling"]),
            model_config=SimpleNamespace(**options),
        )
        return [sentence for is_refused, sentence in refusals(config) if is_refused]

    nothing = dict.fromkeys(("async_scheduling", "return_sampling_mask", "enable_trace_replay"), False)
    assert not refused(nothing)
    (found,) = refused(nothing | {asked: True})
    assert sentence in found

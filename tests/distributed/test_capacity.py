"""`marith plan`: its arithmetic against sums by hand and against vLLM's engine."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support import engines
from vllm_marith import cli
from vllm_marith.distributed.capacity import (
    DEVICES,
    GB,
    Assumptions,
    Device,
    Load,
    Model,
    StepTime,
    engine,
    groups_that_fit,
    plans,
    pool_blocks,
    suggested,
)
from vllm_marith.distributed.errors import DeploymentError
from vllm_marith.distributed.model_facts import model_facts

BIG = Model("big", token_bytes=131072, weight_bytes=16 * GB, parameters=8 * GB, kv_heads=8)
SMALL = Model("small", token_bytes=32768, weight_bytes=2 * GB, parameters=1 * GB, kv_heads=8)
GPU = Device("gpu", 80 * GB, 2000 * GB, 400e12)
GIVEN = Assumptions(efficiency=0.5, memory_share=0.9, activations=4 * GB, overhead=0.001)


def test_an_engine_by_hand() -> None:
    """Llama-8B-like, three members, every figure computed on its own."""
    found = engine([BIG] * 3, GPU, 1, Load(1, 512, 256), GIVEN)
    room = 72 * GB - 4 * GB - 16 * GB
    blocks = room // (16 * 131072)
    assert found.kv_groups == (blocks - 1) // (3 * 48)  # 768 tokens are 48 blocks
    assert found.row_groups == 85
    assert found.groups == 85
    cache = 85 * 3 * 131072 * (512 + 128)
    read = (16 * GB + cache) / (1000 * GB)
    reckon = 85 * 3 * 2 * 8 * GB / 200e12
    assert found.step == pytest.approx(0.001 + max(read, reckon))
    assert found.prompts == pytest.approx(512 * 3 * 2 * 8 * GB / 200e12)
    # In one round of `answer` steps, 85 requests come and go, and each brings its prompts.
    assert 85 / found.qps == pytest.approx(256 * found.step + 85 * found.prompts)
    assert found.tokens == pytest.approx(256 * found.qps)


def test_a_member_on_a_small_model_costs_a_small_model() -> None:
    """Four of its tokens are as large as one of the base's, and its blocks hold four times as many."""
    load = Load(1, 512, 256)
    given = replace(GIVEN, max_num_seqs=10**6)
    room = 72 * GB - 4 * GB - 18 * GB
    found = engine([BIG, SMALL, SMALL], GPU, 1, load, given)
    assert found.kv_groups == (room // (16 * 131072) - 1) // (48 + 12 + 12)
    assert found.qps > engine([BIG] * 3, GPU, 1, load, given).qps


def test_laws() -> None:
    """More of anything good never carries less; ranks share weights and cache."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        load = Load(1, rng.randint(1, 4000), rng.randint(1, 2000))
        members = [rng.choice([BIG, SMALL]) for _ in range(rng.randint(1, 6))]
        given = replace(GIVEN, efficiency=rng.uniform(0.1, 0.5), max_num_seqs=rng.randint(8, 512))
        one = engine(members, GPU, 1, load, given)
        assert one.groups == min(one.kv_groups, one.row_groups)
        for better in (
            engine(members, GPU, 1, load, replace(given, efficiency=given.efficiency * 1.5)),
            engine(members, replace(GPU, bandwidth=2 * GPU.bandwidth), 1, load, given),
            engine(members, replace(GPU, arithmetic=2 * GPU.arithmetic), 1, load, given),
            engine(members, GPU, 2, load, given),
        ):
            assert better.qps >= one.qps * (1 - 1e-12)
        assert engine(members, GPU, 2, load, given).kv_groups >= 2 * one.kv_groups
        assert engine([*members, BIG], GPU, 1, load, given).kv_groups <= one.kv_groups


def test_the_suggestion_is_the_smallest_that_carries_the_load() -> None:
    load = Load(1, 512, 256)
    found = plans([BIG] * 3, GPU, 8, load, GIVEN)
    assert [(plan.replicas, plan.engine.ranks) for plan in found] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert all(plan.low < plan.qps < plan.high for plan in found)
    assert suggested(found, load) is found[0]
    most = max(found, key=lambda plan: plan.qps)
    assert suggested(found, replace(load, qps=10**6)) is most
    between = replace(load, qps=(found[0].low + found[0].qps) / 2)
    assert suggested(found, between).qps >= between.qps


def test_what_does_not_fit() -> None:
    huge = replace(BIG, weight_bytes=140 * GB)
    assert [plan.engine.ranks for plan in plans([huge], GPU, 8, Load(1, 512, 256), GIVEN)] == [4, 8]
    with pytest.raises(DeploymentError, match=r"140\.0 GB of weights .* do not fit 2 x gpu"):
        plans([huge], GPU, 2, Load(1, 512, 256), GIVEN)
    odd = replace(BIG, kv_heads=3, token_bytes=3 * 1024)
    assert [plan.engine.ranks for plan in plans([odd], GPU, 4, Load(1, 512, 256), GIVEN)] == [1]
    few = replace(BIG, kv_heads=2)  # beyond two ranks, heads are copied, and the cache of a rank stays
    assert few.token_bytes_of_rank(4) == few.token_bytes_of_rank(2) == few.token_bytes // 2


def test_a_line_through_measured_steps() -> None:
    line = StepTime(0.003, 0.0002)
    rows = [1, 3, 24, 96]
    found = StepTime.fitted(rows, [line(r) for r in rows])
    assert (found.fixed, found.row) == pytest.approx((0.003, 0.0002))
    assert found.tokens_a_second(8, 3) == pytest.approx(8 / line(24))
    # Steps that are all 10% too slow make a line that is.
    slow = StepTime.fitted(rows, [1.1 * line(r) for r in rows])
    assert slow(50) == pytest.approx(1.1 * line(50))
    with pytest.raises(ValueError, match="two different"):
        StepTime.fitted([3, 3], [1.0, 1.1])


def test_the_cache_is_what_vllm_makes_of_it(tiny_model: Path) -> None:
    """Bytes of a token, blocks of the pool, and what vLLM itself says would fit."""
    facts = model_facts(str(tiny_model), "float32")
    room = 8 << 20
    with engines.engine(tiny_model, kv_cache_memory_bytes=room, formulas=False) as llm:
        config = llm.llm_engine.vllm_config
        pool = engines.scheduler(llm).kv_cache_manager.block_pool
    size = config.cache_config.block_size
    assert pool_blocks(room, facts.token_bytes, size) == pool.num_gpu_blocks
    with safe_open(tiny_model / "model.safetensors", "np") as weights:
        assert facts.weight_bytes == sum(weights.get_tensor(name).nbytes for name in weights.keys())  # noqa: SIM118
    assert groups_that_fit(pool.num_gpu_blocks, 500, [size]) == (pool.num_gpu_blocks - 1) // 16


def marith(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["marith", "plan", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_names_all_that_it_assumes(monkeypatch, capsys, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "steer.yaml").write_text("terms: {loud: {system: Shout.}}\nformula: base - 0.5*loud\n")
    options = ["--model", str(tiny_model), "--gpus", "2", "--qps", "3", "--presets", str(tmp_path)]
    assert marith(monkeypatch, *options, "--preset", "steer", "--efficiency", "0.37") == 0
    shown = capsys.readouterr().out
    for said in (
        "base - 0.5*loud: 2 members",
        "from its datasheet",
        "efficiency 0.37",
        "H100: 80 GB, 3350 GB/s",
    ):
        assert said in shown
    own = ["--memory", "16", "--bandwidth", "320", "--tflops", "65"]
    assert marith(monkeypatch, *options, "--preset", "base + base", *own) == 0
    assert "own: 16 GB, 320 GB/s, 65 TFLOPS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "H3"], "no datasheet of 'H3' here (L4, "),
        (["--memory", "3"], "needs --memory, --bandwidth and --tflops"),
        (["--preset", "base + 2*s", "--constituent", "s"], "--constituent is NAME=MODEL"),
        (
            ["--preset", '{"formula": "base + s", "terms": {"s": {"model": "s"}}}'],
            "name it with --constituent",
        ),
        (["--preset", "base + *"], "expected a term"),
        (["--model", "/nowhere"], "the model '/nowhere' cannot be read: "),
    ],
)
def test_a_mistake_is_a_sentence(
    monkeypatch, capsys, tiny_model: Path, options: list[str], said: str
) -> None:
    whole = ["--model", str(tiny_model), "--gpus", "1", "--qps", "1", *options]
    assert marith(monkeypatch, *whole) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_datasheets_are_plausible() -> None:
    """A slip of a power of ten would show."""
    for device in DEVICES.values():
        assert 10 * GB < device.memory < 300 * GB
        assert 5 < device.memory / device.bandwidth * 1000 < 100  # ms to read all of it
        assert 100 < device.arithmetic / device.bandwidth < 500  # operations a byte

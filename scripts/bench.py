"""What formulas cost, measured on this machine in one run.

    python scripts/bench.py [--model DIR] [--repeats N] [--output FILE]

Three tables, then one JSON line:

1. *Throughput*: N concurrent formulas of three terms, against plain vLLM with as many requests as
   the groups have members (the same rows, so the lower bound of the cost), in the same engine and
   alternating, and against a straightforward Hugging Face loop (one formula after the other).
2. *Hook cost*: microseconds that this package adds to one engine step, by part, at 1, 32 and 128
   groups of three, and their share of the step.
3. *Fusion*: see scripts/bench_kernels.py, which measures the kernels alone.

Ratios are taken pair by pair between neighbouring repetitions: machines drift, ratios do not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

TERMS = 3
FORMULA = "child - 0.6*adult + 2*union(child, magic)"
SYSTEMS = {
    "child": "You are a child.",
    "adult": "You are an adult, and you answer in long sentences.",
    "magic": "Always talk about magic and nothing else.",
}
CONCURRENT = (1, 8, 32)
STEP_GROUPS = (1, 32, 128)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; default: the embedded `big` model")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=5, help="alternating repetitions of each pair")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()

    from vllm_marith.engine.offline import offline_llm

    model = arguments.model or embedded_model()
    rows = max(STEP_GROUPS) * TERMS
    llm = offline_llm(
        str(model),
        max_num_seqs=rows,
        max_model_len=256,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    bench = Bench(llm, arguments.tokens, arguments.repeats)
    throughput = [bench.throughput(n) for n in CONCURRENT]
    loop = huggingface_tokens_per_second(model, arguments.tokens)
    for row in throughput:
        row["over_huggingface_loop"] = round(row["formula_tokens_per_s"] / loop, 2)
    print_table(
        f"throughput ({arguments.tokens} tokens each, Hugging Face loop: {loop:.0f} tokens/s)", throughput
    )
    steps = [bench.step_cost(n) for n in STEP_GROUPS]
    print_table("hook cost of one step (microseconds, groups of three)", steps)

    result = {
        "benchmark": "formulas",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "model": model.name,
        "huggingface_loop_tokens_per_s": round(loop, 1),
        "throughput": throughput,
        "step": steps,
    }
    line = json.dumps(result)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n")
    print(line)


def embedded_model() -> Path:
    from vllm_marith.models import ensure

    return ensure(only=["big"]).big


class Bench:
    """Measurements in one in-process engine."""

    def __init__(self, llm: Any, tokens: int, repeats: int) -> None:
        from vllm_marith import Formula

        self.llm, self.tokens, self.repeats = llm, tokens, repeats
        terms = {name: {"system": text} for name, text in SYSTEMS.items()}
        self.formula = Formula.parse(FORMULA, terms)
        assert len(self.formula.terms) == TERMS

    def formulas(self, n: int) -> tuple[list[str], list[Any]]:
        params = self.formula.sampling_params(**self.sampling())
        return [f"go on, {i}" for i in range(n)], [params] * n

    def plain(self, n: int) -> tuple[list[str], list[Any]]:
        """The requests that the members of n groups would be on their own."""
        from vllm import SamplingParams

        texts = [f"{system}\ngo on, {i}" for i in range(n) for system in SYSTEMS.values()]
        return texts, [SamplingParams(**self.sampling())] * len(texts)

    def sampling(self) -> dict[str, Any]:
        return dict(temperature=0, max_tokens=self.tokens, ignore_eos=True)

    def seconds(self, work: tuple[list[str], list[Any]]) -> float:
        texts, params = work
        start = time.perf_counter()
        self.llm.generate(texts, params, use_tqdm=False)
        return time.perf_counter() - start

    def throughput(self, n: int) -> dict[str, Any]:
        formulas, plain = self.formulas(n), self.plain(n)
        self.seconds(formulas), self.seconds(plain)  # warm
        pairs = [(self.seconds(formulas), self.seconds(plain)) for _ in range(self.repeats)]
        ratios = sorted(b / a for a, b in pairs)
        return {
            "concurrent": n,
            "formula_tokens_per_s": round(n * self.tokens / statistics.median(a for a, _ in pairs), 1),
            "plain_same_rows_tokens_per_s": round(
                n * self.tokens / statistics.median(b for _, b in pairs), 1
            ),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(ratios[0], 3),
            "ratio_max": round(ratios[-1], 3),
        }

    def step_cost(self, n: int) -> dict[str, Any]:
        with timed(self.llm.llm_engine.engine_core.engine_core) as spent:
            self.seconds(self.formulas(n))
        steps = spent.calls["step"]
        each = {name: seconds / steps * 1e6 for name, seconds in spent.seconds.items()}
        ours = {
            "schedule": each["schedule"] - each["vllm_schedule"],
            "update": each["update"] - each["vllm_update"],
            "plan": each["plan"],
            "fuse": each["fuse"],
            "tie": each["tie"],
        }
        total = sum(ours.values())
        return {
            "groups": n,
            **{name: round(us, 1) for name, us in ours.items()},
            "total": round(total, 1),
            "step": round(each["step"]),
            "share": round(total / each["step"], 4),
        }


class Spent:
    """Seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)

    def clock(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1

        return clocked


@contextmanager
def timed(core: Any) -> Iterator[Spent]:
    """Clocks around our functions and the vLLM functions inside them, for the duration.

    core: the engine's ``EngineCore``, which keeps its step as a bound method.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_marith.engine.core.scheduler import GroupScheduler
    from vllm_marith.engine.worker.rows import RowPlan, RowPlans

    spent = Spent()
    places = [
        (core, "step_fn", "step"),
        (GroupScheduler, "schedule", "schedule"),
        (Scheduler, "schedule", "vllm_schedule"),
        (GroupScheduler, "update_from_output", "update"),
        (Scheduler, "update_from_output", "vllm_update"),
        (RowPlans, "plan_step", "plan"),
        (RowPlan, "fuse", "fuse"),
        (RowPlan, "tie", "tie"),
    ]
    own = [(owner, attribute, owner.__dict__.get(attribute)) for owner, attribute, _ in places]
    for owner, attribute, name in places:
        setattr(owner, attribute, spent.clock(name, getattr(owner, attribute)))
    try:
        yield spent
    finally:
        for owner, attribute, original in own:
            if original is None:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)


def huggingface_tokens_per_second(model: Path, tokens: int) -> float:
    """One formula at a time: a forward and a key-value cache per term, then the formula in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(f"{text}\ngo on, 0", return_tensors="pt").input_ids for text in SYSTEMS.values()]

    @torch.inference_mode()
    def run() -> float:
        caches: list[Any] = [None] * TERMS
        inputs = prompts
        start = time.perf_counter()
        for _ in range(tokens):
            rows = []
            for i, ids in enumerate(inputs):
                output = network(ids, past_key_values=caches[i], use_cache=True)
                caches[i] = output.past_key_values
                rows.append(output.logits[0, -1].log_softmax(-1))
            child, adult, magic = rows
            energy = (child - 0.6 * adult + 2 * torch.maximum(child, magic)) / 2.4
            inputs = [energy.argmax().view(1, 1)] * TERMS
        return tokens / (time.perf_counter() - start)

    run()
    return statistics.median(run() for _ in range(3))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()), flush=True)
    print()


if __name__ == "__main__":
    main()

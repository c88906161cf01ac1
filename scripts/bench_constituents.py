"""Several base models in one engine against an engine for each, measured on this machine in one run.

    python scripts/bench_constituents.py [--tokens N] [--repeats N] [--output FILE]

DExperts, `base + expert - anti`, over the embedded models: N concurrent formulas in one engine of three
models, against what three plain vLLM engines take, one after the other, for N such prompts each.
Those cost as much as somebody would pay who asked three servers for every token, if asking cost nothing.

Below 1, one engine is faster than the three together.  The engines live in one process and take turns;
ratios are taken repetition by repetition: machines drift, ratios do not.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

MODELS = ("big", "expert", "anti")
CONCURRENT = (1, 4, 16)
PROMPT = "The licensee shall not"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=5, help="alternating repetitions")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()

    from vllm_marith import Formula
    from vllm_marith.engine.offline import offline_llm, sampling_params
    from vllm_marith.models import ensure

    made = ensure(only=list(MODELS))
    paths = {name: str(getattr(made, name)) for name in MODELS}
    options: dict[str, Any] = dict(
        max_num_seqs=max(CONCURRENT) * len(MODELS), max_model_len=256, kv_cache_memory_bytes=128 << 20
    )
    constituents = {name: paths[name] for name in MODELS[1:]}
    several = offline_llm(
        paths["big"], additional_config={"marith": {"constituents": constituents}}, **options
    )
    plain = [offline_llm(path, logits_processors=[], **options) for path in paths.values()]
    formula = Formula.parse("base + e - a", {"e": {"model": "expert"}, "a": {"model": "anti"}})
    asked = dict(max_tokens=arguments.tokens, temperature=0, ignore_eos=True, detokenize=False)

    def seconds(llm: Any, concurrent: int, formula: Formula | None) -> float:
        # Prompts of their own: a prefix cache that is warm for one side would be no comparison.
        prompts = [f"{time.perf_counter_ns()} {i} {PROMPT}" for i in range(concurrent)]
        start = time.perf_counter()
        llm.generate(prompts, sampling_params(formula, **asked), use_tqdm=False)
        return time.perf_counter() - start

    cases = []
    for concurrent in CONCURRENT:
        rounds = [
            (seconds(several, concurrent, formula), [seconds(llm, concurrent, None) for llm in plain])
            for _ in range(arguments.repeats + 1)
        ][1:]  # the first warms up
        tokens = concurrent * arguments.tokens
        cases.append(
            {
                "concurrent": concurrent,
                "one_engine_tokens_per_second": tokens / statistics.median(one for one, _ in rounds),
                "three_engines_tokens_per_second": tokens
                / statistics.median(sum(each) for _, each in rounds),
                "ratio": statistics.median(one / sum(each) for one, each in rounds),
                "lowest": min(one / sum(each) for one, each in rounds),
                "highest": max(one / sum(each) for one, each in rounds),
                "ratio_to_big_alone": statistics.median(one / each[0] for one, each in rounds),
            }
        )
    print("concurrent  one engine  three engines  ratio  to big alone")
    for case in cases:
        print(
            f"{case['concurrent']:10}  {case['one_engine_tokens_per_second']:8.1f}/s"
            f"  {case['three_engines_tokens_per_second']:11.1f}/s  {case['ratio']:5.2f}"
            f"  {case['ratio_to_big_alone']:12.2f}"
        )
    result = {
        "benchmark": "constituents",
        "machine": platform.processor() or platform.machine(),
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "cases": cases,
    }
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

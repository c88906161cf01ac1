"""How well a plan's step time predicts: measured on this machine with the embedded model.

    python scripts/check_plan.py [--model DIR] [--tokens 64] [--repeats 5]

A few steps are measured, a line is put through them (fixed time + time a row), and what the line says of the
tokens a second of other numbers of groups and members is compared with what is then measured.  The KV cache
is compared as well: how many blocks the plan makes of a pool, and how many vLLM does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

CALIBRATE = ((1, 2), (4, 4), (16, 3))
"""(groups, members) of the steps that the line goes through: 2, 16 and 48 rows."""
PREDICT = ((1, 3), (2, 4), (4, 2), (8, 3), (12, 2), (8, 6), (24, 3))
POOL = 256 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; default: the embedded `big` model")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    from vllm_marith.distributed.capacity import StepTime, pool_blocks
    from vllm_marith.distributed.model_facts import model_facts
    from vllm_marith.engine.offline import offline_llm
    from vllm_marith.models import ensure

    model = str(arguments.model or ensure(only=["big"]).big)
    llm = offline_llm(model, kv_cache_memory_bytes=POOL, max_num_seqs=128, enable_prefix_caching=False)
    for groups, members in (CALIBRATE[0], CALIBRATE[-1]):
        _seconds_a_step(llm, groups, members, arguments.tokens)  # compiles and warms

    # Calibration and prediction take turns, so that a machine that changes its pace changes it for both.
    cases = [*CALIBRATE, *PREDICT]
    runs: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(arguments.repeats):
        for case in cases:
            runs[case].append(_seconds_a_step(llm, *case, arguments.tokens))
    measured = {case: statistics.median(found) for case, found in runs.items()}

    line = StepTime.fitted([g * m for g, m in CALIBRATE], [measured[case] for case in CALIBRATE])
    print(
        f"step = {line.fixed * 1e3:.2f} ms + {line.row * 1e6:.0f} us a row, of {len(CALIBRATE)} sizes of step"
    )
    print(
        f"{'groups':>6} {'members':>7} {'rows':>5} {'predicted':>10} {'measured':>9} {'error':>7}   tokens/s"
    )
    errors = []
    for groups, members in PREDICT:
        said, found = line.tokens_a_second(groups, members), groups / measured[groups, members]
        errors.append(said / found - 1)
        print(
            f"{groups:>6} {members:>7} {groups * members:>5} {said:>10.0f} {found:>9.0f} {errors[-1]:>+7.1%}"
        )
    config = llm.llm_engine.vllm_config.cache_config
    blocks = pool_blocks(POOL, model_facts(model, "float32").token_bytes, config.block_size)
    print(f"KV cache: {blocks} blocks planned, {config.num_gpu_blocks} in the engine")
    worst = max(errors, key=abs)
    print(json.dumps({"fixed_s": line.fixed, "row_s": line.row, "errors": errors, "worst": worst}))


def _seconds_a_step(llm: Any, groups: int, members: int, tokens: int) -> float:
    """Of the steps after the last group's first token: their mean."""
    from vllm_marith import Formula

    terms = {f"t{i}": {"prompt": f"Write in style {i}: {{input}}"} for i in range(members - 1)}
    formula = Formula.parse(" + ".join(["base", *(f"0.1*{name}" for name in terms)]), terms)
    params = formula.sampling_params(temperature=1.0, seed=0, max_tokens=tokens, ignore_eos=True)
    engine = llm.llm_engine
    for number in range(groups):
        engine.add_request(f"{time.monotonic_ns()}-{number}", f"go on, {number}", params)
    began, steps, first = 0.0, 0, set()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if len(first) == groups:
            steps += 1
        else:
            first |= {output.request_id for output in outputs}
            began = time.perf_counter()
    return (time.perf_counter() - began) / max(steps, 1)


if __name__ == "__main__":
    main()

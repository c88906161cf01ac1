#!/usr/bin/env python
"""Several base models under torch.compile: `python scripts/check_constituents_compiled.py`.

Makes three small random models of different shapes, serves them in one engine with vLLM's compilation on
(Inductor; a C++ compiler is needed on CPUs), lets formulas over all of them and a plain request generate at
once, in chunks and steps of many sizes, and compares tokens and log-probabilities with Hugging Face
transformers in float32.  It takes about a minute of one core, and so is no test of the suite.

Exit code: 0 equal, 1 not, or a model was not compiled.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' models and reference

from tests.support import constituents, engines, exactness, workload

LENGTH = 12
TOLERANCE = 5e-5


def main() -> int:
    engines.prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = folder  # nothing that an earlier run compiled
        return check(Path(folder))


def check(folder: Path) -> int:
    """Serves and compares; returns the exit code."""
    from vllm.compilation.counter import compilation_counter

    rng = random.Random(11)
    jobs = [workload.job(rng, size, "", 20, ["small", "qwen"]) for size in (4, 0, 3, 2)]
    asked = dict(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=0)
    base, others = constituents.make(folder)
    options = dict(enforce_eager=False, max_num_batched_tokens=48, max_num_seqs=12)
    with constituents.engine(base, others, **options) as llm:
        mode = llm.llm_engine.vllm_config.compilation_config.mode
        answers = exactness.generate(llm, jobs, asked)
    wanted = exactness.references(base, jobs, LENGTH, others)
    compiled = compilation_counter.num_aot_compiles
    print(f"compilation mode {mode.name}; models compiled: {compiled}")
    worst, equal = 0.0, compiled == 1 + len(others)
    for (answer,), right in zip(answers, wanted, strict=True):
        equal &= answer.tokens == right.tokens
        found = [step[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
        worst = max(worst, *(abs(a - b) for a, b in zip(found, right.logprobs, strict=True)))
    print(f"{len(jobs)} requests of {LENGTH} tokens; largest difference of a log-probability {worst:.1e}")
    return 0 if equal and worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())

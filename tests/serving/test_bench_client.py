"""vLLM's own `vllm bench serve`, which knows nothing of formulas, on a preset's name."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .test_presets_served import figures

REQUESTS = 6
TOKENS = 8
WRITTEN = 'generation_tokens_total{engine="0",formula="poe"}'


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "completions"), ("openai-chat", "chat/completions")]
)
def test_the_client_measures_a_preset(url: str, tiny_model: Path, backend: str, endpoint: str) -> None:
    before = figures(url)
    found = bench_serve(
        *("--base-url", url, "--backend", backend, "--endpoint", f"/v1/{endpoint}"),
        *("--model", "poe", "--tokenizer", str(tiny_model), "--dataset-name", "random"),
        *("--random-input-len", "12", "--random-output-len", str(TOKENS), "--ignore-eos"),
        *("--num-prompts", str(REQUESTS), "--max-concurrency", "3", "--disable-tqdm"),
    )
    assert (found["model_id"], found["completed"], found["failed"]) == ("poe", REQUESTS, 0)
    assert found["output_lens"] == [TOKENS] * REQUESTS
    assert found["median_ttft_ms"] > 0  # later tokens may reach a client all at once
    # It was the preset that wrote them.
    after = figures(url)
    assert after[WRITTEN] - before.get(WRITTEN, 0) == REQUESTS * TOKENS


def bench_serve(*options: str) -> dict[str, Any]:
    """What ``vllm bench serve`` finds, run in this process: importing vLLM anew would take longer."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    states = random.getstate(), np.random.get_state()
    try:
        return main(parser.parse_args([*options, "--save-detailed"]))
    finally:  # the command has a process to itself, and treats it so
        gc.unfreeze()
        random.setstate(states[0])
        np.random.set_state(states[1])

"""Plain requests of every kind, served in this process or in one of its own, and all that came back.

    python -m tests.support.plain MODEL FILE

writes what `report` returns.  Nothing here imports vllm_marith: what of it is loaded, vLLM has loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FunctionType
from typing import Any

from tests.support import engines

TEXTS = ("", "So", "The value of the expression is", "This is where the statement ends " * 8)
ASKED: tuple[dict[str, Any], ...] = (
    dict(temperature=0, logprobs=5),
    dict(temperature=0.8, seed=3, logprobs=5),
    dict(temperature=1.0, seed=4, top_k=40, top_p=0.9, min_p=0.01, logprobs=0),
    dict(temperature=0, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.3, logprobs=5),
    dict(temperature=0, logit_bias={7: 5.0}, stop=["e"], prompt_logprobs=2),
    dict(temperature=0.7, seed=5, n=2, logprobs=1),
)


def requests() -> tuple[list[str], list[Any]]:
    """Texts and `vllm.SamplingParams`, one request of each kind for each text."""
    from vllm import SamplingParams

    pairs = [(text, SamplingParams(max_tokens=12, **asked)) for asked in ASKED for text in TEXTS]
    texts, params = zip(*pairs, strict=True)
    return list(texts), list(params)


def serve(llm: Any) -> list[Any]:
    """What came back, floats as they are: the first requests one by one, then all of them together."""
    texts, params = requests()
    llm.reset_prefix_cache()
    alone = [llm.generate([texts[i]], params[i], use_tqdm=False)[0] for i in (2, 6, 14)]
    llm.reset_prefix_cache()
    return [contents(output) for output in [*alone, *llm.generate(texts, params, use_tqdm=False)]]


def contents(output: Any) -> Any:
    """A `RequestOutput` as JSON would return it."""
    completions = [
        [
            list(completion.token_ids),
            completion.text,
            completion.cumulative_logprob,
            completion.finish_reason,
            completion.stop_reason,
            _logprobs(completion.logprobs),
        ]
        for completion in output.outputs
    ]
    return [output.prompt, output.prompt_token_ids, _logprobs(output.prompt_logprobs), completions]


def _logprobs(positions: Any) -> Any:
    return positions and [
        step and [[token, found.logprob, found.rank] for token, found in step.items()] for step in positions
    ]


def patched() -> list[str]:
    """Every attribute of a loaded vLLM module, or of a class in one, that vllm_marith replaced."""
    found = set()
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"]:
        owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
        for value in [value for owner in owners for value in vars(owner).values()]:
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if isinstance(function, FunctionType) and hasattr(function, "_marith"):
                found.add(f"{function.__module__}:{function.__qualname__}")
    return sorted(found)


def report(llm: Any) -> dict[str, Any]:
    return {
        "outputs": serve(llm),
        "patched": patched(),
        "modules": sorted(name for name in sys.modules if name.startswith(("vllm_marith", "marith_kernels"))),
        "scheduler": type(engines.scheduler(llm)).__name__,
    }


def in_its_own_process(model: Path, **environment: str) -> dict[str, Any]:
    """`report` of an engine in a process that has never heard of formulas."""
    with tempfile.NamedTemporaryFile() as file:  # vLLM writes to stdout as well
        found = subprocess.run(
            [sys.executable, "-m", "tests.support.plain", str(model), file.name],
            cwd=Path(__file__).parents[2],
            env=os.environ | engines.ENVIRONMENT | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-4000:]
        return json.load(file)


if __name__ == "__main__":
    engines.prepare_environment()
    with engines.engine(sys.argv[1], formulas=False) as llm:
        Path(sys.argv[2]).write_text(json.dumps(report(llm)))

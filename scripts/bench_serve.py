"""vLLM's own `vllm bench serve` against formula presets and against the plain model, on one server.

    python scripts/bench_serve.py [--model DIR] [--presets DIR] [--preset NAME ...] [--backend openai-chat]
                                  [--concurrency N ...] [--rate N ...] [--repeats N] [--output FILE]

Starts `vllm serve`, then runs the unmodified client as anybody would, once for the model's own name and once
for each preset's, at every load, the models taking turns:

    vllm bench serve --model NAME --tokenizer DIR --dataset-name random ...

A *load* is a number of requests that are in flight all the time (`--concurrency`), or a number of requests
a second that arrive as a Poisson process (`--rate`).  Percentiles are those of the client's JSON result:
time to the first token (TTFT), mean time of a request's further tokens (TPOT), and time between two tokens
(ITL), in milliseconds.  Figures are medians over the repetitions; the ratio is a preset's tokens per second
over the plain model's in the same turn.  Every run has prompts of its own, so that the prefix cache holds
what a server's would, the terms' own beginnings and no earlier run's requests.

The plain model computes one row a token, a preset as many as its formula has different terms: `rows`, from
the server's own answer.  Exit code 1 where a request failed, where fewer or more tokens came out than were
asked for, or where the server's own count of the tokens that a preset wrote says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' server

from measuring.work import embedded_model  # noqa: E402

from tests.support import server  # noqa: E402

PLAIN = "plain"
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
WARM_UPS = 2
MEASURED = ("ttft", "tpot", "itl")
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Load:
    """How requests come: `concurrency` in flight at a time, or `rate` of them a second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at a time" if self.concurrency else f"{self.rate:g} a second"

    def options(self, seconds: float) -> list[str]:
        """The client's; a rate is kept up for about so many seconds."""
        if self.concurrency:
            return [
                *("--max-concurrency", str(self.concurrency)),
                *("--num-prompts", str(max(32, 8 * self.concurrency))),
            ]
        assert self.rate
        return [
            "--request-rate",
            str(self.rate),
            "--num-prompts",
            str(max(32, math.ceil(self.rate * seconds))),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; default: the embedded `big` model")
    parser.add_argument("--presets", type=Path, default=ROOT / "configs" / "presets")
    parser.add_argument("--preset", nargs="+", default=["cfg", "detox_union"], help="names of presets")
    parser.add_argument("--backend", choices=list(ENDPOINTS), default="openai", help="the client's")
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--rate", type=float, nargs="*", default=[8.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=8, help="for which a rate is kept up")
    parser.add_argument("--input", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; each has its own")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()
    model = arguments.model or embedded_model()
    loads = [*map(Load, arguments.concurrency), *(Load(rate=rate) for rate in arguments.rate)]
    options = [
        *("--served-model-name", PLAIN, "--max-num-seqs", "128"),
        *("--kv-cache-memory-bytes", str(1 << 30)),
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server ends with us
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"presets": str(arguments.presets)}
        with server.serve(model, folder / "log", settings, *options) as url:
            client = Client(url, model, arguments, folder)
            rows = [row for load in loads for row in client.measure(load)]
    result = {
        "benchmark": "serve",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "model": model.name,
        "backend": arguments.backend,
        "input_tokens": arguments.input,
        "output_tokens": arguments.tokens,
        "seeds": [arguments.seed, client.last_seed],
        "rows": rows,
    }
    line = json.dumps(result)
    if arguments.output:
        arguments.output.write_text(line + "\n")
    print(line)


class Client:
    """`vllm bench serve`, a process a run."""

    def __init__(self, url: str, model: Path, arguments: argparse.Namespace, folder: Path) -> None:
        self.url, self.model, self.asked, self.folder = url, model, arguments, folder
        self.names = [PLAIN, *arguments.preset]
        self.rows = {name: self._rows(name) for name in self.names}
        self.last_seed = arguments.seed
        self._seeds = count(arguments.seed)

    def measure(self, load: Load) -> Iterator[dict[str, Any]]:
        """One line of the table for each model, printed as soon as it is known."""
        turns = [{name: self.run(name, load) for name in self.names} for _ in range(self.asked.repeats)]
        print(f"\n{load}, {self.asked.input} tokens in, {self.asked.tokens} out")
        columns = [f"{what} {p}%" for what in MEASURED for p in PERCENTILES]
        print("  ".join(["model".ljust(16), "rows", "requests/s", "tokens/s", "over plain", *columns]))
        for name in self.names:
            runs = [turn[name] for turn in turns]
            ratios = sorted(
                turn[name]["output_throughput"] / turn[PLAIN]["output_throughput"] for turn in turns
            )
            figures = {
                key: round(statistics.median(run[key] for run in runs), 2)
                for key in (
                    *("request_throughput", "output_throughput"),
                    *(f"p{p}_{what}_ms" for what in MEASURED for p in PERCENTILES),
                )
            }
            first, second, *times = figures.values()
            shown = [name.ljust(16), f"{self.rows[name]:4}", f"{first:10.1f}", f"{second:8.0f}"]
            shown.append(f"{statistics.median(ratios):10.3f}")
            shown += [f"{time:{len(column)}.1f}" for time, column in zip(times, columns, strict=True)]
            print("  ".join(shown), flush=True)
            yield {
                "load": str(load),
                "model": name,
                "rows": self.rows[name],
                "requests_a_run": runs[0]["completed"],
                **figures,
                "over_plain": [round(ratio, 3) for ratio in ratios],
            }

    def run(self, name: str, load: Load) -> dict[str, Any]:
        """The client's JSON result; ends the program with a sentence where it is not what was asked for."""
        self.last_seed = seed = next(self._seeds)
        path = self.folder / "result.json"
        before = self._written_by(name)
        line = [
            *(str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", self.url),
            *("--backend", self.asked.backend, "--endpoint", ENDPOINTS[self.asked.backend]),
            *("--model", name, "--tokenizer", str(self.model), "--dataset-name", "random"),
            *("--random-input-len", str(self.asked.input), "--random-output-len", str(self.asked.tokens)),
            *("--ignore-eos", "--temperature", "0", "--seed", str(seed), "--num-warmups", str(WARM_UPS)),
            *("--metric-percentiles", ",".join(map(str, PERCENTILES)), "--disable-tqdm"),
            *("--save-result", "--result-dir", str(path.parent), "--result-filename", path.name),
            *load.options(self.asked.seconds),
        ]
        done = subprocess.run(line, env=server.environment(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(line)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        requests = found["num_prompts"]
        if (found["completed"], found["failed"]) != (requests, 0):
            sys.exit(
                f"{name}, {load}: of {requests} requests {found['failed']} failed: {found.get('errors')}"
            )
        if found["total_output_tokens"] != requests * self.asked.tokens:
            sys.exit(f"{name}, {load}: {found['total_output_tokens']} tokens from {requests} requests")
        if name != PLAIN:
            written, asked = self._written_by(name) - before, (requests + WARM_UPS) * self.asked.tokens
            if written != asked:
                sys.exit(f"{name}, {load}: the server counts {written} tokens of it, the client {asked}")
        return found

    def _rows(self, name: str) -> int:
        """How many rows of every step a request takes, by the server's answer."""
        body = json.dumps({"model": name, "prompt": "the", "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return int(answer.headers.get("x-marith-members", 1))

    def _written_by(self, name: str) -> int:
        """Tokens that a preset has written in all, by the server's own count."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=300) as page:
            text = page.read().decode()
        lines = re.findall(r"^vllm_marith:generation_tokens_total{(.*)} (\S+)$", text, re.MULTILINE)
        return round(sum(float(value) for labels, value in lines if f'formula="{name}"' in labels))


if __name__ == "__main__":
    main()

"""What formulas cost, measured on this machine in one run.

    python scripts/bench.py [--model DIR] [--repeats N] [--only SECTION ...] [--output FILE] [--plot FILE.png]
    python scripts/bench.py --from FILE --plot FILE.png

Tables by section, then one JSON line:

    concurrency   N formulas of three terms at a time, with their latencies, beside plain vLLM with as many
                  requests as the groups have members (the same rows: the least that a formula can cost) and
                  plain vLLM with as many requests
    terms         formulas of 1 to 8 terms, beside the same rows
    vocabulary    the same model with vocabularies up to 128,256, random weights, beside the same rows
    traffic       answers of 16 to 112 tokens; as soon as one ends the next is asked for, so that groups end
                  and others are let in all the time, beside the same rows
    step          microseconds that this package adds to an engine step, by part, and their share of it
    larger        formulas beside the same rows on a model of 134 million parameters, random weights
    larger_step   what is added to its steps
    peers         classifier-free guidance: transformers' own, and a loop over transformers (bench_peers.py)

The kernels alone are measured by scripts/bench_kernels.py.

The sides of a comparison run in one engine and take turns.  Ratios are speeds of formulas over the other
side's, by neighbouring runs, median and quartiles: machines drift, ratios do not.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_peers
from measuring import figure, work
from measuring.hooks import step_cost
from measuring.runs import in_turns, latencies, ratio, run, speed

TERMS = 3
CONCURRENT = (1, 8, 32)
FORMULAS = 8
"""At a time, where something else varies."""

NUMBERS_OF_TERMS = (1, 2, 3, 4, 8)
VOCABULARIES = (2048, 32_000, 128_256)
STEP_GROUPS = (1, 8, 32, 128)
LARGER_CONCURRENT = (8, 32)
LARGER_GROUPS = (8, 32, 128)
LARGER_TOKENS = 32
LONGEST = 160
"""Tokens of a prompt with its answer."""
TRAFFIC_CONCURRENT = (8, 32)
TRAFFIC_LENGTHS = (16, 112)
TRAFFIC_TIMES = 4
"""Requests for each one in flight."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; default: the embedded `big` model")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths of answers in the traffic")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    parser.add_argument("--plot", type=Path, help="file for the figure, PNG or SVG")
    parser.add_argument("--from", dest="source", type=Path, help="plot this result and measure nothing")
    arguments = parser.parse_args()
    if arguments.plot and not arguments.source and not figure.RATIOS.keys() & set(arguments.only):
        parser.error(f"--plot needs one of these sections: {', '.join(figure.RATIOS)}")
    if arguments.source:
        result = json.loads(arguments.source.read_text())
    else:
        result = measure(arguments)
        line = json.dumps(result)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(line + "\n")
        print(line)
    if arguments.plot:
        figure.draw(result, arguments.plot)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model = arguments.model or work.embedded_model()
    result: dict[str, Any] = {
        "benchmark": "formulas",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "model": model.name,
        "tokens": arguments.tokens,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
    }
    bench = Bench(model, arguments.tokens, arguments.repeats, arguments.seed)
    for name in arguments.only:
        result[name] = SECTIONS[name](bench)
        print_section(name, result[name])
    return result


class Bench:
    """The measurements, in one in-process engine that is started when it is needed."""

    def __init__(self, model: Path, tokens: int, repeats: int, seed: int) -> None:
        self.model, self.tokens, self.repeats, self.seed = model, tokens, repeats, seed
        self.make = work.Maker([tokens])
        self.others: list[Any] = []  # an engine that ends takes what others in the process need with it

    @functools.cached_property
    def llm(self) -> Any:
        return engine(self.model, TERMS * max(STEP_GROUPS))

    def concurrency(self) -> list[dict[str, Any]]:
        return [self._concurrency(number) for number in CONCURRENT]

    def _concurrency(self, number: int) -> dict[str, Any]:
        sides = {
            "formulas": self.make.formulas(number, TERMS),
            "same_rows": self.make.same_rows(number, TERMS),
            "same_requests": self.make.same_requests(number),
        }
        runs = in_turns(
            {name: functools.partial(run, self.llm, side) for name, side in sides.items()}, self.repeats
        )
        return {
            "concurrent": number,
            "tokens_per_s": {name: speed(runs[name], side.tokens) for name, side in sides.items()},
            "over_same_rows": ratio(runs["formulas"], runs["same_rows"]),
            "over_same_requests": ratio(runs["formulas"], runs["same_requests"]),
            "latency": {name: latencies(side) for name, side in runs.items()},
        }

    def terms(self) -> list[dict[str, Any]]:
        return [
            {"terms": terms, **self._beside_rows(self.llm, FORMULAS, terms, self.make)}
            for terms in NUMBERS_OF_TERMS
        ]

    def vocabulary(self) -> list[dict[str, Any]]:
        found = []
        for size in VOCABULARIES:
            llm = self._another(TERMS * FORMULAS, vocab_size=size)
            beside = self._beside_rows(llm, FORMULAS, TERMS, self.make)
            found.append({"vocabulary": size, **beside})
        return found

    def _another(self, rows: int, **shape: int) -> Any:
        """An engine of a model of another shape."""
        with tempfile.TemporaryDirectory() as home:
            llm = engine(work.like(self.model, Path(home), **shape), rows)
        self.others.append(llm)
        return llm

    def traffic(self) -> list[dict[str, Any]]:
        found = []
        for number in TRAFFIC_CONCURRENT:
            lengths = work.different_lengths(number * TRAFFIC_TIMES, *TRAFFIC_LENGTHS, seed=self.seed)
            beside = self._beside_rows(
                self.llm, number * TRAFFIC_TIMES, TERMS, work.Maker(lengths), in_flight=number
            )
            found.append({"concurrent": number, "requests": len(lengths), **beside})
        return found

    def _beside_rows(
        self, llm: Any, number: int, terms: int, make: work.Maker, in_flight: int | None = None
    ) -> dict[str, Any]:
        formulas, plain = make.formulas(number, terms), make.same_rows(number, terms)
        runs = in_turns(
            {
                "formulas": lambda: run(llm, formulas, in_flight),
                "same_rows": lambda: run(llm, plain, in_flight),
            },
            self.repeats,
        )
        return {
            "formulas_tokens_per_s": speed(runs["formulas"], formulas.tokens),
            "same_rows_tokens_per_s": speed(runs["same_rows"], plain.tokens),
            "over_same_rows": ratio(runs["formulas"], runs["same_rows"]),
        }

    def step(self) -> list[dict[str, Any]]:
        return self._steps(self.llm, self.make, STEP_GROUPS)

    @functools.cached_property
    def larger_llm(self) -> Any:
        return self._another(TERMS * max(LARGER_GROUPS), **work.LARGER)

    def larger(self) -> list[dict[str, Any]]:
        make = work.Maker([LARGER_TOKENS])
        return [
            {"concurrent": number, **self._beside_rows(self.larger_llm, number, TERMS, make)}
            for number in LARGER_CONCURRENT
        ]

    def larger_step(self) -> list[dict[str, Any]]:
        return self._steps(self.larger_llm, work.Maker([LARGER_TOKENS]), LARGER_GROUPS)

    def _steps(self, llm: Any, make: work.Maker, numbers: tuple[int, ...]) -> list[dict[str, Any]]:
        found = []
        for groups in numbers:
            formulas = make.formulas(groups, TERMS)
            run(llm, formulas)  # warm
            found.append({"groups": groups, **step_cost(llm, formulas)})
        return found

    def peers(self) -> dict[str, Any]:
        return bench_peers.measure(self.model, self.tokens, self.repeats)


SECTIONS: dict[str, Callable[[Bench], Any]] = {
    "concurrency": Bench.concurrency,
    "terms": Bench.terms,
    "vocabulary": Bench.vocabulary,
    "traffic": Bench.traffic,
    "step": Bench.step,
    "larger": Bench.larger,
    "larger_step": Bench.larger_step,
    "peers": Bench.peers,
}


def engine(model: Path, rows: int) -> Any:
    from transformers import AutoConfig

    from vllm_marith.engine.offline import offline_llm

    config = AutoConfig.from_pretrained(model)
    of_a_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return offline_llm(
        str(model),
        max_num_seqs=rows,
        max_model_len=LONGEST,
        kv_cache_memory_bytes=rows * LONGEST * of_a_token,
        enable_prefix_caching=False,
        disable_log_stats=False,  # which knows when each request's tokens came
    )


def print_section(name: str, rows: Any) -> None:
    print(f"\n{name}")
    if name == "peers":
        bench_peers.print_table(rows)
    else:
        print_table([_cells(row) for row in rows])
    if name == "concurrency":
        print("\nmilliseconds to the first token and for each later one, median and 99th percentile")
        print_table(
            [
                {"concurrent": row["concurrent"], "side": side, **found}
                for row in rows
                for side, found in row["latency"].items()
            ]
        )


def print_table(rows: list[dict[str, Any]]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.rjust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()), flush=True)


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a section for its table: ratios in a cell, speeds in one each, latencies left to their own."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if key.startswith("over_"):
            found[key] = "{median:.3f} ({low:.3f} to {high:.3f})".format_map(value)
        elif key == "tokens_per_s":
            found |= {f"{side}_tokens_per_s": speed for side, speed in value.items()}
        elif key != "latency":
            found[key] = value
    return found


if __name__ == "__main__":
    main()

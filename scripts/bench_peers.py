"""Formulas here and in other libraries that compute the same, measured on this machine in one run.

    python scripts/bench_peers.py [--model DIR] [--tokens N] [--repeats N] [--genlm PYTHON]
                                  [--output FILE] [--plot FILE.png]
    python scripts/bench_peers.py --from FILE --plot FILE.png

Classifier-free guidance: two rows a token, `1.5*base - 0.5*unprompted`, greedy, for N requests at a time:

    formula     this package: N formulas in one engine
    guidance    transformers' own, `generate(guidance_scale=1.5)`, N requests of one length as one batch
    loop        transformers, one request after the other, a key-value cache for each of the two terms
    plain       vLLM without a formula: what N requests cost that ask for nothing (not a peer: a bound)

With `--genlm`, the Python of an environment that has genlm-control, and another model of two rows, a product
of experts, `code + prose` without normalisation, sampled at T = 1:

    formula     this package
    genlm       a `Product` of two `PromptedLLM` and `direct_token_sampler`, see `genlm_peer.py`

The batch is transformers' best case: all requests have one length, come together and end together.  The four
take turns, so that they share the machine's other load; figures are medians over the turns, the plot shows
their quartiles.  That the sides do the same is checked: the share of tokens that formula and guidance agree
in is part of the result, the last line, a JSON object, and so is the largest difference of a log-probability
that formula and genlm give any token; the program ends where that is above 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measuring.work import embedded_model

CONCURRENT = (1, 4, 16, 64)
PRODUCTS = (1, 4, 16)
EXPERTS = {"code": "write code", "prose": "write prose"}
TOLERANCE = 1e-3
GUIDANCE = 1.5
UNPROMPTED = "\n"
WORDS = (
    "The",
    "file",
    "path",
    "name",
    "list",
    "value",
    "text",
    "data",
    "type",
    "code",
    "test",
    "line",
    "time",
)
LABELS = {
    "plain": "plain vLLM, no formula",
    "formula": "vllm-marith",
    "guidance": "transformers, guidance_scale",
    "loop": "transformers, one by one",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model directory; default: the embedded `big` model")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--genlm", type=Path, help="Python of an environment with genlm-control")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    parser.add_argument("--plot", type=Path, help="file for the figure, PNG or SVG")
    parser.add_argument("--from", dest="source", type=Path, help="plot this result and measure nothing")
    arguments = parser.parse_args()
    if arguments.source:
        result = json.loads(arguments.source.read_text())
    else:
        model = arguments.model or embedded_model()
        result = measure(model, arguments.tokens, arguments.repeats, arguments.genlm)
        line = json.dumps(result)
        if arguments.output:
            arguments.output.write_text(line + "\n")
        print_table(result)
        print(line)
    if arguments.plot:
        plot(result, arguments.plot)


def measure(model: Path, tokens: int, repeats: int, genlm: Path | None = None) -> dict[str, Any]:
    """Tokens per second of every side, for every number of concurrent requests, turn by turn."""
    from vllm_marith.engine.offline import offline_llm

    llm = offline_llm(
        model,
        max_num_seqs=2 * max(CONCURRENT),
        max_model_len=256,
        max_logprobs=-1,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine, peer = Engine(llm, tokens), Peer(model, tokens)
    rows = []
    for n in CONCURRENT:
        prompts = peer.prompts(n)
        sides: dict[str, Callable[[], list[list[int]]]] = {
            "formula": lambda prompts=prompts: engine.formulas(prompts),  # type: ignore[misc]
            "guidance": lambda prompts=prompts: peer.guidance(prompts),  # type: ignore[misc]
            "loop": lambda prompts=prompts: peer.loop(prompts[:1]),  # type: ignore[misc]
            "plain": lambda prompts=prompts: engine.plain(prompts),  # type: ignore[misc]
        }
        written = {name: side() for name, side in sides.items()}  # warm
        speeds = in_turns(sides, repeats)
        agree = agreement(written["formula"], written["guidance"])
        rows.append({"concurrent": n, "tokens_per_s": speeds, "same_tokens": agree})
    products = genlm_products(engine, peer.tokenizer, model, genlm, repeats) if genlm else {}
    return {
        "benchmark": "peers",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("vllm", "torch", "transformers")},
        "model": model.name,
        "tokens": tokens,
        "rows": rows,
        **products,
    }


def in_turns(sides: dict[str, Callable[[], list[list[int]]]], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each side in each turn."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            count = sum(map(len, side()))
            speeds[name].append(round(count / (time.perf_counter() - start), 1))
    return speeds


def genlm_products(engine: Engine, tokenizer: Any, model: Path, python: Path, repeats: int) -> dict[str, Any]:
    """The product of experts: whether both give the same distributions, then tokens per second."""

    def prompts(text: str) -> list[list[int]]:
        return [tokenizer(f"{system}\n{text}").input_ids for system in EXPERTS.values()]

    with GenLM(python, model) as genlm:
        worst = 0.0
        for text in WORDS:
            answer, found = engine.product_rows(text)
            for k, ours in enumerate(found):
                theirs = torch.tensor(genlm.ask(distribution=[prompts(text), answer[:k]]))
                worst = max(worst, float((ours - theirs).abs().max()))
        print(f"product: log-probabilities differ by {worst:.1e} at most", flush=True)
        if not worst < TOLERANCE:
            sys.exit("the two products are different distributions")
        rows = []
        for n in PRODUCTS:
            texts = [f"{a} {b}" for a in WORDS for b in WORDS][:n]
            pairs = [prompts(text) for text in texts]
            asked = {"generate": pairs, "tokens": engine.asked["max_tokens"]}
            sides: dict[str, Callable[[], list[list[int]]]] = {
                "formula": lambda texts=texts: engine.products(texts),  # type: ignore[misc]
                "genlm": lambda asked=asked: genlm.ask(**asked),  # type: ignore[misc]
            }
            in_turns(sides, 1)  # warm
            rows.append({"concurrent": n, "tokens_per_s": in_turns(sides, repeats)})
        return {"genlm": genlm.versions, "product_worst_difference": worst, "products": rows}


class GenLM:
    """`genlm_peer.py`, a process in an environment of its own."""

    def __init__(self, python: Path, model: Path) -> None:
        line = [str(python), str(Path(__file__).with_name("genlm_peer.py"))]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self.ask(model=str(model))

    def __enter__(self) -> GenLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)

    def ask(self, **asked: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"genlm-control ended with {self.process.wait()}")
        return json.loads(answer)


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of the tokens up to which, from the start, two sets of answers are the same."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        differ = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        same += next(differ, len(a))
    return round(same / sum(map(len, ours)), 4)


class Engine:
    """vLLM, with formulas and without."""

    def __init__(self, llm: Any, tokens: int) -> None:
        from vllm_marith import Formula

        self.llm = llm
        self.asked = dict(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        terms = {"unprompted": {"prompt": UNPROMPTED}}
        self.formula = Formula.parse(f"{GUIDANCE}*base + {1 - GUIDANCE}*unprompted", terms)

        experts = {name: {"system": text} for name, text in EXPERTS.items()}
        self.product = Formula.parse(" + ".join(EXPERTS), experts, normalize="none")

    def products(self, texts: list[str]) -> list[list[int]]:
        return self._tokens(texts, self.product.sampling_params(**{**self.asked, "temperature": 1}))

    def product_rows(self, text: str, length: int = 4) -> tuple[list[int], list[torch.Tensor]]:
        """A few tokens of the product, and the log-probabilities of the whole vocabulary for each."""
        asked = {**self.asked, "max_tokens": length, "logprobs": -1}
        (output,) = self.llm.generate([text], self.product.sampling_params(**asked), use_tqdm=False)
        (answer,) = output.outputs
        rows = [torch.tensor([row[i].logprob for i in range(len(row))]) for row in answer.logprobs]
        return list(answer.token_ids), rows

    def formulas(self, prompts: list[str]) -> list[list[int]]:
        return self._tokens(prompts, self.formula.sampling_params(**self.asked))

    def plain(self, prompts: list[str]) -> list[list[int]]:
        from vllm import SamplingParams

        return self._tokens(prompts, SamplingParams(**self.asked))

    def _tokens(self, prompts: list[str], params: Any) -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in self.llm.generate(prompts, params, use_tqdm=False)]


class Peer:
    """Hugging Face transformers."""

    def __init__(self, model: Path, tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokens = tokens

    def prompts(self, n: int) -> list[str]:
        """n different texts of as many tokens as each other: a batch without padding."""
        texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]
        by_length: dict[int, list[str]] = {}
        for text in texts:
            by_length.setdefault(len(self.tokenizer(text).input_ids), []).append(text)
        return max(by_length.values(), key=len)[:n]

    @torch.inference_mode()
    def guidance(self, prompts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(prompts, return_tensors="pt").input_ids
        negative = self.tokenizer([UNPROMPTED] * len(prompts), return_tensors="pt").input_ids
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            negative_prompt_ids=negative,
            guidance_scale=GUIDANCE,
            do_sample=False,
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return [row[ids.shape[1] :].tolist() for row in found]

    @torch.inference_mode()
    def loop(self, prompts: list[str]) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            inputs = [self.tokenizer(text, return_tensors="pt").input_ids for text in (prompt, UNPROMPTED)]
            caches: list[Any] = [None, None]
            answer: list[int] = []
            for _ in range(self.tokens):
                rows = []
                for i, ids in enumerate(inputs):
                    output = self.model(ids, past_key_values=caches[i], use_cache=True)
                    caches[i] = output.past_key_values
                    rows.append(output.logits[0, -1].log_softmax(-1))
                token = (GUIDANCE * rows[0] + (1 - GUIDANCE) * rows[1]).argmax()
                answer.append(int(token))
                inputs = [token.view(1, 1)] * 2
            answers.append(answer)
        return answers


def print_table(result: dict[str, Any]) -> None:
    names = list(LABELS)
    print("  ".join(["concurrent", *names, "formula/guidance", "same tokens"]))
    for row in result["rows"]:
        speeds = row["tokens_per_s"]
        ratio = statistics.median(a / b for a, b in zip(speeds["formula"], speeds["guidance"], strict=True))
        cells = [f"{statistics.median(speeds[name]):.0f}".rjust(len(name)) for name in names]
        shown = [str(row["concurrent"]).rjust(10), *cells, f"{ratio:.2f}".rjust(16)]
        print("  ".join([*shown, f"{row['same_tokens']:.1%}".rjust(11)]), flush=True)

    for row in result.get("products", ()):
        speeds = row["tokens_per_s"]
        ratios = sorted(a / b for a, b in zip(speeds["formula"], speeds["genlm"], strict=True))
        ours, theirs = (statistics.median(speeds[name]) for name in ("formula", "genlm"))
        print(
            f"product, {row['concurrent']} requests: formula {ours:.0f} tokens/s, genlm {theirs:.0f}, "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second by concurrency, a line a side, quartiles over the turns as bands."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from vllm_marith.evaluation import plots

    colours = dict(zip(LABELS, (plots.QUIET, *plots.COLOURS), strict=False))
    x = [row["concurrent"] for row in result["rows"]]
    with rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.subplots()
        for name, label in LABELS.items():
            turns = [row["tokens_per_s"][name] for row in result["rows"]]
            middle = [statistics.median(turn) for turn in turns]
            style: dict[str, Any] = (
                dict(ls=(0, (3, 2)), lw=1.2) if name == "plain" else dict(marker="o", ms=4.5)
            )
            quarters = [statistics.quantiles(turn, n=4) for turn in turns]
            low, high = [quarter[0] for quarter in quarters], [quarter[2] for quarter in quarters]
            axes.fill_between(x, low, high, color=colours[name], alpha=0.15, lw=0)
            axes.plot(x, middle, color=colours[name], **style)
            weight = "bold" if name == "formula" else "normal"
            axes.annotate(
                label,
                (x[-1], middle[-1]),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colours[name],
                fontweight=weight,
                annotation_clip=False,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [str(n) for n in x])
        axes.xaxis.set_minor_locator(NullLocator())
        plots.plain_log(axes, axes.yaxis)
        axes.set_xlabel("requests at a time")
        axes.set_ylabel("tokens per second (log scale)")
        axes.set_title(f"Classifier-free guidance, {result['model']}, {result['machine']}")
        axes.grid(axis="y", color=plots.FAINT, lw=0.6)
        figure.savefig(path, dpi=144)


if __name__ == "__main__":
    main()

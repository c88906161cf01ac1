"""The paper's public implementation on our embedded models: calls of the large model and time for each token.

    PYTHON scripts/bench_reference.py CHECKOUT [--tokens N] [--requests N] [--repeats N] [--output FILE]
                                               [--home DIR] [--ours FILE]

CHECKOUT is one of github.com/eth-sri/language-model-arithmetic, PYTHON that of an environment in which its
package `model_arithmetic` can be imported, with transformers 4.45 (earlier ones cannot read the embedded
tokenizer, later ones have no tuples of keys and values).  This package need not be there.  The rows,
requests and speculative factors are those of `bench_speculation.py`, read from the evaluation's scenario; one
request at a time, T = 1, float32 on the CPU.  With `--ours`, what that script wrote with `--output`, prompts
must have the same token ids and both models the same log-probabilities to 1e-4; the two results are printed
together.

Calls are counted where the models are run, and must be as many as the reference's own monitor counts.  Each
row is run without speculation (and without terms that only draft), as the checkout is, and corrected: from
the third stage on, the checkout takes the softmax of what are probabilities already, so that its test
accepts nearly everything and what it draws does not have the formula's distribution.

Nothing of the checkout is changed.  What is adapted here, and why:

- A tokenizer_config.json that names a class which that transformers version knows, and has the template.
- Both models are loaded once and handed over; the prompt template is our chat template.
- The tokenizer's end-of-sequence token is its padding token, so that answers have all their tokens.
- Its `Superseded` takes the weight N of the small operand, so the large one is divided by its own.
- Warnings that transformers repeats for every model are not shown.
- Its drafter A knows the likeliest successor of each token in the models' training text; ours copies from
  prompt and answer.  Rows with A compare the two together with their drafters, the others do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

SCENARIO = Path(__file__).parents[1] / "vllm_marith" / "evaluation" / "scenarios" / "embedded.yaml"
SIDES = ("none", "speculative", "corrected")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--requests", type=int, default=4, help="requests per repetition")
    parser.add_argument("--repeats", type=int, default=3, help="alternating repetitions")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    home = os.environ.get("MARITH_HOME", "~/.cache/vllm-marith")
    parser.add_argument("--home", type=Path, default=Path(home).expanduser(), help="the embedded models")
    parser.add_argument("--ours", type=Path, help="what bench_speculation.py wrote with --output")
    arguments = parser.parse_args()

    sys.path.insert(0, str(arguments.checkout / "src"))
    import transformers
    from loguru import logger

    logger.remove()
    transformers.logging.set_verbosity_error()
    asked = yaml.safe_load(SCENARIO.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        reference = Reference(arguments.home, Path(folder), asked["terms"])
        ours = json.loads(arguments.ours.read_text()) if arguments.ours else None
        if ours:
            reference.check(ours["checks"])
        rows = measure(reference, asked["speculation"], arguments, ours)
    result = {
        "benchmark": "reference",
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "tokens": arguments.tokens,
        "requests": arguments.requests,
        "repeats": arguments.repeats,
        "checked": bool(ours),
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result) + "\n")


def measure(reference: Reference, asked: Any, arguments: Any, ours: Any) -> list[dict[str, Any]]:
    """Every row, its sides in turn."""
    beside = {row["formula"]: row for row in ours["rows"]} if ours else {}
    header = "calls of M / token: none -> speculative (corrected)"
    print(
        f"{'formula':38} {header:52} {'ms / token':>22} {'faster':>7} {'accepted':>15}   ours: calls, faster"
    )
    users = [asked["requests"][i % len(asked["requests"])] for i in range(arguments.requests)]
    rows = []
    for name, case in asked["formulas"].items():
        models = {side: reference.model(case, side) for side in SIDES}
        turns = []
        try:
            for turn in range(arguments.repeats + 1):
                turns.append(
                    {side: reference.run(models[side], users, arguments.tokens, turn) for side in SIDES}
                )
        except RuntimeError as error:
            print(f"{name:38} fails: {error}", flush=True)
            rows.append({"formula": name, "fails": str(error)})
            continue
        turns = turns[1:]  # the first warms up
        speedup = {
            side: statistics.median(turn["none"]["seconds"] / turn[side]["seconds"] for turn in turns)
            for side in SIDES[1:]
        }
        row: dict[str, Any] = {"formula": name, "speedup": speedup}
        for key in ("calls", "calls_of_the_small_model"):
            row[key] = {side: statistics.mean(turn[side][key] for turn in turns) for side in SIDES}
        tested = {side: [p for turn in turns for p in turn[side]["acceptance"]] for side in SIDES[1:]}
        row["acceptance"] = {side: statistics.mean(p) if p else None for side, p in tested.items()}
        row["milliseconds"] = {
            side: 1e3 * statistics.median(turn[side]["seconds"] for turn in turns) for side in SIDES
        }
        rows.append(row)
        calls, times = list(row["calls"].values()), list(row["milliseconds"].values())
        kept = [f"{p:.3f}" if p else "" for p in row["acceptance"].values()]
        own = ""
        if name in beside:
            before, after, _ = beside[name]["calls"]
            own = f"{before:.3f} -> {after:.3f}, {beside[name]['speedup']:.2f}x"
        print(
            f"{name:38} {calls[0]:6.3f} -> {calls[1]:5.3f} ({calls[2]:5.3f}){'':28} "
            f"{times[0]:6.1f} -> {times[1]:5.1f} ({times[2]:5.1f}) {speedup['speculative']:6.2f}x "
            f"{kept[0]:>6} ({kept[1]:>6})   {own}",
            flush=True,
        )
    return rows


class Reference:
    """The checkout's package over the two embedded models."""

    def __init__(self, home: Path, folder: Path, terms: dict[str, dict[str, Any]]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.terms = terms
        self.paths = {name: readable(home / name, folder / name) for name in ("big", "draft")}
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32).eval()
            for name, path in self.paths.items()
        }
        self.tokenizer = AutoTokenizer.from_pretrained(self.paths["big"])
        self.calls: Counter[str] = Counter()
        for name, model in self.models.items():
            model.register_forward_pre_hook(lambda *_, name=name: self.calls.update([name]))
        parts = json.loads((home / "corpus" / "corpus.json").read_text())
        parts = parts.get("parts", parts)
        self.corpus = [text for files in parts["A"].values() for file in files for text in file]

    def prompt(self, system: str | None, user: str) -> str:
        """The chat, without the token that the reference puts first itself."""
        messages = [{"role": "user", "content": user}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(self.tokenizer.bos_token)

    def check(self, checks: dict[str, Any]) -> None:
        """Whether prompts are the same tokens, and the models the same models."""
        for chat in checks["prompts"]:
            text = self.prompt(chat["system"], chat["user"])
            found = [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False).input_ids]
            if found != chat["tokens"]:
                sys.exit(f"the prompt {chat} is tokenized as {found} here")
        for name, told in checks["log_probabilities"].items():
            worst = (log_probabilities(self.models[name], checks["text"]) - torch.tensor(told)).abs().max()
            print(f"{name}: log-probabilities differ by {worst:.1e} at most")
            if not worst < 1e-4:
                sys.exit(f"{name} is another model here than there")

    def model(self, case: dict[str, Any], side: str) -> Any:
        """A `ModelArithmetic` for a formula of the scenario."""
        from model_arithmetic import Autocomplete, ModelArithmetic, PromptedLLM, Superseded
        from model_arithmetic.basic_model_loader import load_tokenizer

        def term(name: str) -> Any:
            about, factor = self.terms.get(name, {}), case["factors"].get(name, 1)
            if about.get("model") == "ngram":
                return Autocomplete(corpus=self.corpus, speculative_factor=factor)
            model = about.get("model", "big")
            return PromptedLLM(
                about.get("system", ""),
                model=self.models[model],
                model_name=str(self.paths[model]),
                speculative_factor=factor,
                prompt_template=self.prompt,
            )

        def superseded(small: Any, large: Any) -> Any:
            return large if side == "none" else Superseded(small, large * (1 / large.norm()))

        class Corrected(ModelArithmetic):  # type: ignore[misc]
            def create_sample_logprobs(self, logprobs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                # Log-probabilities are negative; what is not is the outcome of this very function.
                done = bool((logprobs >= 0).all())
                return logprobs if done else super().create_sample_logprobs(logprobs, *args, **kwargs)

        names = compile(case["formula"], case["formula"], "eval").co_names
        known: dict[str, Any] = {name: term(name) for name in names if name != "superseded"}
        formula = eval(case["formula"], {"superseded": superseded, **known})  # a file of ours, not a client's
        tokenizer = load_tokenizer(str(self.paths["big"]))
        tokenizer.eos_token = tokenizer.pad_token
        made = Corrected if side == "corrected" else ModelArithmetic
        model = made(formula, default_model=str(self.paths["big"]), dtype=torch.float32, tokenizer=tokenizer)
        model.speculates = side != "none"
        return model

    def run(self, model: Any, users: list[str], tokens: int, seed: int) -> dict[str, Any]:
        """Seconds, calls of the large and of the small model, for each token; of every token that terms with
        a system message tested, the probability that a draft stands."""
        from model_arithmetic import PromptedLLM

        torch.manual_seed(seed)
        self.calls.clear()
        count, own, accepted = 0, 0, list[float]()
        start = time.perf_counter()
        for user in users:
            model.generate_text(user, max_new_tokens=tokens, do_speculation=model.speculates)
            count += int(model.monitor.other_elements["length"].total())
            for monitor in model.monitor.models_monitor.monitors.values():
                if not isinstance(monitor.runnable_operator, PromptedLLM):
                    continue
                own += monitor.n_calls()
                if monitor.runnable_operator.system_prompt:
                    found = monitor.other_elements.get("expected_acceptance_prob")
                    accepted += found.elements if found else []
        seconds = time.perf_counter() - start
        assert own == self.calls.total(), (own, self.calls)
        return {
            "seconds": seconds / count,
            "calls": self.calls["big"] / count,
            "calls_of_the_small_model": self.calls["draft"] / count,
            "acceptance": accepted,
        }


def log_probabilities(model: Callable[..., Any], text: list[int]) -> torch.Tensor:
    """Of each token of a text but the first, given those before."""
    with torch.inference_mode():
        rows = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(text)[1:, None])[:, 0]


def readable(model: Path, folder: Path) -> Path:
    """A copy of a model that older transformers read."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["chat_template"] = (folder / "chat_template.jinja").read_text()
    path.write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()

"""Formulas with and without drafts over the embedded models, measured on this machine in one run.

    python scripts/bench_speculation.py [--tokens N] [--requests N] [--repeats N] [--rows TEXT]
                                        [--output FILE]

A table as the paper's (arXiv 2311.14479; Llama-2-13b-chat on a GPU): for each formula the calls of the large
model for each generated token and the milliseconds a token takes, without drafts and with them, one request
at a time, T = 1.  A call is one term's forward pass, however many positions it covers; terms of the small
model are counted apart.

The rows are the evaluation's (`scenarios/embedded.yaml`), those that its report leaves out, too: n-grams that
draft for the model (the paper's superseded(A, M)), attributes that lag behind these two, formulas of four
terms, and the small embedded model as a drafter for the large one and for a formula.

Where arctic-inference is installed, each row with n-grams is measured again with suffixes in their place, on
an engine of its own, whose memory holds that row's answers and no others.  The turn that is not kept and the
modes of each repetition fill it: what comes later finds more.

The embedded large model is five times the size of the small one, and at two milliseconds a token what a
step costs beside the model counts as much.  So there is a last row for what a *large* model would gain: a
stand-in, the small model with layers behind its own that change nothing but take their time, and a sharper
head.

The ratios are taken repetition by repetition: machines drift, ratios do not.  Those of `auto` are also told
of all repetitions together, with what it costs to try and to err; many repetitions are a long run.  Where
nothing else runs, OMP_WAIT_POLICY=ACTIVE has idle threads spin, as they do where nobody says how to wait:
steps of small models are then about twice as fast.

The last line is one JSON object; with `--output`, it also holds token ids and log-probabilities by which
`bench_reference.py` knows that it has the same prompts and models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PAPER = {
    "superseded(A, M)": ((1, 24.88), (0.801, 22.80)),
    "+ 0.5 legal": ((2, 48.40), (1.035, 30.43)),
    "+ 0.5 code": ((2, 49.15), (1.045, 31.19)),
    "+ 0.5 prose": ((2, 49.26), (1.076, 32.00)),
    "+ 0.2 legal + 0.5 code + 0.05 prose": ((4, 97.03), (1.317, 43.26)),
    "+ 1.0 legal + 0.1 code + 0.4 prose": ((4, 97.02), (1.436, 46.10)),
}
"""(calls, milliseconds) a token of the paper's rows, without drafts and with them; its attributes are formal,
happy and sports for 0.5, and others in the longer ones."""

SUFFIXES = ", suffixes"
STAND_IN = "superseded(small, stand-in)"
STAND_IN_LENGTH = 6


def make_stand_in(small: Path, home: Path, layers: int = 24, sharper: float = 1.15) -> Path:
    """The small model, `layers` layers deeper and with a head `sharper` times as steep."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    config = model.config
    known = config.num_hidden_layers
    config.num_hidden_layers += layers
    config.tie_word_embeddings = False
    deeper = AutoModelForCausalLM.from_config(config)
    deeper.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer in deeper.model.layers[known:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        deeper.lm_head.weight.copy_(model.lm_head.weight * sharper)
    deeper.save_pretrained(home)
    AutoTokenizer.from_pretrained(small).save_pretrained(home)
    return home


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument(
        "--requests", type=int, default=4, help="requests per repetition, one after the other"
    )
    parser.add_argument("--repeats", type=int, default=3, help="alternating repetitions")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()

    from vllm_marith.engine.offline import offline_llm
    from vllm_marith.evaluation import Scenario
    from vllm_marith.evaluation.drafting import MODES, Drafts, measure
    from vllm_marith.evaluation.scenario import Arm
    from vllm_marith.models import ensure

    scenario = Scenario.load("embedded")
    asked = scenario.speculation
    assert asked is not None
    made = ensure(only=["big", "draft"])

    def engine(model: Path) -> Any:
        settings = {"constituents": {"draft": str(made.draft)}, "max_speculative_tokens": asked.longest}
        return offline_llm(
            str(model),
            additional_config={"marith": settings},
            max_num_seqs=16,
            max_model_len=512,
            kv_cache_memory_bytes=256 << 20,
        )

    llm = engine(made.big)
    stand_in = engine(make_stand_in(made.draft, Path(tempfile.mkdtemp())))
    users = [asked.requests[i % len(asked.requests)] for i in range(arguments.requests)]

    def measured(llm: Any, formula: str, factors: dict[str, int]) -> Drafts:
        parsed = scenario.formula(Arm("", formula, factors=factors))
        assert parsed is not None
        length = max(factors.values()) - 1
        return measure(llm, parsed, length, arguments.tokens, [users] * arguments.repeats)

    def with_suffixes(formula: str, factors: dict[str, int]) -> Drafts:
        llm = engine(made.big)
        try:
            return measured(llm, formula, factors)
        finally:
            llm.llm_engine.engine_core.shutdown()

    rows = []
    print(
        f"{'formula':38} {'calls of M / token':>22} {'ms / token':>20} {'faster':>7} {'auto, in total':>14}"
        f" {'kept':>5}   paper"
    )
    cases: dict[str, Callable[[], Drafts]] = {}
    for name, case in asked.formulas.items():
        cases[name] = partial(measured, llm, case.formula, case.factors)
        if find_spec("arctic_inference") and "ngrams" in case.formula:
            formula = case.formula.replace("ngrams", "suffixes")
            cases[name + SUFFIXES] = partial(with_suffixes, formula, case.factors)
    factors = {"base": STAND_IN_LENGTH + 1}
    cases[STAND_IN] = partial(measured, stand_in, "superseded(draft, base)", factors)
    for name, case in cases.items():
        if arguments.rows not in name:
            continue
        found = case()
        speedups = found.speedups("fixed")
        row = {
            "formula": name,
            "drafted_at_a_time": found.length,
            "calls": [found.calls(mode) for mode in MODES],
            "calls_by_turn": [turn.calls / turn.tokens for turn in found.turns["fixed"]],
            "calls_of_the_small_model": [found.other_calls(mode) for mode in MODES[1:]],
            "milliseconds": [found.milliseconds(mode) for mode in MODES],
            "kept": found.kept("fixed"),
            "speedup": statistics.median(speedups),
            "speedup_auto": statistics.median(found.speedups("auto")),
            "speedup_auto_in_total": found.speedup_in_total("auto"),
            "speedup_range": [min(speedups), max(speedups)],
            "paper": PAPER.get(name.removesuffix(SUFFIXES)),
        }
        rows.append(row)
        calls, times = row["calls"], row["milliseconds"]
        paper = ""
        if row["paper"]:
            (c0, t0), (c1, t1) = row["paper"]
            paper = f"calls {c0} -> {c1}, ms {t0} -> {t1} ({t0 / t1:.2f}x)"
        print(
            f"{name:38} {calls[0]:6.3f} -> {calls[1]:5.3f} ({calls[2]:5.3f}) "
            f"{times[0]:6.1f} -> {times[1]:5.1f} ({times[2]:5.1f}) "
            f"{row['speedup']:6.2f}x {row['speedup_auto']:6.2f}, {row['speedup_auto_in_total']:5.2f}x "
            f"{row['kept']:5.2f}   {paper}",
            flush=True,
        )
    print("In brackets: drafted automatically.")
    result = {
        "benchmark": "speculation",
        "machine": platform.processor() or platform.machine(),
        "threads_wait": os.environ.get("OMP_WAIT_POLICY"),
        "tokens": arguments.tokens,
        "requests": arguments.requests,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.output:
        checks = identity(llm, {"big": made.big, "draft": made.draft}, scenario)
        arguments.output.write_text(json.dumps(result | {"checks": checks}) + "\n")


def identity(llm: Any, models: dict[str, Path], scenario: Any) -> dict[str, Any]:
    """By what another program may know that it asks the same of the same models.

    Every prompt as the engine tokenized it, and each model's log-probabilities of one text.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    prompts: list[dict[str, Any]] = []
    for system in [None, *(term["system"] for term in scenario.terms.values() if "system" in term)]:
        for user in scenario.speculation.requests:
            messages = [{"role": "user", "content": user}]
            if system:
                messages.insert(0, {"role": "system", "content": system})
            (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False)
            prompts.append({"system": system, "user": user, "tokens": list(output.prompt_token_ids)})
    text = [token for prompt in prompts for token in prompt["tokens"]][:256]
    told = {}
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            rows = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        told[name] = rows.gather(1, torch.tensor(text)[1:, None])[:, 0].tolist()
    return {"prompts": prompts, "text": text, "log_probabilities": told}


if __name__ == "__main__":
    main()

"""Formulas with and without drafts over the embedded models, measured on this machine in one run.

    python scripts/bench_speculation.py [--tokens N] [--requests N] [--repeats N] [--output FILE]

A table as the paper's (arXiv 2311.14479; Llama-2-13b-chat on a GPU): for each formula the calls of the large
model for each generated token and the milliseconds a token takes, without drafts and with them, one request
at a time, T = 1.  A call is one term's forward pass, however many positions it covers; terms of the small
model are counted apart.

Rows: n-grams that draft for the model (the paper's superseded(A, M)), attributes that lag behind these two,
two formulas of four terms, and the small embedded model as a drafter for the large one and for a formula.

The embedded large model is five times the size of the small one, and at two milliseconds a token what a
step costs beside the model counts as much.  So there is a last row for what a *large* model would gain: a
stand-in, the small model with layers behind its own that change nothing but take their time, and a sharper
head.

The ratios are taken repetition by repetition: machines drift, ratios do not.  The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ("Continue: the software is", "Write about the sea.", "What is a list?", "Go on: in this case")
ATTRIBUTES = {"legal": "write legal text", "code": "write code", "prose": "write prose"}


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: as printed; the paper's own where the paper has the row.
        formula: `m` is the large model as it is, `s` the small one, `g` n-grams.
        factors: speculative factors of the attributes.
        paper: (calls, milliseconds) a token of the paper's row, without drafts and with them.
        length: tokens drafted at a time; by default what the factors say.
    """

    name: str
    formula: str
    factors: dict[str, int]
    paper: tuple[tuple[float, float], tuple[float, float]] | None = None
    length: int | None = None


COPIED = "superseded(g, m)"  # m, which checks two copied tokens at a time

CASES = (
    Case("superseded(A, M)", COPIED, {}, ((1, 24.88), (0.801, 22.80)), 3),
    Case("+ 0.5 legal (formal)", f"{COPIED} + 0.5*legal", {"legal": 9}, ((2, 48.40), (1.035, 30.43))),
    Case("+ 0.5 code (happy)", f"{COPIED} + 0.5*code", {"code": 9}, ((2, 49.15), (1.045, 31.19))),
    Case("+ 0.5 prose (sports)", f"{COPIED} + 0.5*prose", {"prose": 9}, ((2, 49.26), (1.076, 32.00))),
    Case(
        "+ 0.2 legal + 0.5 code + 0.05 prose",
        f"{COPIED} + 0.2*legal + 0.5*code + 0.05*prose",
        {"legal": 9, "code": 9, "prose": 9},
        ((4, 97.03), (1.317, 43.26)),
    ),
    Case(
        "+ 1.0 legal + 0.1 code + 0.4 prose",
        f"{COPIED} + legal + 0.1*code + 0.4*prose",
        {"legal": 5, "code": 9, "prose": 9},
        ((4, 97.02), (1.436, 46.10)),
    ),
    Case("superseded(small, M)", "superseded(s, m)", {}, None, 4),
    Case("superseded(small, M + 0.5 legal)", "superseded(s, m + 0.5*legal)", {}, None, 4),
)


STAND_IN = Case("superseded(small, stand-in)", "superseded(s, m)", {}, None, 6)


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
    parser.add_argument("--output", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()

    from vllm_marith import Formula
    from vllm_marith.engine.group import FIGURES
    from vllm_marith.engine.offline import offline_llm
    from vllm_marith.models import ensure

    made = ensure(only=["big", "draft"])

    def engine(model: Path) -> Any:
        settings = {"constituents": {"small": str(made.draft)}, "max_speculative_tokens": 8}
        return offline_llm(
            str(model),
            additional_config={"marith": settings},
            max_num_seqs=16,
            max_model_len=512,
            kv_cache_memory_bytes=256 << 20,
        )

    llm = engine(made.big)
    stand_in = engine(make_stand_in(made.draft, Path(tempfile.mkdtemp())))
    terms: dict[str, Any] = {"g": {"model": "ngram"}, "s": {"model": "small"}}

    def run(llm: Any, case: Case, speculative: int | str, seed: int) -> tuple[float, float, float, float]:
        """(seconds, calls of the large model, calls of the small one, share of drafts kept), the first
        three for each generated token."""
        attributes: dict[str, Any] = {name: {"system": system} for name, system in ATTRIBUTES.items()}
        attributes["m"] = {"speculative_factor": 3 if case.factors else 1}
        for name, factor in case.factors.items():
            attributes[name]["speculative_factor"] = factor
        formula = Formula.parse(case.formula, terms | attributes)
        llm.collective_rpc(FIGURES)
        start = time.perf_counter()
        count = 0
        for place in range(arguments.requests):
            params = formula.sampling_params(
                speculative=speculative,
                temperature=1.0,
                max_tokens=arguments.tokens,
                ignore_eos=True,
                detokenize=False,
            )
            # Prompts of their own: what is cached is the same for both sides.
            asked = f"{seed} {PROMPTS[place % len(PROMPTS)]}"
            (output,) = llm.chat([{"role": "user", "content": asked}], params, use_tqdm=False)
            count += len(output.outputs[0].token_ids)
        seconds = time.perf_counter() - start
        core, worker = llm.collective_rpc(FIGURES)
        drafted, accepted = (sum(n for _, n in core[name]) for name in ("drafted", "accepted"))
        calls = {"base": 0, "small": 0}
        for (_, model), number in [*core["calls"], *worker["calls"]]:
            calls[model] += number
        kept = accepted / drafted if drafted else 0.0
        return seconds / count, calls["base"] / count, calls["small"] / count, kept

    rows = []
    print(f"{'formula':38} {'calls of M / token':>22} {'ms / token':>20} {'faster':>7} {'kept':>5}   paper")
    for case in (*CASES, STAND_IN):
        served = stand_in if case is STAND_IN else llm
        how = case.length or max(case.factors.values()) - 1
        pairs = [
            (run(served, case, "off", seed), run(served, case, how, seed), run(served, case, "auto", seed))
            for seed in range(arguments.repeats + 1)
        ][1:]  # the first warms up, and lets "auto" find out
        off, fixed, auto = (list(zip(*(pair[k] for pair in pairs), strict=True)) for k in range(3))
        row = {
            "formula": case.name,
            "drafted_at_a_time": how,
            "calls": [statistics.mean(off[1]), statistics.mean(fixed[1]), statistics.mean(auto[1])],
            "calls_of_the_small_model": [statistics.mean(fixed[2]), statistics.mean(auto[2])],
            "milliseconds": [1e3 * statistics.median(side[0]) for side in (off, fixed, auto)],
            "kept": statistics.mean(fixed[3]),
            "speedup": statistics.median(a[0] / b[0] for a, b, _ in pairs),
            "speedup_auto": statistics.median(a[0] / c[0] for a, _, c in pairs),
            "speedup_range": [f(a[0] / b[0] for a, b, _ in pairs) for f in (min, max)],
            "paper": case.paper,
        }
        rows.append(row)
        calls, times = row["calls"], row["milliseconds"]
        paper = ""
        if case.paper:
            (c0, t0), (c1, t1) = case.paper
            paper = f"calls {c0} -> {c1}, ms {t0} -> {t1} ({t0 / t1:.2f}x)"
        print(
            f"{case.name:38} {calls[0]:6.3f} -> {calls[1]:5.3f} ({calls[2]:5.3f}) "
            f"{times[0]:6.1f} -> {times[1]:5.1f} ({times[2]:5.1f}) "
            f"{row['speedup']:5.2f}x {row['kept']:5.2f}   {paper}"
        )
    print("In brackets: drafted automatically.")
    result = {
        "benchmark": "speculation",
        "machine": platform.processor() or platform.machine(),
        "tokens": arguments.tokens,
        "requests": arguments.requests,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    print(json.dumps(result))
    if arguments.output:
        arguments.output.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

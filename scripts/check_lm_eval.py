#!/usr/bin/env python
"""lm-evaluation-harness on a formula: `python scripts/check_lm_eval.py --lm-eval PATH`.

Serves a model with a preset of its own, has `lm_eval --model local-completions` score a small task of local
data under the preset's name, with no special arguments, and compares every log-likelihood with Hugging Face
transformers in float32.  lm_eval is not part of this project's environment; install it in one of its own.

Exit code: 0 equal to 1e-3, 1 not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' server and reference

from transformers import AutoTokenizer

from tests.support import reference, server
from vllm_marith import Formula
from vllm_marith.models import ensure

HEADING = "License terms and conditions"
FORMULA = "base + 0.5*(heading - base)"
TOLERANCE = 1e-3
QUESTIONS = {
    "The software is provided": [" as is, without warranty", " in the loop of list", " def return self"],
    "def add(a, b):\n    return": [" a + b", " the licence shall", " of the following text"],
    "Permission is hereby granted, free of": [" charge, to any person", " the list of values", " import os"],
}
TASK = """
task: formula
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lm-eval", default="lm_eval", help="the command (default: lm_eval on the PATH)")
    parser.add_argument("--model", type=Path, help="a model's folder (default: the embedded model `big`)")
    arguments = parser.parse_args()
    model = arguments.model or ensure(only=["big"]).big
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "lean.yaml").write_text(
            f"description: Lean.\npaper: none\nterms:\n  heading: {{system: {HEADING}}}\nformula: {FORMULA}\n"
        )
        rows = [{"question": question, "choices": choices} for question, choices in QUESTIONS.items()]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "tasks").mkdir()
        (folder / "tasks" / "formula.yaml").write_text(TASK.replace("DATA", str(folder / "data.jsonl")))
        with server.serve(model, folder / "log", {"presets": str(folder)}) as url:
            asked = f"model=lean,base_url={url}/v1/completions,tokenizer={model},max_length=512"
            subprocess.run(
                [
                    *(arguments.lm_eval, "--model", "local-completions", "--model_args", asked),
                    *("--tasks", "formula", "--include_path", str(folder / "tasks")),
                    *("--output_path", str(folder / "out"), "--log_samples"),
                ],
                check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
            )
        (samples,) = (folder / "out").glob("**/samples_*.jsonl")
        worst = max(_difference(model, json.loads(line)) for line in samples.read_text().splitlines())
    print(f"largest difference of {sum(map(len, QUESTIONS.values()))} log-likelihoods: {worst:.2g}")
    return 0 if worst < TOLERANCE else 1


def _difference(model: Path, sample: dict) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = tokenizer.encode(f"{HEADING}\n")
    differences = []
    for asked, answer in zip(sample["arguments"].values(), sample["resps"], strict=True):
        context, choice = asked["arg_0"], asked["arg_1"]
        ids = tokenizer.encode(context + choice, add_special_tokens=False)
        number = len(ids) - len(tokenizer.encode(context, add_special_tokens=False))
        prompts = {"base": ids, "heading": [*before, *ids]}
        rows = reference.scores(str(model), Formula.parse(FORMULA), prompts, len(ids) - 1)
        wanted = sum(float(row[token]) for row, token in list(zip(rows, ids[1:], strict=True))[-number:])
        differences.append(abs(wanted - float(answer[0][0])))
    return max(differences)


if __name__ == "__main__":
    sys.exit(main())

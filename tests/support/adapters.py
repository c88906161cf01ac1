"""Random LoRA adapters as PEFT would write them, and the models that they make, merged, for the reference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import exactness, reference
from vllm_marith import Formula

RANK = 4
SCALE = 2.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@torch.no_grad()
def make(base: Path, path: Path, *, seed: int, strength: float = 0.25, head: bool = False) -> Path:
    """An adapter of every linear layer of the model at `base`.

    strength: size of each layer's change in proportion to its weights.
    head: whether it changes the embedding and the head, too.
    """
    if (path / "adapter_config.json").exists():
        return path
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = TARGETS + ("embed_tokens", "lm_head") * head
    tensors = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf not in targets:
            continue
        out, into = module.weight.shape if leaf != "embed_tokens" else module.weight.shape[::-1]
        down = torch.randn(RANK, into, generator=generator)
        up = torch.randn(out, RANK, generator=generator)
        up *= strength * module.weight.std() / (SCALE * RANK**0.5)
        halves = ("embedding_A", "embedding_B") if leaf == "embed_tokens" else ("A.weight", "B.weight")
        for half, tensor in zip(halves, (down, up), strict=True):
            tensors[f"base_model.model.{name}.lora_{half}"] = tensor
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": SCALE * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "base_model_name_or_path": str(base),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@torch.no_grad()
def merge(base: Path, adapter: Path, path: Path) -> Path:
    """A model whose weights are the base's plus the adapter's, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = {
        name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    merged = 0
    for name, module in model.named_modules():
        prefix = f"base_model.model.{name}.lora_"
        if f"{prefix}A.weight" in tensors:
            module.weight += scale * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
            merged += 2
        elif f"{prefix}embedding_A" in tensors:
            module.weight += scale * (tensors[f"{prefix}embedding_B"] @ tensors[f"{prefix}embedding_A"]).T
            merged += 2
    assert merged == len(tensors), "an adapter of layers that this model does not have"
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Job:
    """One request.

    formula: None for a plain one.
    own: the adapter that the request itself names, as vLLM's requests do.
    """

    text: str
    formula: str | None = None
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: str | None = None

    @property
    def parsed(self) -> Formula:
        return Formula.parse(self.formula or "base", self.terms)


def expected(models: Mapping[str, str], job: Job, length: int) -> reference.Reference:
    """The greedy continuation.

    models: adapter -> merged model, constituent -> model, and the base model as "base".
    """
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    formula = job.parsed
    heads = {name: f"{t.system}\n" if t.system else "" for name, t in formula.terms.items()}
    ids = {name: tokenizer(head + job.text).input_ids for name, head in heads.items()}
    paths = {name: models[t.adapter or t.model or job.own or "base"] for name, t in formula.terms.items()}
    return reference.generate(paths, formula, ids, length)


def requests(paths: Mapping[str, str], bases: Mapping[str, str] | None = None) -> dict[str, Any]:
    """vLLM's requests for adapters, by name; bases: adapter -> its ``base_model_name``."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(name, number, path, (bases or {}).get(name))
        for number, (name, path) in enumerate(paths.items(), 1)
    }


def load(llm: Any, paths: Mapping[str, str], bases: Mapping[str, str] | None = None) -> None:
    """Gives adapters to an engine, as a Python user does."""
    for adapter in requests(paths, bases).values():
        llm.llm_engine.add_lora(adapter)


def generate(llm: Any, jobs: Sequence[Job], paths: Mapping[str, str], length: int) -> list[exactness.Answer]:
    """Greedy answers of `length` tokens."""
    from vllm import SamplingParams

    asked = dict(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)
    known = requests(paths)
    outputs = llm.generate(
        [job.text for job in jobs],
        [job.parsed.sampling_params(**asked) if job.formula else SamplingParams(**asked) for job in jobs],
        lora_request=[known[job.own] if job.own else None for job in jobs],
        use_tqdm=False,
    )
    return [exactness.answers_of(output)[0] for output in outputs]

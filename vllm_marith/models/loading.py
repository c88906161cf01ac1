"""Reading made models back with transformers, without the bars that it draws for files of megabytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging


def load_llama(folder: Path | str) -> LlamaForCausalLM:
    """The Llama saved in `folder`, in float32, ready to evaluate."""
    with quiet_transformers():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`: every made language model's folder holds it."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

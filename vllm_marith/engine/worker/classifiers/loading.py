"""A worker's classifiers: loaded once, beside the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.tokenizers.registry import cached_tokenizer_from_config

from ...settings import Settings
from ..figures import FIGURES
from .model import Classifier
from .rows import ClassifierRows
from .text import CandidateTexts

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


def load_classifiers(vllm_config: VllmConfig, device: torch.device) -> ClassifierRows | None:
    """All classifiers of the server's settings, or None where there are none.

    Every rank of a tensor-parallel group loads and runs all of them.  The ranks then compute the same rows
    because they read the same texts in the same order on devices of one kind, as they already rely on to
    sample the same tokens from the same logits.

    Raises:
        ClassifierError: one sentence that names the classifier.
    """
    settings = Settings.of(vllm_config)
    if not settings.classifiers:
        return None
    classifiers = {}
    for name, entry in settings.classifiers.items():
        classifier = classifiers[name] = Classifier(name, entry, device)
        classifier.check()
        logger.info(
            "marith: classifier '%s' (%s) on %s reads %d tokens and knows %s",
            *(name, entry.path, classifier.device),
            *(classifier.card.max_length, ", ".join(classifier.card.labels)),
        )
    FIGURES.classifiers = {name: classifier.figures for name, classifier in classifiers.items()}
    return ClassifierRows(classifiers, CandidateTexts(cached_tokenizer_from_config(vllm_config.model_config)))

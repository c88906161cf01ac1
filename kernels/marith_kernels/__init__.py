"""The fusion operation of language-model arithmetic: many rows of logits in, one row a formula out.

Depends on torch; uses numba on CPUs and triton on GPUs where they are installed.
"""

from .backends import DECODING_BACKENDS, FUSE_BACKENDS
from .batch import Batch
from .decoding import Sampled, Verified, residual, sample, verify
from .fusion import Extra, Fused, fuse, warmup
from .pipeline import Pipeline, Stage
from .program import MAX_DEPTH, NUMBER, OPS, UNIFORM, Instruction, Program
from .staged import External, StagedBatch

__all__ = [
    "DECODING_BACKENDS",
    "FUSE_BACKENDS",
    "MAX_DEPTH",
    "NUMBER",
    "OPS",
    "UNIFORM",
    "Batch",
    "External",
    "Extra",
    "Fused",
    "Instruction",
    "Pipeline",
    "Program",
    "Sampled",
    "Stage",
    "StagedBatch",
    "Verified",
    "fuse",
    "residual",
    "sample",
    "verify",
    "warmup",
]

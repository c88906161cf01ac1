"""The fusion operation of language-model arithmetic: many rows of logits in, one row a formula out.

Depends on torch; uses numba on CPUs and triton on GPUs where they are installed.
"""

from .backends import DECODING_BACKENDS, FUSE_BACKENDS
from .decoding import Sampled, Verified, residual, sample, verify
from .fusion import Fused, fuse, warmup
from .program import MAX_DEPTH, OPS, Batch, Instruction, Program

__all__ = [
    "DECODING_BACKENDS",
    "FUSE_BACKENDS",
    "MAX_DEPTH",
    "OPS",
    "Batch",
    "Fused",
    "Instruction",
    "Program",
    "Sampled",
    "Verified",
    "fuse",
    "residual",
    "sample",
    "verify",
    "warmup",
]

"""The fusion operation of language-model arithmetic: many rows of logits in, one row a formula out.

Depends on torch; uses numba on CPUs and triton on GPUs where they are installed.
"""

from .fusion import BACKENDS, Fused, fuse, warmup
from .program import MAX_DEPTH, OPS, Batch, Instruction, Program

__all__ = ["BACKENDS", "MAX_DEPTH", "OPS", "Batch", "Fused", "Instruction", "Program", "fuse", "warmup"]

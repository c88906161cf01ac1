"""From a formula to the program that a worker runs.  Pure Python; of ours it imports only `language`."""

from vllm_marith.plan.lowering import lower
from vllm_marith.plan.program import NO_ROW, UNIFORM_ROW, Instruction, Plan, Stage
from vllm_marith.plan.speculation import Level, Speculation, best_length, cost_of_a_token, partial, speculate
from vllm_marith.plan.wire import Routine, decode, encode, without_rows

__all__ = [
    "NO_ROW",
    "UNIFORM_ROW",
    "Instruction",
    "Level",
    "Plan",
    "Routine",
    "Speculation",
    "Stage",
    "best_length",
    "cost_of_a_token",
    "decode",
    "encode",
    "lower",
    "partial",
    "speculate",
    "without_rows",
]

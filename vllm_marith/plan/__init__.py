"""From a formula to the program that a worker runs.  Pure Python; of ours it imports only `language`."""

from vllm_marith.plan.program import NO_TERM, Instruction, Plan, lower

__all__ = ["NO_TERM", "Instruction", "Plan", "lower"]

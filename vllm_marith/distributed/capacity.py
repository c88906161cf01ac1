"""How many formulas a cluster carries, on paper.

One engine holds the weights of its models and, in what memory is left, the KV cache.  A *group* is one
request with a formula: M members, of which each has a row in every step and its own blocks.

    bytes of KV of a token          t_m  =  2 * layers * KV heads * head size * bytes of a number
    groups that the cache holds     G_kv =  (blocks - 1) // sum over members of ceil(L / block size)
    groups that a step has rows for G_rows = max_num_seqs // M
    a step of G groups              s(G) =  overhead + max(bytes read / bandwidth, flops / arithmetic)
    bytes read                      weights of every model used + G * sum over members of t_m * context
    a request's prompts             p    =  flops of the members' prompts / arithmetic
    requests a second of an engine  q(G) =  G / (answer * s(G) + G * p)

q is what G requests at a time give when prompts and steps take turns on one device: each request needs
`answer` steps, which it shares with G - 1 others, and its own prompts, which it shares with nobody.
Everything here is arithmetic on plain numbers; it knows neither Ray nor vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .errors import DeploymentError

GB = 10**9


@dataclass(frozen=True)
class Device:
    """A GPU as its datasheet has it: bytes, bytes a second, dense 16-bit operations a second."""

    name: str
    memory: float
    bandwidth: float
    arithmetic: float


DEVICES = {
    device.name: device
    for device in (
        Device("L4", 24 * GB, 300 * GB, 121e12),
        Device("L40S", 48 * GB, 864 * GB, 362e12),
        Device("A100-40GB", 40 * GB, 1555 * GB, 312e12),
        Device("A100-80GB", 80 * GB, 2039 * GB, 312e12),
        Device("H100", 80 * GB, 3350 * GB, 989e12),
        Device("H200", 141 * GB, 4800 * GB, 989e12),
    )
}
"""From NVIDIA's datasheets (SXM where there are several; no sparsity); nothing of it was measured here."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a model.

    Attributes:
        name: for people.
        token_bytes: keys and values of one token in all layers.
        weight_bytes: all weights; a step is taken to read all of them once.
        parameters: numbers that a token is multiplied with, twice as many operations.
        kv_heads: ranks beyond that many hold copies of the heads.
    """

    name: str
    token_bytes: int
    weight_bytes: int
    parameters: int
    kv_heads: int

    def token_bytes_of_rank(self, ranks: int) -> int:
        """Of one tensor-parallel rank: each has at least one KV head."""
        return self.token_bytes // self.kv_heads * math.ceil(self.kv_heads / ranks)


@dataclass(frozen=True)
class StepTime:
    """A step as measured: seconds, and seconds a row."""

    fixed: float
    row: float

    def __call__(self, rows: int) -> float:
        return self.fixed + self.row * rows

    @classmethod
    def fitted(cls, rows: Sequence[int], seconds: Sequence[float]) -> StepTime:
        """Least squares of the *relative* error, so that short steps count as much as long ones.

        Raises:
            ValueError: fewer than two different numbers of rows.
        """
        if len(set(rows)) < 2:
            raise ValueError("a line needs steps of at least two different sizes")
        # Minimise sum ((a + b r - s) / s)^2: the normal equations with weights 1 / s^2.
        weights = [1 / second**2 for second in seconds]
        w, wr, wrr, ws, wrs = (
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in (
                [1.0] * len(rows),
                rows,
                [r * r for r in rows],
                seconds,
                [r * s for r, s in zip(rows, seconds, strict=True)],
            )
        )
        slope = (w * wrs - wr * ws) / (w * wrr - wr * wr)
        return cls((ws - slope * wr) / w, slope)

    def tokens_a_second(self, groups: int, members: int) -> float:
        """Of answers, when so many groups of so many members step together."""
        return groups / self(groups * members)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed and not known.

    Attributes:
        efficiency: share of the datasheet's bandwidth and arithmetic that is reached.
        memory_share: of a device's memory that vLLM takes, its `--gpu-memory-utilization`.
        activations: bytes of a device that are neither weights nor KV cache.
        overhead: seconds of a step that depend on nothing.
        max_num_seqs: rows of a step.
        block_size: tokens in a block.
    """

    efficiency: float = 0.6
    memory_share: float = 0.9
    activations: float = 4 * GB
    overhead: float = 2e-3
    max_num_seqs: int = 256
    block_size: int = 16


@dataclass(frozen=True)
class Load:
    """What is asked: requests a second, tokens of each member's prompt, tokens of an answer."""

    qps: float
    prompt: int
    answer: int

    @property
    def length(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Engine:
    """One replica, computed.

    Attributes:
        ranks: devices of the engine.
        kv_groups, row_groups: groups at a time that the cache holds, and that a step has rows for.
        step: seconds of a step with as many groups as there can be.
        prompts: seconds of one request's prompts.
        qps: requests a second at most.
        tokens: of answers a second, then.
        bottleneck: what more of would help.
    """

    ranks: int
    kv_groups: int
    row_groups: int
    step: float
    prompts: float
    qps: float
    tokens: float
    bottleneck: str

    @property
    def groups(self) -> int:
        return min(self.kv_groups, self.row_groups)


def groups_that_fit(blocks: int, length: int, block_sizes: Sequence[int]) -> int:
    """Groups of `length` tokens in a pool of `blocks`, of which vLLM keeps one for itself.

    block_sizes: tokens in a block, of each member's model.
    """
    return (blocks - 1) // sum(math.ceil(length / size) for size in block_sizes)


def pool_blocks(room: float, token_bytes: int, block_size: int) -> int:
    """Blocks in so many bytes, for the model whose tokens are largest."""
    return int(room // (token_bytes * block_size))


def engine(
    members: Sequence[Model], device: Device, ranks: int, load: Load, given: Assumptions
) -> Engine | None:
    """One engine of `ranks` devices; None where the models or one group do not fit.

    members: the model of each member.
    """
    models = {model.name: model for model in members}.values()
    weights = sum(model.weight_bytes for model in models)
    room = device.memory * given.memory_share - given.activations - weights / ranks
    tokens = {model.name: model.token_bytes_of_rank(ranks) for model in models}
    largest = max(tokens.values())
    blocks = pool_blocks(max(room, 0), largest, given.block_size)
    sizes = [given.block_size * (largest // tokens[model.name]) for model in members]
    kv_groups = groups_that_fit(blocks, load.length, sizes) if blocks > 1 else 0
    if not kv_groups:
        return None
    row_groups = given.max_num_seqs // len(members)
    groups = min(kv_groups, row_groups)
    if not groups:
        return None
    bandwidth = device.bandwidth * given.efficiency
    arithmetic = device.arithmetic * given.efficiency * ranks
    operations = 2 * sum(model.parameters for model in members)  # of one token of a group
    context = load.prompt + load.answer / 2
    cache = groups * sum(tokens[model.name] for model in members) * context
    reading, reckoning = (weights / ranks + cache) / bandwidth, groups * operations / arithmetic
    step = given.overhead + max(reading, reckoning)
    prompts = load.prompt * operations / arithmetic
    qps = groups / (load.answer * step + groups * prompts)
    if qps * prompts > 0.5:
        bottleneck = "arithmetic, in prompts"
    elif max(reading, reckoning) < given.overhead:
        bottleneck = "overhead of steps"
    elif reckoning > reading:
        bottleneck = "arithmetic, in steps"
    elif cache > weights / ranks:
        bottleneck = "bandwidth, reading the KV cache"
    elif kv_groups < row_groups:
        bottleneck = "memory for the KV cache"  # more groups would share the reading of the weights
    else:
        bottleneck = "rows of a step (--max-num-seqs)"
    return Engine(ranks, kv_groups, row_groups, step, prompts, qps, qps * load.answer, bottleneck)


@dataclass(frozen=True)
class Plan:
    """Engines of one size on the whole cluster.

    Attributes:
        replicas: engines.
        engine: each of them.
        low, high: requests a second of all, if the efficiency were a third less, or more (at most 0.95).
    """

    replicas: int
    engine: Engine
    low: float
    high: float

    @property
    def qps(self) -> float:
        return self.replicas * self.engine.qps

    @property
    def tokens(self) -> float:
        return self.replicas * self.engine.tokens


SPREAD = 1 / 3
"""How far off the efficiency may be, of itself; a guess, and said to be one."""


def plans(members: Sequence[Model], device: Device, gpus: int, load: Load, given: Assumptions) -> list[Plan]:
    """Every division of the cluster into engines of 1, 2, 4, ... devices that holds the models.

    Ranks divide the KV heads of every model, or are a multiple of them, as tensor parallelism needs it.

    Raises:
        DeploymentError: none does.
    """
    found = []
    for ranks in (2**i for i in range(gpus.bit_length())):
        if any(model.kv_heads % ranks and ranks % model.kv_heads for model in members):
            continue
        one, low, high = (
            engine(members, device, ranks, load, replace(given, efficiency=efficiency))
            for efficiency in (
                given.efficiency,
                given.efficiency * (1 - SPREAD),
                min(0.95, given.efficiency * (1 + SPREAD)),
            )
        )
        if one is not None and low is not None and high is not None:
            replicas = gpus // ranks
            found.append(Plan(replicas, one, replicas * low.qps, replicas * high.qps))
    if not found:
        whole = sum(model.weight_bytes for model in {model.name: model for model in members}.values())
        raise DeploymentError(
            f"{whole / GB:.1f} GB of weights and one group of {load.length} tokens do not fit "
            f"{gpus} x {device.name}"
        )
    return found


def suggested(found: Sequence[Plan], load: Load) -> Plan:
    """The smallest engines that carry the load even at the low end; else at all; else what carries most."""
    for enough in (
        [plan for plan in found if plan.low >= load.qps],
        [plan for plan in found if plan.qps >= load.qps],
    ):
        if enough:
            return enough[0]
    return max(found, key=lambda plan: plan.qps)

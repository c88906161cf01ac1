"""Pipelines for the tests, and what a run of them is held to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import strategies as st
from marith_kernels import UNIFORM, Fused, Pipeline, Program, Stage, StagedBatch

from . import definition
from .cases import DTYPES

CLOSE = 2e-4  # a filter's decision closer than this may fall either way in float32


def fuse_stage(
    *steps: tuple[str, int, float], weightless: tuple[int, ...] = (), divide: bool = False
) -> Stage:
    return Stage("fuse", Program(steps, weightless=weightless, divide=divide))


A, B, C = ("push", 0, 1.0), ("push", 1, 1.0), ("push", 2, 1.0)
TERM = Pipeline(1, (fuse_stage(A),))
SUM = Pipeline(3, (fuse_stage(("push", 0, 1.5), ("add", 1, -0.25), ("add", 2, -0.25)),))
NAMED = {
    "term": TERM,
    "sum": SUM,
    "self_debias(a, b, 10)": Pipeline(2, (fuse_stage(A, ("debias", 1, 10.0)),)),
    "mixture(0.5: a, 0.5: b)": Pipeline(2, (fuse_stage(A, ("logadd", 1, 1.0)),)),
    "normalize(a - 0.6b) + c": Pipeline(
        3, (fuse_stage(("push", 0, 2.5), ("add", 1, -1.5)), fuse_stage(("push", 3, 1.0), ("add", 2, 1.0)))
    ),
    "union(normalize(2a - b), c)": Pipeline(
        3, (fuse_stage(("push", 0, 2.0), ("add", 1, -1.0)), fuse_stage(("push", 3, 1.0), ("max", 2, 1.0)))
    ),
    "a - 0.9 * indicator(b - a) * (b - a)": Pipeline(
        2,
        (
            fuse_stage(
                A, B, ("add", 0, -1.0), B, ("add", 0, -1.0), ("pop_gate", -1, 1.0), ("pop_add", -1, -0.9)
            ),
        ),
    ),
    "topk(a + 0.5b, 5)": Pipeline(2, (Stage("top_k", Program([A, ("add", 1, 0.5)]), (5,)),)),
    "topp(max(a, b), 0.7)": Pipeline(2, (Stage("top_p", Program([A, ("max", 1, 1.0)]), (0.7,)),)),
    "topp(topk(a, 7), 0.6) + b": Pipeline(
        2,
        (
            Stage("top_k", Program([A]), (7,)),
            Stage("top_p", Program([("push", 2, 1.0)]), (0.6,)),
            fuse_stage(("push", 3, 1.0), ("add", 1, 1.0)),
        ),
    ),
    "plausible(a - b, a, 0.1)": Pipeline(
        2,
        (
            Stage("plausible", parameters=(0.1,), sources=(0,)),
            fuse_stage(A, ("add", 1, -1.0), ("add", 2, 1.0), weightless=(2,)),
        ),
    ),
    "kl_indicator(b, a) * b + a": Pipeline(
        2,
        (
            Stage("kl_indicator", parameters=(0.01, True, False, 4), sources=(1, 0)),
            fuse_stage(A, ("push", 2, 1.0), B, ("pop_gate", -1, 0.8), ("pop_add", -1, 1.0), weightless=(2,)),
        ),
    ),
    "(a + 0.5 kl_indicator(normalize(a + b), a) * b) / N": Pipeline(
        2,
        (
            fuse_stage(("push", 0, 0.5), ("add", 1, 0.5)),
            Stage("kl_indicator", parameters=(0.02, False, True, 0), sources=(2, 0)),
            fuse_stage(
                A,
                ("push", 3, 1.0),
                B,
                ("pop_gate", -1, 0.5),
                ("pop_add", -1, 1.0),
                weightless=(3,),
                divide=True,
            ),
        ),
    ),
    "a + classifier": Pipeline(
        1,
        (
            Stage("external", sources=(0,), weightless=True),
            fuse_stage(A, ("add", 1, 0.04), weightless=(1,), divide=True),
        ),
    ),
    "mixture(a, other model after topk(b, 3), uniform)": Pipeline(
        2,
        (
            Stage("top_k", Program([B]), (3,)),
            Stage("external", sources=(2,)),
            fuse_stage(A, ("logadd", 3, 0.5), ("logadd", UNIFORM, 0.1)),
        ),
    ),
}


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Up to five stages of every kind over up to three terms, of programs that rounding does not amplify."""
    n_terms = draw(st.integers(1, 3))
    stages: list[Stage] = []
    for s in range(draw(st.integers(0, 4)) + 1):
        is_last = len(stages) == s and s == 4
        energies = [n_terms + i for i, stage in enumerate(stages) if stage.weightless]
        distributions = [leaf for leaf in range(n_terms + s) if leaf not in energies]
        kinds = ["fuse", "top_k", "top_p"]
        kinds += [] if is_last else ["plausible", "kl_indicator", "external"]
        kind = draw(st.sampled_from(kinds))
        leaf = st.sampled_from(distributions)
        if kind == "plausible":
            stages.append(Stage(kind, None, (draw(st.sampled_from([0.05, 0.5])),), (draw(leaf),)))
        elif kind == "kl_indicator":
            flags = draw(st.booleans()), draw(st.booleans())
            parameters = (draw(st.sampled_from([0.01, 0.05])), *flags, draw(st.sampled_from([0, 3])))
            stages.append(Stage(kind, None, parameters, (draw(leaf), draw(leaf))))
        elif kind == "external":
            stages.append(Stage(kind, sources=(draw(leaf),), weightless=draw(st.booleans())))
        else:
            parameters = {"fuse": (), "top_k": (draw(st.integers(1, 9)),), "top_p": (0.8,)}[kind]
            stages.append(Stage(kind, draw(small_programs(distributions, energies)), parameters))
    if stages[-1].weightless or stages[-1].kind == "external":
        energies = [n_terms + i for i, stage in enumerate(stages) if stage.weightless]
        distributions = [leaf for leaf in range(n_terms + len(stages)) if leaf not in energies]
        stages.append(Stage("fuse", draw(small_programs(distributions, energies))))
    return Pipeline(n_terms, tuple(stages))


@st.composite
def small_programs(draw: st.DrawFn, distributions: list[int], energies: list[int]) -> Program:
    leaf = st.sampled_from([*distributions, UNIFORM])
    weight = st.sampled_from([1.0, 0.5, -0.5, 2.0])
    steps = [("push", draw(st.sampled_from(distributions)), 1.0)]
    for _ in range(draw(st.integers(0, 3))):
        op = draw(st.sampled_from(["add", "max", "min", "logadd", "debias", "gate", "energy"]))
        if op == "gate":
            gate = draw(st.sampled_from(energies or distributions))
            steps += [("push", gate, 1.0), ("push", draw(leaf), 1.0)]
            steps += [("pop_gate", -1, draw(weight)), ("pop_add", -1, 0.5)]
        elif op == "energy":
            steps += [("add", t, 1.0) for t in energies[-1:]]
        else:
            steps.append((op, draw(leaf), abs(draw(weight)) if op in ("logadd", "debias") else draw(weight)))
    return Program(steps, weightless=energies)


@dataclass(frozen=True)
class Step:
    """The groups of one step; printed by hypothesis when it fails."""

    formulas: tuple[Pipeline, ...]
    vocab_size: int
    dtype: torch.dtype
    seed: int
    padding: int = 0
    masked: float = 0.2  # share of the tokens that a term forbids

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        n_rows = sum(f.n_terms for f in self.formulas) + 1
        logits = torch.randn(n_rows, self.vocab_size + self.padding, generator=generator) * 3
        forbidden = torch.rand(logits.shape, generator=generator) < self.masked
        forbidden[:, 0] = False
        logits = logits.masked_fill(forbidden, -math.inf).to(self.dtype)
        logits[:, self.vocab_size :] = 1e4
        return logits

    def rows(self) -> list[list[int]]:
        order = (
            np.random.default_rng(self.seed).permutation(sum(f.n_terms for f in self.formulas) + 1).tolist()
        )
        return [[order.pop() for _ in range(f.n_terms)] for f in self.formulas]

    def wanted(self) -> list[definition.Result]:
        terms = self.logits()[:, : self.vocab_size].double().numpy()
        wanted = []
        for g, (formula, rows) in enumerate(zip(self.formulas, self.rows(), strict=True)):
            which = [s for s, stage in enumerate(formula.stages) if stage.kind == "external"]
            external = {s: self.external_row(g, s).double().numpy() for s in which}
            wanted.append(definition.pipeline(formula, terms[rows], external))
        return wanted

    def decided(self) -> Step:
        """This step, or one like it of another seed, where no filter's decision is close."""
        for seed in range(self.seed, self.seed + 1000):
            step = replace(self, seed=seed)
            if all(want.margin > CLOSE for want in step.wanted()):
                return step
        raise AssertionError("A decision is close whatever the seed.")

    def external_row(self, group: int, stage: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + 100 * group + stage)
        return torch.randn(self.vocab_size, generator=generator)


steps = st.builds(
    Step,
    st.lists(pipelines(), min_size=1, max_size=4).map(tuple),
    vocab_size=st.sampled_from([2, 17, 40, 130]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    padding=st.sampled_from([0, 3]),
    masked=st.sampled_from([0.0, 0.2, 0.7]),
)


def check_step(step: Step, backend: str, device: str = "cpu") -> bool:
    """Hold a run to the definition, and what an external stage is shown too. False if a decision is close."""
    wanted = step.wanted()
    if any(want.margin <= CLOSE for want in wanted):
        return False
    logits, rows = step.logits(), step.rows()
    terms = logits[:, : step.vocab_size].double().numpy()
    shown = []

    def external_stages(which, source_logits, source_lse, out):
        assert source_logits.dtype == out.dtype == torch.float32
        assert source_logits.shape == out.shape == (len(which), step.vocab_size)
        shown.extend(which)
        for i, (g, s) in enumerate(which):
            formula, row = step.formulas[g], source_logits[i].double().cpu().numpy()
            assert abs(source_lse[i].cpu() - definition.log_sum_exp(row)) < 1e-4
            source = formula.stages[s].sources[0]
            if source < formula.n_terms:
                assert np.array_equal(row, terms[rows[g][source]]), "a term is shown as it is"
            out[i] = step.external_row(g, s)
        return torch.logsumexp(out, -1)

    batch = StagedBatch.build(step.formulas, rows, device)
    out = torch.full((len(step.formulas), step.vocab_size + 2), math.nan, device=device)
    on_device = batch.run(
        logits.to(device), vocab_size=step.vocab_size, external=external_stages, out=out, backend=backend
    )
    fused = Fused(*(part.cpu() for part in on_device))
    assert sorted(shown) == [
        (g, s)
        for g, f in enumerate(step.formulas)
        for s, stage in enumerate(f.stages)
        if stage.kind == "external"
    ]
    assert torch.all(fused.logits[:, step.vocab_size :] == -math.inf)
    for g, want in enumerate(wanted):
        row = fused.logits[g, : step.vocab_size].double().numpy()
        assert not np.isnan(row).any()
        np.testing.assert_allclose(row, want.row, rtol=2e-5, atol=1e-4, err_msg=f"group {g}")
        if (row == -np.inf).all():
            assert fused.lse[g] == 0
            assert fused.argmax[g] == 0
        else:
            assert fused.argmax[g] == row.argmax()
            assert abs(fused.lse[g] - definition.log_sum_exp(row)) < 1e-4
    return True

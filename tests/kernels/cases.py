"""Logits and programs for the fusion operation, and what a backend's answer is held to. Needs torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from marith_kernels import Batch, Fused, Program, fuse
from marith_kernels.reference import energies, log_sum_exp

TOLERANCE = 2e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# around the chunks of the CPU backend and the blocks of the GPU backend, and GPT-2's
VOCAB_SIZES = (1, 2, 17, 255, 1000, 1024, 2047, 2048, 2049, 5003, 8192, 16385, 50257)


@dataclass(frozen=True)
class Case:
    """Everything that decides one call of `fuse`; printed by hypothesis when it fails."""

    programs: tuple[Program, ...]
    vocab_size: int
    dtype: torch.dtype
    seed: int
    scale: float = 5.0  # spread of the logits
    padding: int = 0  # columns beyond vocab_size, filled with a large number that must not count
    gap: int = 0  # further columns between two rows: a stride wider than the row
    masked: float = 0.3  # share of the rows with a span of -inf
    empty: float = 0.1  # share of the rows of nothing but -inf

    def logits(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        n_rows = sum(p.n_terms or 1 for p in self.programs) + 1
        width = self.vocab_size + self.padding
        wide = torch.randn(n_rows, width + self.gap, generator=generator).mul_(self.scale).to(self.dtype)
        logits = wide[:, :width]
        for row in logits:
            kind = torch.rand((), generator=generator).item()
            if kind < self.empty:
                row[:] = -math.inf
            elif kind < self.empty + self.masked:
                a, b = torch.randint(0, self.vocab_size + 1, (2,), generator=generator).sort().values
                row[a:b] = -math.inf
        wide[:, self.vocab_size :] = 1e4
        return logits

    def batch(self, device: str = "cpu") -> Batch:
        generator = torch.Generator().manual_seed(self.seed + 1)
        n_rows = sum(p.n_terms or 1 for p in self.programs) + 1
        shuffled = torch.randperm(n_rows, generator=generator).tolist()
        rows = []
        for program in self.programs:
            rows.append([shuffled.pop() for _ in range(program.n_terms or 1)])
        return Batch.build(self.programs, rows, device)


class Magnitude(NamedTuple):
    """How large the numbers were that a token's energy was summed from.

    An energy may come out of cancellation, 1000 a - 999.9 b, and no float32 result can then be better than
    rounding errors of the *contributions*. So errors are measured against those: |w| (|x| + |lse| + 1) for a
    leaf (the logarithm of a sum has an absolute error, hence the 1), added up in sums, the larger one in max
    and min.
    """

    size: torch.Tensor  # float64 [V]
    decided: torch.Tensor  # bool [V] false where rounding decides who wins and so which N counts


def magnitude(program: Program, raw: torch.Tensor, lse: torch.Tensor) -> Magnitude:
    """raw float64 [n_terms, V], lse float64 [n_terms]; zeros if the program is linear."""
    raw = raw.clamp_min(-1e30)
    one = torch.ones_like(raw[0])
    decided = torch.ones_like(raw[0], dtype=torch.bool)
    stack: list[tuple[torch.Tensor, ...]] = []  # E, N, size of E, size of N
    for op, term, w in program.instructions:
        if op == "scale" or op.startswith("pop"):
            e, n, size_e, size_n = stack.pop()
        elif term < 0:
            e, n, size_e, size_n = one, one, one, one
        else:
            e, n, size_n = raw[term] - lse[term], one, one
            size_e = raw[term].abs() + lse[term].abs() + (0 if program.linear else 1)
        operand = (w * e, w * n, abs(w) * size_e, abs(w) * size_n)
        if op in ("push", "scale"):
            stack.append(operand)
            continue
        top = stack.pop()
        if op.endswith("add"):
            stack.append(tuple(a + b for a, b in zip(top, operand, strict=True)))
            continue
        wins = operand[0] > top[0] if op.endswith("max") else operand[0] < top[0]
        e, n = (torch.where(wins, operand[i], top[i]) for i in (0, 1))
        size_e, size_n = (torch.maximum(operand[i], top[i]) for i in (2, 3))
        decided &= ((operand[0] - top[0]).abs() > 2 * TOLERANCE * size_e) | (operand[1] == top[1])
        stack.append((e, n, size_e, size_n))
    e, n, size_e, size_n = stack[0]
    if program.divide:
        size_e = size_e / n.abs() + e.abs() * size_n / n**2
    if not program.linear:
        size_e = size_e + lse[0].abs()
    return Magnitude(size_e, decided)


def check(case: Case, fused: Fused, logits: torch.Tensor, batch: Batch) -> None:
    """Hold a backend's answer to the float64 reference."""
    want = energies(logits, batch, case.vocab_size)
    raw = logits[:, : case.vocab_size].double()
    lse = log_sum_exp(raw)
    assert fused.logits.dtype == fused.lse.dtype == torch.float32
    assert fused.argmax.dtype == torch.int64
    got = fused.logits.double()
    assert torch.all(got[:, case.vocab_size :] == -math.inf), "padding is not -inf"
    got = got[:, : case.vocab_size]
    for g, program in enumerate(case.programs):
        rows = list(batch.rows[g])
        size, decided = magnitude(program, raw[rows], torch.zeros(len(rows)) if program.linear else lse[rows])
        what = f"group {g}, {program}"
        assert not got[g].isnan().any(), f"{what}: NaN"
        assert torch.equal(got[g] == -math.inf, want[g] == -math.inf), f"{what}: other tokens are banned"
        banned = want[g] == -math.inf
        error = torch.where(banned, 0.0, (got[g] - want[g]).abs()) / size.clamp_min(1e-30)
        error = torch.where(decided, error, 0.0)
        at = int(error.argmax())
        assert error[at] < TOLERANCE, (
            f"{what}: token {at} is {got[g, at]:.9g}, should be {want[g, at]:.9g}, error {error[at]:.1e}"
        )
        if banned.all():
            assert fused.lse[g] == 0
            assert fused.argmax[g] == 0
            continue
        best = int(fused.argmax[g])
        assert best == int(got[g].numpy(force=True).argmax()), (
            f"{what}: argmax {best} is not the first largest"
        )
        # the row statistics are those of the row that was returned
        mass = (got[g] - got[g].max()).exp()
        own = got[g].max() + mass.sum().log()
        assert abs(fused.lse[g] - own) <= TOLERANCE * (1 + own.abs()), (
            f"{what}: lse {fused.lse[g]}, not {own}"
        )


def check_ties(backend: str) -> None:
    """On equal energies the older operand wins, and with it its N.

    With one token in the vocabulary every log-probability is 0: 2a and 1a tie, with N = 2 and N = 1. The
    number one added at the end makes that visible: E / N is 1 / 3 if 2a has won.
    """
    programs = []
    for op in ("max", "min"):
        programs.append([("push", 0, 2.0), (op, 0, 1.0), ("add", -1, 1.0)])
        programs.append([("push", 0, 2.0), ("push", 0, 1.0), (f"pop_{op}", -1, 1.0), ("add", -1, 1.0)])
    batch = Batch.build([Program(p, divide=True) for p in programs], [[0]] * len(programs))
    fused = fuse(torch.zeros(1, 1), batch, backend=backend)
    torch.testing.assert_close(fused.logits, torch.full((len(programs), 1), 1 / 3))

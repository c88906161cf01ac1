"""Logits and programs for the fusion operation, and what a backend's answer is held to. Needs torch only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from marith_kernels import Batch, Extra, Fused, Program, fuse

from . import definition
from .definition import TOLERANCE

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


@dataclass(frozen=True)
class ExtendedCase(Case):
    """One whose terms are logits rows and extra rows in turn, and whose weightless terms are energies."""

    def extra(self) -> Extra:
        """One row for every term of every program; distributions carry a log-sum-exp that belongs to them."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        weightless = [t in p.weightless for p in self.programs for t in range(p.n_terms)] or [False]
        wide = torch.randn(len(weightless), self.vocab_size + self.gap + 5, generator=generator)
        wide[:, self.vocab_size :] = 1e4
        rows = wide[:, : self.vocab_size + self.gap]
        lse = torch.zeros(len(weightless))
        for s, energy in enumerate(weightless):
            row = rows[s, : self.vocab_size]
            if energy:  # of a gate, of what is plausible, or of a classifier
                values = torch.tensor([0.0, -1.0, -math.inf if s % 2 else 0.5])
                row[::2] = values[torch.randint(3, row[::2].shape, generator=generator)]
                continue
            row *= self.scale
            row[torch.rand(row.shape, generator=generator) < self.masked] = -math.inf
            lse[s] = definition.log_sum_exp(row.double().numpy())
        return Extra(rows, lse)

    def batch(self, device: str = "cpu") -> Batch:
        first_extra = sum(p.n_terms or 1 for p in self.programs) + 1
        rows, s = [], 0
        for program, of_logits in zip(self.programs, super().batch().rows, strict=True):
            mixed = list(of_logits)
            for t in range(program.n_terms):
                if t in program.weightless or (self.seed + s) % 2:
                    mixed[t] = first_extra + s
                s += 1
            rows.append(mixed)
        return Batch.build(self.programs, rows, device, first_extra=first_extra)


def check(
    case: Case,
    fused: Fused,
    logits: torch.Tensor,
    batch: Batch,
    extra: Extra | None = None,
) -> None:
    """Hold a backend's answer to the definition."""
    vocab_size = case.vocab_size
    raw = logits[:, :vocab_size].double().numpy(force=True)
    lse = np.array([definition.log_sum_exp(row) for row in raw])
    if extra is not None:
        beside = extra.logits[:, :vocab_size].double().numpy(force=True)
        raw = np.concatenate([raw[: batch.first_extra], beside])
        lse = np.concatenate([lse[: batch.first_extra], extra.lse.double().numpy(force=True)])
    assert fused.logits.dtype == fused.lse.dtype == torch.float32
    assert fused.argmax.dtype == torch.int64
    got = fused.logits.double()
    assert torch.all(got[:, vocab_size:] == -math.inf), "padding is not -inf"
    got = got[:, :vocab_size]
    for g, program in enumerate(case.programs):
        rows = list(batch.rows[g])
        want, _, size, _, decided = definition.run(program, raw[rows], lse[rows])
        row = got[g].numpy(force=True)
        what = f"group {g}, {program}"
        assert not np.isnan(row).any(), f"{what}: NaN"
        banned = want == -math.inf
        assert np.array_equal((row == -math.inf)[decided], banned[decided]), (
            f"{what}: other tokens are banned"
        )
        compared = decided & ~banned
        error = np.where(compared, abs(np.where(compared, row, 0) - np.where(compared, want, 0)), 0.0)
        error /= np.maximum(size, 1e-30)
        at = int(error.argmax())
        assert error[at] < TOLERANCE, (
            f"{what}: token {at} is {row[at]:.9g}, should be {want[at]:.9g}, error {error[at]:.1e}"
        )
        if (row == -math.inf).all():
            assert fused.lse[g] == 0
            assert fused.argmax[g] == 0
            continue
        best = int(fused.argmax[g])
        assert best == int(row.argmax()), f"{what}: argmax {best} is not the first largest"
        # the row statistics are those of the row that was returned
        own = definition.log_sum_exp(row)
        assert abs(fused.lse[g] - own) <= TOLERANCE * (1 + abs(own)), f"{what}: lse {fused.lse[g]}, not {own}"


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

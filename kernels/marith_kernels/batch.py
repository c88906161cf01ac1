"""The programs of one step as a batch of arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from .program import NUMBER, WEIGHTLESS, Program

NO_EXTRA = np.iinfo(np.int32).max  # `first_extra` of a batch that reads no extra rows


@dataclass(frozen=True, eq=False)
class Batch:
    """The programs of one step. Rebuilt whenever the step's rows change, hence numpy and one transfer.

    G groups with n instructions in all. A *row* is a row of the logits handed to `fuse`, or, counted from
    first_extra on, one of its extra rows; a *term* is a position in one group's formula. Instructions hold
    rows here.
    """

    programs: tuple[Program, ...]  # [G]
    rows: tuple[Sequence[int], ...]  # [G] group -> term -> row
    n_rows: int  # rows that the logits must have at least
    first_extra: int  # row r >= first_extra is extra row r - first_extra
    n_extra_rows: int  # extra rows that there must be at least
    depth: int  # stack slots of the deepest program that is not linear; 0 if all are linear
    lse_rows: tuple[int, ...]  # `lse_row` on the host
    n_longest: int  # instructions of the longest program
    any_divide: bool
    extended: bool  # anything of logadd, debias, pop_gate, UNIFORM, weightless leaves and extra rows
    code: torch.Tensor  # int32, everything below one after the other, so that one copy moves it
    offset: torch.Tensor  # int32 [G + 1] group -> its first instruction
    flags: torch.Tensor  # int32 [G] bit 0 linear, bit 1 divide by an N that differs from token to token
    leader: torch.Tensor  # int32 [G] row of term 0; -1 where the program is linear and needs none
    op: torch.Tensor  # int32 [n] operation number, with WEIGHTLESS where the leaf is
    row: torch.Tensor  # int32 [n] row of the leaf; NUMBER, UNIFORM, and NUMBER for stack operations
    weight: torch.Tensor  # float32 [n]
    lse_row: torch.Tensor  # int32 [n_lse_rows] rows of the logits whose log-sum-exp is needed, ascending

    @property
    def n_groups(self) -> int:
        return len(self.programs)

    @property
    def n_lse_rows(self) -> int:
        return len(self.lse_rows)

    @property
    def linear(self) -> bool:
        return self.depth == 0

    @classmethod
    def build(
        cls,
        programs: Sequence[Program],
        rows: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        *,
        first_extra: int | None = None,
        known_lse: Collection[int] = (),
    ) -> Batch:
        """Lay out `programs[g]`, whose term t reads row `rows[g][t]`, for every group g.

        first_extra: rows from this number on are extra rows (default: there are none).
        known_lse: rows of the logits whose log-sum-exp the caller of a backend brings along.

        Raises ValueError if a group has too few rows, none at all, or a negative one.
        """
        if len(programs) != len(rows):
            raise ValueError(f"{len(programs)} programs but rows for {len(rows)} groups.")
        first_extra = NO_EXTRA if first_extra is None else first_extra
        n_groups = len(programs)
        counts = [p.encoded.shape[1] for p in programs]
        n_rows = [len(r) for r in rows]
        for g, program in enumerate(programs):
            if n_rows[g] < max(program.n_terms, 1):
                raise ValueError(f"Group {g} needs {max(program.n_terms, 1)} rows and has {n_rows[g]}.")
        of_term = np.fromiter(chain.from_iterable(rows), np.int32, sum(n_rows))
        if of_term.size and of_term.min() < 0:
            raise ValueError(f"A row is negative: {of_term.min()}.")
        op, term, bits = np.concatenate([p.encoded for p in programs] or [np.empty((3, 0), np.int32)], axis=1)
        flags = np.fromiter((1 if p.linear else 2 * p.divide for p in programs), np.int32, n_groups)

        first_row = np.zeros(n_groups + 1, np.int32)
        np.cumsum(n_rows, out=first_row[1:])
        offset = np.zeros(n_groups + 1, np.int32)
        np.cumsum(counts, out=offset[1:])
        of_leaf = of_term[np.maximum(term, 0) + np.repeat(first_row[:-1], counts)] if op.size else term
        row = np.where(term >= 0, of_leaf, term)
        linear = (flags & 1).astype(bool)
        leader = np.where(linear, NUMBER, of_term[first_row[:-1]]) if n_groups else flags
        if linear.all():
            lse_row = np.empty(0, np.int32)
        else:
            normalised = np.repeat(~linear, counts) & (op & WEIGHTLESS == 0)
            lse_row = np.unique(np.concatenate([row[normalised], leader]))
            lse_row = lse_row[(lse_row >= 0) & (lse_row < first_extra)]
            if known_lse:
                lse_row = np.setdiff1d(lse_row, np.fromiter(known_lse, np.int32, len(known_lse)))

        parts = [offset, flags, leader, op, row, bits, lse_row]
        code = torch.from_numpy(np.concatenate(parts, dtype=np.int32, casting="same_kind"))
        if torch.device(device).type == "cuda":
            code = code.pin_memory().to(device, non_blocking=True)
        elif torch.device(device).type != "cpu":
            code = code.to(device)
        views = torch.split(code, [p.size for p in parts])
        of_logits = of_term[of_term < first_extra]
        return cls(
            programs=tuple(programs),
            rows=tuple(rows),
            n_rows=int(of_logits.max(initial=-1)) + 1,
            first_extra=first_extra,
            n_extra_rows=max(int(of_term.max(initial=-1)) - first_extra + 1, 0),
            depth=max((p.depth for p in programs if not p.linear), default=0),
            lse_rows=tuple(lse_row.tolist()),
            n_longest=max(counts, default=0),
            any_divide=bool((flags & 2).any()),
            extended=any(p.extended for p in programs)
            or bool((row >= first_extra).any() or (leader >= first_extra).any()),
            code=code,
            offset=views[0],
            flags=views[1],
            leader=views[2],
            op=views[3],
            row=views[4],
            weight=views[5].view(torch.float32),
            lse_row=views[6],
        )

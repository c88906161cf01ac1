"""Pipelines of one step, level by level: every level is one `fuse` over all groups, then filters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from . import filters
from .backends import check_logits, module_of, resolve
from .batch import Batch
from .fusion import Fused, check_rows, empty_rows, fuse, run
from .pipeline import Pipeline
from .program import Program

# (which: [(group, stage)], source_logits float32 [n, V], source_lse [n], out float32 [n, V]) -> lse [n]
External = Callable[[Sequence[tuple[int, int]], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_COPY = Program([("push", 0, 1.0)])  # brings a logits row, and its log-sum-exp, among the scratch rows
_FUSED = ("fuse", "top_k", "top_p")  # kinds that a level's `fuse` makes
_FILTERED = ("plausible", "kl_indicator", "external")  # kinds that are made afterwards
_DTYPES = {
    "top_k": (torch.int64,),
    "top_p": (torch.float64,),
    "plausible": (torch.float64,),
    "kl_indicator": (torch.float64, torch.bool, torch.bool, torch.int64),
}  # of the parameters
_At = tuple[int, int]  # (group, stage)


@dataclass(frozen=True, eq=False)
class _Filter:
    """Stages of one kind in one level, or filtered final rows."""

    kind: str
    rows: slice | torch.Tensor  # of the scratch rows that they are; of the final rows, int64
    parameters: tuple[torch.Tensor, ...]  # [n] each, on the device
    largest: int  # the largest k, if the kind has one
    sources: tuple[torch.Tensor, ...]  # int64 [n] each: scratch rows that they look at
    which: tuple[_At, ...]  # [n]
    weightless: torch.Tensor  # bool [n]


@dataclass(frozen=True, eq=False)
class _Level:
    batch: Batch
    rows: slice  # scratch rows that the batch makes
    filters: tuple[_Filter, ...]


@dataclass(frozen=True, eq=False)
class StagedBatch:
    """The pipelines of one step's groups. Rebuilt whenever the step's rows change, as `Batch` is.

    Stages that read terms alone make the first level, those that read them the second, and so on; the last
    stages of all groups run together as `final`. A batch whose pipelines have one stage each, without
    filters, is `final` alone, and running it is one `fuse`.

    The log-sum-exp of a logits row is computed once, at the first level that needs it (a source of a filter
    is brought among the scratch rows and counts apart).
    """

    pipelines: tuple[Pipeline, ...]  # [G]
    levels: tuple[_Level, ...]
    final: Batch
    final_filters: tuple[_Filter, ...]
    first_extra: int
    n_scratch: int  # rows of stages and copies
    any_external: bool
    rows: tuple[Sequence[int], ...]  # [G] group -> term -> row of the logits

    @property
    def n_groups(self) -> int:
        return len(self.pipelines)

    @classmethod
    def build(
        cls,
        pipelines: Sequence[Pipeline],
        rows: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> StagedBatch:
        """Lay out `pipelines[g]`, whose term t reads row `rows[g][t]` of the logits, for every group g.

        Raises ValueError if a group has too few rows or a negative one.
        """
        if len(pipelines) != len(rows):
            raise ValueError(f"{len(pipelines)} pipelines but rows for {len(rows)} groups.")
        for g, pipeline in enumerate(pipelines):
            if len(rows[g]) < pipeline.n_terms:
                raise ValueError(f"Group {g} needs {pipeline.n_terms} rows and has {len(rows[g])}.")
        if all(len(p.stages) == 1 and p.stages[0].kind == "fuse" for p in pipelines):
            programs = [cast(Program, pipeline.stages[0].program) for pipeline in pipelines]
            batch = Batch.build(programs, rows, device)
            return cls(tuple(pipelines), (), batch, (), batch.n_rows, 0, False, tuple(rows))
        return _Builder(pipelines, rows, device).build()

    def run(
        self,
        logits: torch.Tensor,
        *,
        vocab_size: int | None = None,
        external: External | None = None,
        out: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> Fused:
        """Every group's formula: `fuse` of the last stages, over what the stages before them have made.

            for level in levels:
                scratch[level.rows] = fuse(logits, level.batch, extra=scratch)
                filter them;  scratch[...] = plausible, kl_indicator and external rows
            return fuse(logits, final, extra=scratch), filtered

        external: called once a level that has external stages, with (which, source_logits, source_lse, out):
        for n of them, which[i] = (group, stage), the rows float32 [n, vocab_size] that they look at with
        their log-sum-exps [n], and [n, vocab_size] to be filled in, with logits of a distribution or with
        energies. Returns the log-sum-exps of those rows, float32 [n]; they do not matter for weightless
        ones.

        All else is as in `fuse`. One allocation holds the rows of all stages. ValueError too if there are
        external stages and `external` is None.
        """
        if not self.levels and not self.final_filters:
            return fuse(logits, self.final, vocab_size=vocab_size, out=out, backend=backend)
        vocab_size = check_logits(logits, vocab_size)
        check_rows(logits, self.final, out, vocab_size)
        if len(logits) < self.first_extra:
            raise ValueError(
                f"The batch reads row {self.first_extra - 1} and the logits have {len(logits)} rows."
            )
        if self.any_external and external is None:
            raise ValueError("The batch has external stages; `external` must say what they are.")
        name = resolve(backend, logits.device)
        if out is None:
            out = empty_rows(self.n_groups, vocab_size, logits.device)[:, :vocab_size]
        scratch = empty_rows(self.n_scratch, vocab_size, logits.device)
        # log-sum-exps of logits rows, then of scratch rows
        row_lse = torch.zeros(self.first_extra + self.n_scratch, device=logits.device)
        lse = row_lse[self.first_extra :]
        for level in self.levels:
            made = run(logits, level.batch, vocab_size, scratch[level.rows], name, scratch, row_lse)
            lse[level.rows] = made.lse
            for each in level.filters:
                _apply(each, scratch[:, :vocab_size], lse, external)
        fused = run(logits, self.final, vocab_size, out, name, scratch, row_lse)
        for each in self.final_filters:
            kept = out[each.rows, :vocab_size]
            fused.lse[each.rows] = _narrow(each, kept, fused.lse[each.rows])
            out[each.rows, :vocab_size] = kept
        return fused

    def replace(
        self,
        logits: torch.Tensor,
        into: torch.Tensor,
        *,
        external: External | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Writes every group's formula, as of `run`, over the row of its term 0; returns the peaks.

            for g, row in enumerate(rows):
                into[row[0]] = energies of group g;  peaks[g] = their maximum

        peaks[g] is NaN where a logit in any of the group's rows is NaN or +inf, read or not, and +inf where
        these are sound and an energy is not. What such a group's row becomes holds neither.

        into: float32 [R, V] of stride 1 within a row. May be `logits` itself; then no two groups may share a
        row that is written over.
        """
        if into.dtype != torch.float32 or into.shape != logits.shape or into.stride(1) != 1:
            raise ValueError(
                f"into must be float32 {tuple(logits.shape)} of stride 1, not {into.dtype} of "
                f"{tuple(into.shape)}."
            )
        if not self.n_groups:
            return into.new_empty(0)
        replacement = self._replacement if backend in ("auto", "numba") else None
        if replacement is not None:
            check_rows(logits, self.final, None, check_logits(logits, None))
            peaks, sound = replacement(logits, into)
            if not sound:
                into[self._leaders] = into[self._leaders].nan_to_num_(nan=0, posinf=0, neginf=-math.inf)
            return peaks
        read = logits.amax(-1)[self._rows].amax(-1).float()
        fused = self.run(logits, external=external, backend=backend).logits
        peaks = fused.amax(-1)
        peaks = torch.where(peaks < math.inf, peaks, math.inf)
        peaks = torch.where(read < math.inf, peaks, math.nan)
        # Whether there is anything to mend is known on the device, and nobody waits for that.
        if fused.device.type != "cpu" or not bool((peaks < math.inf).all()):
            fused.nan_to_num_(nan=0, posinf=0, neginf=-math.inf)
        into.index_copy_(0, self._leaders, fused)
        return peaks

    @functools.cached_property
    def _replacement(self) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, bool]] | None:
        """How CPUs do it in one task; None where that is not for this batch."""
        if self.levels or self.final_filters or resolve("auto", self.final.code.device) != "numba":
            return None
        found: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, bool]] = module_of(
            "replace", "numba"
        ).Replacement(self.final, self._rows)
        return found

    @functools.cached_property
    def _rows(self) -> torch.Tensor:
        """int64 [G, most terms of a group]: `rows`, each group's filled up with its first."""
        most = max(map(len, self.rows))
        filled = [[*row, *[row[0]] * (most - len(row))] for row in self.rows]
        return _to_device(filled, torch.int64, self.final.code.device)

    @property
    def _leaders(self) -> torch.Tensor:
        return self._rows[:, 0]


def _to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # a copy from ordinary memory may wait for the device
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _apply(each: _Filter, rows: torch.Tensor, lse: torch.Tensor, external: External | None) -> None:
    """Make or narrow the scratch rows of these stages."""
    seen = [rows.index_select(0, source) for source in each.sources]
    if each.kind == "plausible":
        rows[each.rows] = filters.plausible(*seen, *each.parameters)
    elif each.kind == "kl_indicator":
        rows[each.rows] = filters.kl_indicator(*seen, *each.parameters, largest=each.largest)
    elif each.kind == "external":
        assert external is not None
        made = external(each.which, seen[0], lse[each.sources[0]], rows[each.rows])
        lse[each.rows] = torch.where(each.weightless, 0.0, made)
    else:
        lse[each.rows] = _narrow(each, rows[each.rows], lse[each.rows])


def _narrow(each: _Filter, rows: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    if each.kind == "top_k":
        return filters.top_k(rows, lse, *each.parameters, largest=each.largest)
    return filters.top_p(rows, lse, *each.parameters)


class _Builder:
    """Builds a `StagedBatch`; scratch rows are numbered level by level, in a level by kind."""

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        rows: Sequence[Sequence[int]],
        device: torch.device | str,
    ) -> None:
        self.pipelines = pipelines
        self.rows = rows
        self.device = torch.device(device)
        self.first_extra = 1 + max((row for group in rows for row in group), default=-1)
        self.n_scratch = 0
        self.stage_row: dict[_At, int] = {}  # -> scratch row
        self.copy_row: dict[int, int] = {}  # logits row -> scratch row of its copy
        self.known_lse: set[int] = set()  # logits rows whose log-sum-exp an earlier level computes

    def build(self) -> StagedBatch:
        n_levels = 1 + max((level for p in self.pipelines for level in p.levels[:-1]), default=-1)
        at_level: list[list[_At]] = [[] for _ in range(n_levels)]
        last = []
        for g, pipeline in enumerate(self.pipelines):
            for s, level in enumerate(pipeline.levels[:-1]):
                at_level[level].append((g, s))
            last.append((g, len(pipeline.stages) - 1))
        levels = tuple(self._level(which) for which in at_level)
        narrowed = []
        for kind in ("top_k", "top_p"):
            which = self._of_kind(kind, last)
            if which:
                groups = self._tensor([g for g, _ in which], torch.int64)
                narrowed.append(self._filter(kind, which, groups))
        return StagedBatch(
            pipelines=tuple(self.pipelines),
            levels=levels,
            final=self._batch(last, []),
            final_filters=tuple(narrowed),
            first_extra=self.first_extra,
            n_scratch=self.n_scratch,
            any_external=any(stage.kind == "external" for p in self.pipelines for stage in p.stages),
            rows=tuple(self.rows),
        )

    def _level(self, which: list[_At]) -> _Level:
        copies = self._copies(which)
        fused = [at for kind in _FUSED for at in self._of_kind(kind, which)]
        batch = self._batch(fused, copies)
        begin = self.n_scratch
        rows: dict[str, slice] = {}
        for kind in _FUSED:
            rows[kind] = self._number(self.stage_row, self._of_kind(kind, which))
        self._number(self.copy_row, copies)
        made = slice(begin, self.n_scratch)
        for kind in _FILTERED:
            rows[kind] = self._number(self.stage_row, self._of_kind(kind, which))
        kinds = [kind for kind in rows if kind != "fuse" and rows[kind].start < rows[kind].stop]
        made_of = [self._filter(kind, self._of_kind(kind, which), rows[kind]) for kind in kinds]
        return _Level(batch, made, tuple(made_of))

    def _copies(self, which: list[_At]) -> list[int]:
        """Logits rows that filters look at and that are not among the scratch rows yet."""
        rows = []
        for g, s in which:
            for leaf in self.pipelines[g].stages[s].sources:
                if leaf < self.pipelines[g].n_terms:
                    rows.append(self.rows[g][leaf])
        return [row for row in dict.fromkeys(rows) if row not in self.copy_row]

    def _number(self, row_of: dict[Any, int], which: Sequence[Any]) -> slice:
        """The next scratch rows, one for each of `which`."""
        begin = self.n_scratch
        for at in which:
            row_of[at] = self.n_scratch
            self.n_scratch += 1
        return slice(begin, self.n_scratch)

    def _batch(self, which: list[_At], copies: list[int]) -> Batch:
        """The programs of these stages, then the copies."""
        programs, rows = [], []
        for g, s in which:
            stage, n_terms = self.pipelines[g].stages[s], self.pipelines[g].n_terms
            assert stage.program is not None
            # a stage that is not read may not have a row yet; the leader's stands in for it
            made = [
                self.first_extra + self.stage_row[g, i] if n_terms + i in stage.leaves else self.rows[g][0]
                for i in range(s)
            ]
            programs.append(stage.program)
            rows.append([*self.rows[g][:n_terms], *made])
        programs += [_COPY] * len(copies)
        rows += [[row] for row in copies]
        batch = Batch.build(
            programs, rows, self.device, first_extra=self.first_extra, known_lse=self.known_lse
        )
        self.known_lse.update(batch.lse_rows)
        return batch

    def _filter(self, kind: str, which: list[_At], rows: slice | torch.Tensor) -> _Filter:
        stages = [self.pipelines[g].stages[s] for g, s in which]
        columns = list(zip(*(stage.parameters for stage in stages), strict=True))
        parameters = [self._tensor(column, _DTYPES[kind][i]) for i, column in enumerate(columns)]
        k = columns[-1] if kind in ("top_k", "kl_indicator") else (0,)
        if kind == "kl_indicator" and not any(k):
            parameters.pop()
        sources = zip(
            *([self._source(g, leaf) for leaf in self.pipelines[g].stages[s].sources] for g, s in which),
            strict=True,
        )
        return _Filter(
            kind,
            rows,
            tuple(parameters),
            largest=int(max(k)),
            sources=tuple(self._tensor(rows, torch.int64) for rows in sources),
            which=tuple(which),
            weightless=self._tensor([stage.weightless for stage in stages], torch.bool),
        )

    def _source(self, g: int, leaf: int) -> int:
        """The scratch row of a leaf that a filter looks at."""
        n_terms = self.pipelines[g].n_terms
        return self.copy_row[self.rows[g][leaf]] if leaf < n_terms else self.stage_row[g, leaf - n_terms]

    def _of_kind(self, kind: str, which: Sequence[_At]) -> list[_At]:
        return [(g, s) for g, s in which if self.pipelines[g].stages[s].kind == kind]

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return _to_device(values, dtype, self.device)

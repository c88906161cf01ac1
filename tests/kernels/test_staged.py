"""Formulas in stages, on every backend that runs here, against the definition in numpy."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from marith_kernels import Batch, Pipeline, Program, Stage, StagedBatch, fuse, staged

from .cases import DTYPES
from .pipelines import NAMED, SUM, TERM, Step, check_step, steps
from .test_fuse import ROUNDS

HERE = ("numba", "torch", "reference")


@pytest.mark.parametrize("backend", HERE)
@given(step=steps)
@settings(ROUNDS, max_examples=120)
def test_any_pipelines(backend, step):
    assume(check_step(step, backend))


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_named_formulas(backend, dtype, name):
    step = Step((NAMED[name], TERM, NAMED[name]), 30, dtype, seed=5, padding=3, masked=0.1)
    assert check_step(step.decided(), backend)


@pytest.mark.parametrize("backend", HERE)
def test_all_in_one_step(backend):
    step = Step(tuple(NAMED.values()), 40, torch.float32, seed=3, masked=0.05)
    assert check_step(step.decided(), backend)


def test_simple_formulas_are_one_fuse_call(monkeypatch):
    calls = []
    monkeypatch.setattr(staged, "fuse", lambda *a, **k: (calls.append(1), fuse(*a, **k))[1])
    monkeypatch.setattr(staged, "run", None)
    logits = torch.randn(4, 100)
    batch = StagedBatch.build([SUM, TERM], [[0, 1, 2], [3]])
    fused = batch.run(logits)
    want = fuse(logits, Batch.build([SUM.stages[0].program, TERM.stages[0].program], [[0, 1, 2], [3]]))
    assert calls == [1]
    assert not batch.final.extended
    assert all(torch.equal(a, b) for a, b in zip(fused, want, strict=True))


def test_levels_are_shared_by_all_groups(monkeypatch):
    """One fuse a level whatever the number of groups; filters without programs bring no groups."""
    groups = []
    run = staged.run
    monkeypatch.setattr(staged, "run", lambda *a: (groups.append(a[1].n_groups), run(*a))[1])
    formulas = [NAMED["normalize(a - 0.6b) + c"]] * 3 + [NAMED["plausible(a - b, a, 0.1)"], TERM]
    batch = StagedBatch.build(formulas, [[0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 1], [5]])
    batch.run(torch.randn(6, 40))
    assert groups == [4, 5], "three stages and the copy that plausible looks at; then every last stage"


def test_a_row_that_several_filters_look_at_is_copied_once():
    plausible = NAMED["plausible(a - b, a, 0.1)"]
    batch = StagedBatch.build([plausible, plausible], [[0, 1], [0, 2]])
    assert batch.levels[0].batch.n_groups == 1
    assert batch.n_scratch == 3


def test_a_log_sum_exp_is_computed_at_one_level():
    union = Program([("push", 0, 1.0), ("max", 1, 1.0)])
    later = Program([("push", 2, 1.0), ("max", 1, 1.0), ("max", 0, 1.0)])
    batch = StagedBatch.build([Pipeline(2, (Stage("fuse", union), Stage("fuse", later)))], [[4, 2]])
    assert [level.batch.lse_rows for level in batch.levels] == [(2, 4)]
    assert batch.final.lse_rows == ()


def test_rows_may_be_ragged_and_strided():
    step = Step(tuple(NAMED.values())[2:7], 33, torch.bfloat16, seed=2)
    logits, rows = step.logits(), step.rows()
    wide = torch.full((2 * len(logits), 70), math.nan, dtype=logits.dtype)
    view = wide[::2, 5 : 5 + logits.shape[1]]
    view.copy_(logits)
    batch = StagedBatch.build(step.formulas, rows)
    for backend in HERE:
        want = batch.run(logits, backend=backend)
        got = batch.run(view, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_no_groups():
    fused = StagedBatch.build([], []).run(torch.randn(2, 10))
    assert fused.logits.shape == (0, 10)


def test_pipelines_can_be_looked_up():
    again = Pipeline(3, [Stage("fuse", Program([("push", 0, 1.5), ("add", 1, -0.25), ("add", 2, -0.25)]))])
    assert again == SUM
    assert hash(again) == hash(SUM)
    assert again != NAMED["normalize(a - 0.6b) + c"]


FIRST = Stage("fuse", Program([("push", 0, 1.0)]))
MASK = Stage("plausible", parameters=(0.5,), sources=(0,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stage("softmax"), "Unknown kind of stage 'softmax'; known are fuse, top_k"),
        (lambda: Stage("fuse"), "kind fuse needs a program"),
        (lambda: Stage("external", FIRST.program, sources=(0,)), "kind external takes no program"),
        (lambda: Stage("plausible", parameters=(0.5,)), r"plausible has 1 sources, not \(\)"),
        (lambda: Stage("fuse", FIRST.program, sources=(0,)), "fuse has 0 sources"),
        (lambda: Stage("kl_indicator", None, (0.0, 1, 0, 0), (0,)), "kl_indicator has 2 sources"),
        (lambda: Stage("top_k", FIRST.program), r"top_k has the parameters \(k\), not \(\)"),
        (lambda: Stage("top_k", FIRST.program, (0,)), "k of a stage of kind top_k is an integer >= 1"),
        (lambda: Stage("top_k", FIRST.program, (1.5,)), "an integer >= 1"),
        (lambda: Stage("top_k", FIRST.program, (math.inf,)), "an integer >= 1"),
        (lambda: Stage("top_p", FIRST.program, (0.0,)), r"p of a stage of kind top_p is in \(0, 1\]"),
        (lambda: Stage("plausible", None, (1.1,), (0,)), r"alpha of .* is in \(0, 1\], not 1.1"),
        (lambda: Stage("kl_indicator", None, (math.nan, 1, 0, 0), (0, 1)), "divergence of .* finite"),
        (lambda: Stage("kl_indicator", None, (0.0, 2, 0, 0), (0, 1)), "include_max of .* true or false"),
        (lambda: Stage("kl_indicator", None, (0.0, 1, 0, -1), (0, 1)), "k of a stage of kind kl_indicator"),
        (lambda: Stage("fuse", FIRST.program, weightless=True), "is a distribution and cannot be weightless"),
        (lambda: Pipeline(0, (FIRST,)), "a term and a stage at least, not 0 and 1"),
        (lambda: Pipeline(1, ()), "not 1 and 0"),
        (lambda: Pipeline(1, (FIRST, MASK)), "one of kind plausible is none"),
        (lambda: Pipeline(1, (Stage("external", sources=(0,)),)), "one of kind external is none"),
        (
            lambda: Pipeline(1, (Stage("fuse", Program([("push", 1, 1.0)])),)),
            "Stage 0 reads leaf 1; there are 1",
        ),
        (lambda: Pipeline(1, (Stage("external", sources=(-1,)), FIRST)), "Stage 0 reads leaf -1"),
        (lambda: Pipeline(1, (MASK, Stage("plausible", None, (0.5,), (1,)), FIRST)), "leaf 1 is weightless"),
        (
            lambda: Pipeline(1, (MASK, Stage("fuse", Program([("push", 0, 1.0), ("add", 1, 1.0)])))),
            "Stage 1 reads leaf 1 as a distribution; it is weightless",
        ),
        (
            lambda: Pipeline(1, (Stage("fuse", Program([("push", 0, 1.0)], weightless=(0,))),)),
            "Stage 0 reads leaf 0 as weightless; it is a distribution",
        ),
        (lambda: StagedBatch.build([SUM], [[0, 1]]), "Group 0 needs 3 rows and has 2"),
        (lambda: StagedBatch.build([SUM], []), "1 pipelines but rows for 0 groups"),
        (lambda: StagedBatch.build([TERM], [[-1]]), "A row is negative"),
    ],
)
def test_refused_pipelines(make, message):
    with pytest.raises(ValueError, match=message):
        make()


LOGITS = torch.zeros(3, 16)
STAGED = StagedBatch.build([NAMED["normalize(a - 0.6b) + c"]], [[0, 1, 2]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "Unknown backend"),
        ({"vocab_size": 17}, "vocab_size is 17"),
        ({"logits": LOGITS[:2]}, "reads row 2 and the logits have 2 rows"),
        ({"logits": LOGITS.double()}, "not torch.float64"),
        ({"logits": LOGITS.to("meta")}, "batch is on cpu and the logits are on meta"),
        ({"out": torch.zeros(1, 15)}, r"out must be \[1, >= 16\]"),
    ],
)
def test_refused_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        STAGED.run(**{"logits": LOGITS, **arguments})


def test_external_stages_need_someone_to_make_them():
    batch = StagedBatch.build([NAMED["a + classifier"]], [[0]])
    with pytest.raises(ValueError, match="has external stages; `external` must say"):
        batch.run(LOGITS)

import pytest
import torch
from marith_kernels import MAX_DEPTH, Batch, Program

SUM = Program([("push", 0, 1.5), ("add", 1, -0.5)])
UNION = Program([("push", 0, 1.0), ("push", 1, 1.0), ("max", 2, 1.0), ("pop_add", -1, -0.5)])


def test_what_a_program_says_of_itself():
    assert (SUM.linear, SUM.depth, SUM.n_terms) == (True, 1, 2)
    assert (UNION.linear, UNION.depth, UNION.n_terms) == (False, 2, 3)
    assert repr(SUM) == "Program(push 0 1.5; add 1 -0.5)"


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ([], "at least one instruction"),
        ([("add", 0, 1.0)], "add needs 1 stack slots and finds 0"),
        ([("push", 0, 1.0), ("pop_max", -1, 1.0)], "pop_max needs 2 stack slots and finds 1"),
        ([("push", 0, 1.0), ("push", 1, 1.0)], "must leave one stack slot, this one leaves 2"),
        ([("push", 0, 1.0), ("sub", 1, 1.0)], "unknown operation 'sub'; known are add"),
        ([("push", -3, 1.0)], "leaf -3 is neither a term"),
        ([("push", 0, 1.0), ("logadd", 1, 0.0)], "weight of a logadd is positive, not 0"),
        ([("push", 0, 1.0), ("debias", 1, -1.0)], "weight of a debias is not negative, as -1 is"),
        ([("push", 0, 1.0), ("logadd", -1, 1.0)], "logadd reads a distribution, not the number one"),
        ([("push", 0, 1.0), ("debias", -1, 1.0)], "debias reads a distribution, not the number one"),
        ([("push", 0, 1.0), ("pop_gate", -1, 1.0)], "pop_gate needs 2 stack slots and finds 1"),
        ([("push", 0, float("nan"))], "weight nan is not a finite"),
        ([("push", 0, 1e39)], "not a finite float32"),
        ([("push", 0, 1e-46)], "too small for float32"),
        ([("push", 0, 1e30), ("scale", -1, 1e30)], "leaf 0 multiply to 1e\\+60"),
        (
            [("push", 0, 1.0)] * (MAX_DEPTH + 1) + [("pop_add", -1, 1.0)] * MAX_DEPTH,
            f"may use {MAX_DEPTH} stack",
        ),
    ],
)
def test_refused_programs(instructions, message):
    with pytest.raises(ValueError, match=message):
        Program(instructions)


def test_what_is_linear():
    assert Program([("push", 0, 1.0), ("add", -2, 1.0)], weightless=(0,)).linear
    for step in (("max", -2, 1.0), ("logadd", 1, 1.0), ("debias", 1, 0.0)):
        assert not Program([("push", 0, 1.0), step]).linear
    assert not Program([("push", 0, 1.0), ("push", 1, 1.0), ("pop_gate", -1, 1.0)]).linear


def test_weightless_leaves_have_no_weight():
    divided = Program([("push", 0, 2.0), ("add", 1, 5.0)], divide=True, weightless=(1,))
    assert divided.encoded[2].view("float32").tolist() == [1.0, 2.5]
    assert repr(divided) == "Program(push 0 2; add 1 5; divide; weightless 1)"
    with pytest.raises(ValueError, match=r"Only terms .* can be weightless, not leaf -2"):
        Program([("push", 0, 1.0)], weightless=(-2,))


def test_programs_of_the_same_instructions_are_equal():
    assert Program(UNION.instructions) == UNION
    assert len({UNION, Program(UNION.instructions), Program(UNION.instructions, weightless=(1,))}) == 2
    assert UNION.instructions != UNION


def test_a_linear_program_divides_at_once():
    divided = Program([("push", 0, 3.0), ("add", 1, -1.0)], divide=True)
    assert divided.encoded[2].view("float32").tolist() == [1.5, -0.5]
    with pytest.raises(ValueError, match="sum to 0; dividing by them needs a positive sum"):
        Program([("push", 0, 1.0), ("add", 1, -1.0)], divide=True)


def test_a_sum_is_flattened():
    nested = Program([("push", 0, 1.0), ("push", 1, 2.0), ("add", 2, 3.0), ("pop_add", -1, -0.5)])
    assert nested.linear
    assert nested.encoded[1].tolist() == [0, 1, 2]
    assert nested.encoded[2].view("float32").tolist() == [1.0, -1.0, -1.5]


def test_batch_layout():
    batch = Batch.build([SUM, UNION, SUM], [[5, 3], [0, 1, 2], [3, 4]])
    assert batch.offset.tolist() == [0, 2, 6, 8]
    assert batch.row.tolist() == [5, 3, 0, 1, 2, -1, 3, 4]
    assert batch.weight.tolist() == [1.5, -0.5, 1.0, 1.0, 1.0, -0.5, 1.5, -0.5]
    assert batch.flags.tolist() == [1, 0, 1]
    assert batch.leader.tolist() == [-1, 0, -1]
    assert batch.lse_row.tolist() == [0, 1, 2]
    assert (batch.n_rows, batch.depth, batch.n_groups, batch.linear) == (6, 2, 3, False)


def test_the_leaders_lse_is_needed_even_if_the_formula_leaves_it_out():
    program = Program([("push", 1, 1.0), ("max", 2, 1.0)])
    assert Batch.build([program], [[7, 8, 9]]).lse_row.tolist() == [7, 8, 9]


def test_batches_without_groups_and_of_numbers():
    empty = Batch.build([], [])
    assert (empty.n_groups, empty.n_rows, empty.linear) == (0, 0, True)
    assert Batch.build([Program([("push", -1, 2.0)])], [[4]]).row.tolist() == [-1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0]], "Group 0 needs 2 rows and has 1"),
        ([[0, -1]], "A row is negative: -1"),
        ([[0, 1], [2, 3]], "1 programs but rows for 2 groups"),
    ],
)
def test_refused_batches(rows, message):
    with pytest.raises(ValueError, match=message):
        Batch.build([SUM], rows)


def test_one_copy_moves_a_batch():
    batch = Batch.build([SUM, UNION], [[0, 1], [2, 3, 4]])
    parts = (batch.offset, batch.flags, batch.leader, batch.op, batch.row, batch.weight, batch.lse_row)
    assert all(part.untyped_storage().data_ptr() == batch.code.data_ptr() for part in parts)
    assert sum(part.numel() for part in parts) == batch.code.numel()
    assert batch.code.dtype == torch.int32

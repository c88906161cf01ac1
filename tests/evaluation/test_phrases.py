"""Sentences out of made-up intervals, in every direction."""

from __future__ import annotations

import math

from vllm_marith.evaluation import phrases
from vllm_marith.evaluation.statistics import Interval


def around(value: float, half: float = 0.05) -> Interval:
    return Interval(value, max(0.0, value - half), value + half)


def test_numbers_are_written_with_digits_that_say_something() -> None:
    assert phrases.percent(0.123) == "12%"
    assert phrases.percent(0.034) == "3.4%"
    assert phrases.percent(0.0) == "0%"
    assert phrases.percent(1.0) == "100%"
    assert phrases.rate(Interval(0.12, 0.09, 0.161)) == "12% [9, 16]"
    assert phrases.number(Interval(1.234, 1.19, 1.3)) == "1.23 [1.19, 1.30]"
    assert phrases.number(Interval(123.4, 99.6, 150.2)) == "123 [100, 150]"


def test_lists_read_as_lists() -> None:
    assert [phrases.listing(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_a_winner_clear_of_all_is_said_to_be() -> None:
    said = phrases.ranking({"a": around(0.5), "b": around(0.1), "c": around(0.3)}, least="leaves least")
    assert said == (
        "b leaves least, 10% [5, 15], and is clear of every other: c (30% [25, 35]) and a (50% [45, 55])."
    )


def test_a_tie_is_no_win() -> None:
    said = phrases.ranking({"a": around(0.12), "b": around(0.1), "c": around(0.14)}, least="leaves least")
    assert said.startswith("b leaves least, 10% [5, 15], but the intervals of all others overlap")
    assert said.endswith("these texts rank none of them above another.")
    assert "clear of" not in said


def test_the_tied_and_the_beaten_are_told_apart() -> None:
    said = phrases.ranking({"a": around(0.5), "b": around(0.1), "c": around(0.12)}, least="leaves least")
    assert "because the intervals overlap: c (12% [7, 17]). It is clear of a (50% [45, 55])." in said


def test_one_alone_beats_nobody() -> None:
    assert phrases.ranking({"a": around(0.5)}, least="leaves least") == "a is the only one: 50% [45, 55]."


def test_changes_have_a_direction_only_beyond_chance() -> None:
    assert phrases.change(around(0.2), around(0.5)) == "rises from 20% [15, 25] to 50% [45, 55]"
    assert phrases.change(around(0.5), around(0.2)).startswith("falls from 50%")
    assert phrases.change(around(0.5), around(0.52)).startswith("does not move beyond what chance does")


def test_monotone_looks_at_every_step() -> None:
    assert phrases.monotone([around(0.1), around(0.3), around(0.32)]) == (True, False)
    assert phrases.monotone([around(0.1), around(0.5), around(0.2)]) == (True, True)
    assert phrases.monotone([around(0.1), around(0.12)]) == (False, False)


def test_seeds_that_differ_too_much_are_told_of() -> None:
    assert "no more than draws of texts do" in phrases.seeds(Interval(1.1, 0.8, 1.2))
    assert "too narrow" in phrases.seeds(Interval(1.3, 0.8, 1.2))
    assert "cannot be compared" in phrases.seeds(Interval(math.nan, math.nan, math.nan))

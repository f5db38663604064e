"""Distinct tokens and loops, on rows in which they can be seen at a glance."""

import pytest

from checkpoints.variety import distinct, looped, looping


def test_distinct_looks_at_the_first_tokens_only():
    assert distinct([1, 2, 1, 3]) == 3
    assert distinct(range(100)) == 64
    assert distinct(range(100), n=5) == 5
    assert distinct([]) == 0


@pytest.mark.parametrize("period", range(1, 9))
def test_short_periods_are_loops(period):
    """A row of # is period 1, _is_is_is is period 1 or 2."""
    row = [i % period for i in range(64)]
    first = next(multiple for multiple in range(8, 16) if multiple % period == 0)
    assert looping(row) == (64 - first) / 64


def test_long_periods_are_loops_too():
    assert looping([*range(20), *range(20)]) == 20 / 40
    assert looping([*range(20), *range(20), *range(20)]) == 40 / 60


def test_text_before_and_after_a_loop_is_none():
    loop = [1, 2] * 8
    assert looping([*range(10, 30), *loop, *range(30, 50)]) == 8 / 56


def test_what_comes_again_later_is_no_loop():
    phrase = list(range(12))
    assert looping([*phrase, 50, *phrase, 51, *phrase]) == 0
    assert looping(range(64)) == 0


def test_seven_tokens_again_are_no_loop():
    assert looping([*range(7), *range(7)]) == 0
    assert looped([*range(7), *range(7)], 7) == set(range(7, 14))


def test_no_tokens():
    assert looping([]) == 0
    assert looping([1] * 15) == 0  # there is no room for eight and the same eight

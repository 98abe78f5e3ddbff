"""Whose prompt is read in a step, and how much of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conductor.backend.portions import portions


def test_one_reads_as_much_as_there_is_room_for() -> None:
    assert portions([2000], 512) == [512]
    assert portions([60], 512) == [60]


def test_prompts_are_read_whole_in_the_order_in_which_they_came() -> None:
    assert portions([64, 60, 66], 512) == [64, 60, 66]
    assert portions([64, 64, 64], 130) == [64, 64, 0]


def test_a_shorter_one_behind_one_that_does_not_fit_is_read_now() -> None:
    assert portions([100, 500, 28], 130) == [100, 0, 28]


def test_only_the_first_is_cut() -> None:
    assert portions([600, 10], 512) == [512, 0]
    assert portions([0, 600, 10], 512) == [0, 512, 0]


@given(lacks=st.lists(st.integers(0, 700), min_size=1, max_size=20), room=st.integers(1, 512))
def test_nobody_reads_more_than_it_lacks_or_than_there_is_room_for_and_somebody_reads(lacks: list[int], room: int) -> None:
    shares = portions(lacks, room)
    assert all(0 <= share <= lack for share, lack in zip(shares, lacks, strict=True))
    assert sum(shares) <= room
    assert any(shares) == any(lacks)

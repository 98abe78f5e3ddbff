"""The waitlist by itself: precedence, ageing, bounds. See also: `test_state_waitlist.py`, for what comes of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.events import AgentSpec, RegisterRequested, RequestId, Rung
from conductor.core.waitlist import Waitlist, seniority
from conductor.types import AgentId, ContextSpec
from tests.support.stories import ALPHA

AGEING_S = 60.0


def request(id: int, priority: int = 0, *, may_wait: bool = True) -> RegisterRequested:
    spec = AgentSpec(AgentId(f"agent-{id}"), ALPHA, ContextSpec(window=50), (Rung(50, 50),), priority=priority)
    return RegisterRequested(RequestId(id), spec, may_wait)


def in_line(waitlist: Waitlist, at: float) -> list[int]:
    return [waiting.request.request_id for waiting in waitlist.in_order(at)]


@pytest.fixture
def waitlist() -> Waitlist:
    return Waitlist(limit=3, ageing_s=AGEING_S)


def test_each_ageing_time_counts_as_one_priority() -> None:
    assert seniority(2, waited_s=0.0, ageing_s=AGEING_S) == 2
    assert seniority(2, waited_s=90.0, ageing_s=AGEING_S) == 3.5
    assert seniority(-1, waited_s=120.0, ageing_s=AGEING_S) == 1


def test_first_come_first_served_within_a_priority(waitlist: Waitlist) -> None:
    for id in (3, 1, 2):
        waitlist.add(request(id), at=0.0)
    assert in_line(waitlist, at=0.0) == [3, 1, 2]


def test_a_higher_priority_goes_first(waitlist: Waitlist) -> None:
    for id, priority in ((1, -1), (2, 0), (3, 5)):
        waitlist.add(request(id, priority), at=0.0)
    assert in_line(waitlist, at=0.0) == [3, 2, 1]


def test_whoever_waited_as_many_ageing_times_as_priorities_lie_between_is_ahead(waitlist: Waitlist) -> None:
    waitlist.add(request(1, 0), at=0.0)
    waitlist.add(request(2, 2), at=119.0)
    waitlist.add(request(3, 2), at=121.0)
    assert in_line(waitlist, at=121.0) == [2, 1, 3]


@pytest.mark.parametrize(("priority", "waited_s", "ahead"), [(0, 0.0, 1), (1, 0.0, 0), (1, 59.0, 0), (1, 60.0, 1), (-1, 0.0, 1)])
def test_a_newcomer_does_not_overtake_its_equals(waitlist: Waitlist, priority: int, waited_s: float, ahead: int) -> None:
    waitlist.add(request(1), at=0.0)
    assert waitlist.ahead_of(priority, at=waited_s) == ahead


def test_it_is_full_when_as_many_wait_as_may(waitlist: Waitlist) -> None:
    for id in (1, 2, 3):
        assert not waitlist.full
        waitlist.add(request(id), at=0.0)
    assert waitlist.full
    waitlist.remove(RequestId(2))
    assert not waitlist.full


def test_whose_room_is_only_being_cleared_does_not_count(waitlist: Waitlist) -> None:
    for id in range(9):
        waitlist.add(request(id, may_wait=False), at=0.0)
    assert (len(waitlist), waitlist.full) == (9, False)


def test_whoever_is_taken_out_is_gone_and_whoever_was_never_there_is_nobody(waitlist: Waitlist) -> None:
    waitlist.add(request(1), at=0.0)
    assert waitlist.remove(RequestId(1)) == request(1)
    assert waitlist.remove(RequestId(1)) is None
    assert waitlist.remove(RequestId(2)) is None
    assert list(waitlist) == []


def test_it_can_be_walked_while_some_are_taken_out(waitlist: Waitlist) -> None:
    for id, priority in ((1, 0), (2, 9)):
        waitlist.add(request(id, priority), at=0.0)
    seen = []
    for waiting in waitlist:
        seen.append(waiting.request.request_id)
        waitlist.remove(waiting.request.request_id)
    assert seen == [1, 2], "in the order of their arrival"


arrivals = st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 500)), max_size=8)


@given(arrivals, st.floats(0, 10_000))
def test_those_who_wait_keep_their_order_however_long_they_wait(arrivals: list[tuple[int, float]], later: float) -> None:
    waitlist, at = Waitlist(limit=99, ageing_s=64.0), 0.0
    for id, (priority, pause) in enumerate(arrivals):
        at += round(pause)  # whole seconds, and 64ths of them: all sums are exact
        waitlist.add(request(id, priority), at)
    later = at + round(later)
    assert in_line(waitlist, later) == in_line(waitlist, at)


@given(st.integers(-1000, 1000), st.integers(-1000, 1000), st.floats(1.0, 1000.0))
def test_nobody_is_kept_out_by_newcomers_for_longer_than_the_difference_in_priority(low: int, high: int, ageing_s: float) -> None:
    waitlist = Waitlist(limit=1, ageing_s=ageing_s)
    waitlist.add(request(1, low), at=0.0)
    patience = max(0, high - low) * ageing_s * (1 + 1e-9)
    assert waitlist.ahead_of(high, at=patience) == 1

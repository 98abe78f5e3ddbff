"""What leaves the device when somebody needs its room: in which order, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.moment import Drain, LivePool, Park, Sitter, Step, Weights
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.core.turns import plan_eviction
from conductor.types import AgentId, ModelState
from tests.support.moments import Place, closing, drain, live, loose, opening, park, picture, pool, runs, sits


def evict(
    bytes: int, places: Sequence[Place], models: Sequence[Weights] = (), *, last: tuple[str, ...] = (), busy_too: bool = False
) -> list[Step]:
    moment = picture((), places, models, room=0)
    return plan_eviction(moment, bytes=bytes, last=frozenset(AgentId(agent) for agent in last), busy_too=busy_too)


def emptied(pool: str) -> Drain:
    return drain(pool, for_turn=None)


# --- what is idle -------------------------------------------------------------------------------------------------------


def test_nothing_leaves_for_nothing() -> None:
    assert evict(0, [live("a", "m", bytes=10)]) == []
    assert evict(-5, [live("a", "m", bytes=10)]) == []


def test_as_much_leaves_as_brings_the_bytes_and_no_more() -> None:
    places = [live(name, name, bytes=30, last_turn=i) for i, name in enumerate("abc")]
    assert evict(30, places) == [emptied("a")]
    assert evict(31, places) == [emptied("a"), emptied("b")]
    assert evict(1000, places) == [emptied("a"), emptied("b"), emptied("c")]


def test_what_was_used_longest_ago_leaves_first() -> None:
    places = [live("a", "m", bytes=10, last_turn=3), live("b", "n", bytes=10, last_turn=1), live("c", "o", bytes=10, last_turn=2)]
    assert evict(15, places) == [emptied("n"), emptied("o")]


def test_a_pool_was_used_when_the_last_of_its_agents_was() -> None:
    places = [pool("m", sits("a", last_turn=1), sits("b", last_turn=9), bytes=5, slots=2), live("c", "n", bytes=10, last_turn=8)]
    assert evict(10, places) == [emptied("n")]


def test_a_pool_in_which_nobody_sits_leaves_first() -> None:
    assert evict(10, [live("a", "m", bytes=10, last_turn=1, best_effort=True), pool("n", bytes=10)]) == [emptied("n")]


def test_best_effort_agents_pools_and_weights_leave_before_shared_agents_pools() -> None:
    places = [live("shared", "m", bytes=10, last_turn=1), live("best", "n", bytes=10, last_turn=8, best_effort=True)]
    assert evict(25, places, [loose("o", bytes=10, last_turn=9)]) == [emptied("n"), park("o"), emptied("m")]


def test_a_pool_with_a_shared_agent_in_it_is_a_shared_agents() -> None:
    both = pool("m", sits("a", last_turn=1, best_effort=True), sits("b", last_turn=1), bytes=5, slots=2)
    assert evict(10, [both, live("c", "n", bytes=10, last_turn=9, best_effort=True)]) == [emptied("n")]


def test_the_pool_of_whoever_has_a_turn_in_line_stays_if_others_suffice() -> None:
    places = [
        live("wanted", "m", bytes=10, last_turn=1, best_effort=True),
        live("idle", "n", bytes=10, last_turn=2),
    ]
    assert evict(10, places, last=("wanted",)) == [emptied("n")]
    assert evict(11, places, last=("wanted",)) == [emptied("n"), emptied("m")]


def test_what_is_leaving_already_counts() -> None:
    places = [closing("m", bytes=30), live("b", "n", bytes=30)]
    models = [loose("o", ModelState.UNLOADING, bytes=20)]
    assert evict(50, places, models) == []
    assert evict(51, places, models) == [emptied("n")]


def test_what_is_on_its_way_in_stays() -> None:
    places = [opening("m", bytes=30), live("a", "n", Phase.TAKING, bytes=30)]
    assert evict(10, places, [loose("o", ModelState.LOADING)], busy_too=False) == []


def test_weights_under_a_pool_stay_until_it_is_gone_and_count_when_it_goes() -> None:
    models = [loose("m", bytes=60)]
    assert evict(90, [live("a", "m", bytes=30, best_effort=True), live("b", "n", bytes=9)], models) == [emptied("m")]
    assert evict(90, [closing("m", bytes=30), live("b", "n", bytes=9)], models) == []
    assert evict(91, [closing("m", bytes=30), live("b", "n", bytes=9)], models) == [emptied("n")]
    assert evict(60, [], models) == [park("m")]


def test_weights_that_will_be_idle_once_their_pool_is_gone_leave_before_a_shared_agents_pool() -> None:
    places = [live("best", "m", bytes=10, last_turn=1, best_effort=True), live("shared", "n", bytes=50, last_turn=2)]
    assert evict(50, places, [loose("m", bytes=60)]) == [emptied("m")]


def test_what_is_guaranteed_or_firm_stays() -> None:
    assert evict(10, [live("g", "m", bytes=100, guaranteed=True)], busy_too=True) == []


# --- what is busy -------------------------------------------------------------------------------------------------------


def busy() -> list[Place]:
    return [pool("m", runs(8, "a", served=1), bytes=30), pool("n", runs(9, "b", served=2), bytes=30)]


def test_what_is_busy_stays_unless_turns_may_stand_still_for_it() -> None:
    assert evict(30, busy()) == []
    assert evict(30, busy(), busy_too=True) == [emptied("n")]
    assert evict(31, busy(), busy_too=True) == [emptied("n"), emptied("m")], "the lowest rank first"


def test_what_idles_leaves_before_what_is_busy() -> None:
    assert evict(30, [*busy(), live("c", "o", bytes=30)], busy_too=True) == [emptied("o")]
    assert evict(31, [*busy(), live("c", "o", bytes=30)], busy_too=True) == [emptied("o"), emptied("n")]


@pytest.mark.parametrize("sitter", [runs(9, "a", may_pause=False), sits("a", Phase.TAKING)])
def test_it_leaves_whether_its_turns_ran_their_minimum_or_not(sitter: Sitter) -> None:
    assert evict(10, [pool("m", sitter, bytes=10, settled=False)], busy_too=True) == [emptied("m")]


def test_the_weights_under_it_count() -> None:
    places = [pool("m", runs(8, "a", served=2, best_effort=True), bytes=30), pool("n", runs(9, "b", served=1), bytes=30)]
    assert evict(90, places, [loose("m", bytes=60)], busy_too=True) == [emptied("m")]


# --- in general ---------------------------------------------------------------------------------------------------------

sizes = st.integers(0, 50)
PHASES = st.sampled_from([None, *Phase])


@given(
    need=st.integers(0, 300),
    seats=st.lists(st.tuples(PHASES, sizes, st.integers(0, 9), st.booleans(), st.booleans()), max_size=6),
    weights=st.lists(st.tuples(st.sampled_from(ModelState), sizes, st.integers(0, 9)), max_size=4),
    busy_too=st.booleans(),
)
def test_enough_leaves_if_there_is_enough_and_each_that_leaves_is_needed(
    need: int,
    seats: list[tuple[Phase | None, int, int, bool, bool]],
    weights: list[tuple[ModelState, int, int]],
    busy_too: bool,
) -> None:
    places = [
        closing(f"m{i}", bytes=size) if phase is None
        else live(f"a{i}", f"m{i}", phase, bytes=size, last_turn=last_turn, best_effort=best_effort)
        for i, (phase, size, last_turn, best_effort, _) in enumerate(seats)
    ]  # fmt: skip
    models = [loose(f"w{i}", state, bytes=size, last_turn=last_turn) for i, (state, size, last_turn) in enumerate(weights)]
    last = tuple(f"a{i}" for i, seat in enumerate(seats) if seat[-1])
    size_of: dict[str, int] = {place.pool.id: place.pool.bytes for place in places} | {it.model_id: it.bytes for it in models}
    coming = sum(place.pool.bytes for place in places if place.pool.phase is PoolPhase.CLOSING)
    coming += sum(it.bytes for it in models if it.state is ModelState.UNLOADING)
    idle = {place.pool.id for place in places if _idles(place)}
    there = [place.pool for place in places if place.pool.id in idle or (busy_too and _is_there(place.pool))]
    can_leave = sum(it.bytes for it in there) + sum(it.bytes for it in models if it.state is ModelState.RESIDENT)

    steps = evict(need, places, models, last=last, busy_too=busy_too)
    brings = [size_of[_subject(step)] for step in steps]
    assert coming + sum(brings) >= min(need, coming + can_leave)
    assert all(coming + sum(brings[:i]) < need for i in range(len(brings))), "the last one was not needed"
    left = {_subject(step) for step in steps}
    if any(place.pool.id in left and _sits_one_of(last, place) for place in places if place.pool.id in idle):
        assert {place.pool.id for place in places if place.pool.id in idle and not _sits_one_of(last, place)} <= left


def _idles(place: Place) -> bool:
    return _is_there(place.pool) and all(sitter.phase in (Phase.READY, Phase.LEAVING) for sitter in place.sitters)


def _is_there(pool: LivePool) -> bool:
    return pool.phase is PoolPhase.READY


def _sits_one_of(agents: tuple[str, ...], place: Place) -> bool:
    return any(sitter.agent_id in agents for sitter in place.sitters)


def _subject(step: Step) -> str:
    assert isinstance(step, (Drain, Park)), step
    return step.pool if isinstance(step, Drain) else step.model_id

"""Whose turn is next: the ten numbered rules as stories, with one seat in each pool but for rule 4.

See also: `test_turns_pools.py`, for pools with several slots, and `test_turns_laws.py`, for what must hold of every plan.
"""

from __future__ import annotations

import pytest

from conductor.core.moment import Start, Step, WaitingTurn
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.types import ModelState
from tests.support.moments import (
    Place,
    closing,
    drain,
    leave,
    live,
    load,
    loose,
    open_,
    opening,
    park,
    plan,
    pool,
    runs,
    sits,
    start,
    take,
    turn,
)

ON_ITS_WAY = (ModelState.LOADING, ModelState.UNLOADING)


def test_nobody_waits_and_nothing_is_done() -> None:
    assert plan([], [live("a", "m")]) == []


# --- 1: ready and large enough ----------------------------------------------------------------------------------------


def test_1_an_agent_whose_seat_is_ready_starts_at_once() -> None:
    assert plan([turn(1, "a", "m")], [live("a", "m")]) == [start(1, "a")]


def test_1_of_two_turns_of_one_agent_only_the_first_starts() -> None:
    assert plan([turn(1, "a", "m"), turn(2, "a", "m")], [live("a", "m")]) == [start(1, "a")]


def test_1_a_turn_that_waits_for_something_else_holds_up_the_later_turns_of_its_agent_and_nobody_else() -> None:
    waiting = [turn(1, "a", "m", blocked=True), turn(2, "a", "m"), turn(3, "b", "n")]
    assert plan(waiting, [live("a", "m"), live("b", "n")], live_contexts=2) == [start(3, "b")]


def test_1_the_pool_of_a_turn_that_waits_for_something_else_makes_room_like_any_other() -> None:
    waiting = [turn(1, "a", "m", blocked=True), turn(2, "b", "n")]
    assert plan(waiting, [live("a", "m")]) == [drain("m", for_turn=2)]


@pytest.mark.parametrize(("tokens", "step"), [(100, start(1, "a")), (101, drain("m", for_turn=1))])
def test_1_a_turn_needs_a_window_with_room_for_its_session_to_the_token(tokens: int, step: Step) -> None:
    assert plan([turn(1, "a", "m", window=200, tokens=tokens)], [live("a", "m", window=100)]) == [step]


def test_1_whoever_is_ready_starts_even_where_strangers_took_the_room() -> None:
    assert plan([turn(1, "a", "m", bytes=50)], [live("a", "m", bytes=50)], room=-10) == [start(1, "a")]


# --- 2: ready and too small -------------------------------------------------------------------------------------------


def larger(bytes: int) -> WaitingTurn:
    """A turn of `a` that its pool is too small for."""
    return turn(1, "a", "m", bytes=bytes, window=bytes, tokens=bytes)


def test_2_a_pool_that_is_too_small_is_emptied_for_its_own_turn_and_nobody_elses_if_the_bytes_are_there() -> None:
    places = [live("a", "m", bytes=50, window=50), live("b", "n", bytes=20)]
    assert plan([larger(80)], places, live_contexts=2, room=100) == [drain("m", for_turn=1)]


def test_2_the_larger_pool_takes_its_bytes_from_what_is_idle() -> None:
    places = [live("a", "m", bytes=50, window=50), live("b", "n", bytes=20)]
    assert plan([larger(81)], places, live_contexts=2, room=100) == [drain("m", for_turn=1), drain("n", for_turn=1)]


def test_2_the_place_that_becomes_free_is_its_own_and_nobody_elses() -> None:
    waiting = [larger(80), turn(2, "b", "n", bytes=10)]
    assert plan(waiting, [live("a", "m", bytes=50, window=50)], room=1000) == [drain("m", for_turn=1)]


def test_2_whoever_has_no_seat_in_a_pool_that_is_too_small_has_it_emptied_too() -> None:
    places = [pool("m", sits("b"), bytes=50, window=50, slots=2)]
    assert plan([larger(80)], places, room=1000) == [drain("m", for_turn=1)], "its free seat would not do"


def test_2_the_weights_of_a_pool_that_is_made_anew_stay() -> None:
    places, models = [live("a", "m", bytes=50, window=50)], [loose("m", bytes=60)]
    waiting = [larger(80), turn(2, "b", "n", bytes=60)]
    assert plan(waiting, places, models, live_contexts=2, room=200) == [drain("m", for_turn=1)]


# --- 3: on its way, in or out, or busy --------------------------------------------------------------------------------

under_way = pytest.mark.parametrize(
    "place",
    [
        live("a", "m", Phase.TAKING, bytes=50),
        live("a", "m", Phase.BUSY, bytes=50),
        live("a", "m", Phase.LEAVING, bytes=50),
        opening("m", bytes=50),
    ],
)


@under_way
def test_3_an_agent_whose_seat_is_on_its_way_or_busy_waits_for_it(place: Place) -> None:
    assert plan([turn(1, "a", "m")], [place], live_contexts=2) == []


@under_way
def test_3_nobody_behind_it_is_held_up(place: Place) -> None:
    waiting = [turn(1, "a", "m", bytes=50), turn(2, "b", "n", bytes=50)]
    assert plan(waiting, [place], live_contexts=2, room=100) == [open_(waiting[1])]


def test_3_a_pool_that_is_emptied_under_its_agent_is_waited_for_and_its_place_kept() -> None:
    places = [pool("m", sits("a", Phase.LEAVING), phase=PoolPhase.DRAINING)]
    assert plan([turn(1, "a", "m"), turn(2, "b", "n")], places) == []


# --- 4: a seat in its pool --------------------------------------------------------------------------------------------


def test_4_a_free_seat_is_taken() -> None:
    assert plan([turn(1, "b", "m")], [pool("m", runs(9, "a"), slots=2)]) == [take(1, "b")]


def test_4_an_idle_one_gives_way_even_with_places_free() -> None:
    assert plan([turn(1, "b", "m")], [live("a", "m")], live_contexts=3) == [leave("a", for_turn=1)]


def test_4_a_busy_pool_of_its_model_is_waited_for_and_nobody_else_gives_way() -> None:
    places = [live("a", "m", Phase.BUSY), live("x", "n")]
    assert plan([turn(1, "b", "m")], places, live_contexts=2) == []


def test_4_two_who_want_the_same_seat_make_one_leave() -> None:
    assert plan([turn(1, "b", "m"), turn(2, "c", "m")], [live("a", "m")], live_contexts=2) == [leave("a", for_turn=1)]


def test_4_two_agents_of_one_model_never_open_a_pool_each() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "m"), turn(3, "c", "n")]
    assert plan(waiting, [], live_contexts=3) == [open_(waiting[0]), open_(waiting[2])]


def test_4_a_second_agent_of_the_same_model_evicts_nobody_it_has_to_wait_for_the_first_anyway() -> None:
    places = [live("x", "n", last_turn=1), live("y", "o", last_turn=2)]
    waiting = [turn(1, "b", "m"), turn(2, "c", "m")]
    assert plan(waiting, places, live_contexts=2) == [drain("n", for_turn=1)]


def test_4_a_guaranteed_agents_pool_of_the_same_model_has_no_seat_for_others() -> None:
    waiting = [turn(1, "a", "m", bytes=50)]
    assert plan(waiting, [live("g", "m", guaranteed=True, bytes=70)], room=50) == [open_(waiting[0])]


# --- 5: it would not fit even if all others left ----------------------------------------------------------------------


def test_5_a_turn_that_no_eviction_makes_room_for_waits_without_holding_anybody_up() -> None:
    waiting = [turn(1, "a", "m", bytes=101), turn(2, "b", "n", bytes=100)]
    assert plan(waiting, [], room=100) == [open_(waiting[1])]


def test_5_it_evicts_nobody_in_vain() -> None:
    assert plan([turn(1, "a", "m", bytes=101)], [live("c", "n", bytes=50)], live_contexts=2, room=100) == []
    assert plan([larger(101)], [live("a", "m", bytes=50, window=50)], live_contexts=2, room=100) == []


def test_5_the_weights_that_it_would_have_to_load_count() -> None:
    models = [loose("m", ModelState.PARKED, bytes=60)]
    waiting = [turn(1, "a", "m", bytes=41), turn(2, "b", "n", bytes=41)]
    assert plan(waiting, [], models, room=100) == [open_(waiting[1])]


def test_5_the_weights_that_are_there_already_count_as_well_they_stay_while_its_turn_runs() -> None:
    models = [loose("m", ModelState.RESIDENT, bytes=60)]
    waiting = [turn(1, "a", "m", bytes=41), turn(2, "b", "n", bytes=40)]
    assert plan(waiting, [], models, room=100) == [open_(waiting[1])]


# --- 6: its model's weights are on their way --------------------------------------------------------------------------


@pytest.mark.parametrize("state", ON_ITS_WAY)
def test_6_weights_on_their_way_are_waited_for(state: ModelState) -> None:
    assert plan([turn(1, "a", "m", bytes=40)], [], [loose("m", state, bytes=60)], room=1000) == []


def test_6_the_room_that_its_pool_will_need_is_kept_for_it() -> None:
    models = [loose("m", ModelState.LOADING, bytes=60)]
    waiting = [turn(1, "a", "m", bytes=30), turn(2, "b", "n", bytes=11)]
    assert plan(waiting, [], models, live_contexts=2, room=100) == []
    assert plan(waiting, [], models, live_contexts=2, room=101) == [open_(waiting[1])]


def test_6_so_is_its_place() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "n")]
    assert plan(waiting, [], [loose("m", ModelState.LOADING)], live_contexts=1, room=1000) == []


# --- 7: a place and the bytes are free --------------------------------------------------------------------------------


def test_7_a_pool_is_opened_in_a_free_place() -> None:
    waiting = [turn(1, "a", "m")]
    assert plan(waiting, []) == [open_(waiting[0])]


def test_7_each_free_place_is_given_once_in_order() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "n"), turn(3, "c", "o")]
    assert plan(waiting, [], live_contexts=2) == [open_(waiting[0]), open_(waiting[1])]


@pytest.mark.parametrize(("room", "opened"), [(100, 2), (99, 1)])
def test_7_each_free_byte_is_given_once_in_order(room: int, opened: int) -> None:
    waiting = [turn(1, "a", "m", bytes=60), turn(2, "b", "n", bytes=40)]
    assert plan(waiting, [], live_contexts=3, room=room) == [open_(it) for it in waiting[:opened]]


def test_7_parked_weights_are_loaded_first() -> None:
    assert plan([turn(1, "a", "m", bytes=40)], [], [loose("m", ModelState.PARKED, bytes=60)], room=100) == [load("m")]


def test_7_two_turns_load_two_models_if_both_fit_with_their_pools() -> None:
    models = [loose("m", ModelState.PARKED, bytes=60), loose("n", ModelState.PARKED, bytes=60)]
    waiting = [turn(1, "a", "m", bytes=40), turn(2, "b", "n", bytes=40)]
    assert plan(waiting, [], models, live_contexts=2, room=200) == [load("m"), load("n")]
    assert plan(waiting, [], models, live_contexts=2, room=199) == [load("m")]


def test_7_weights_that_stay_are_no_part_of_the_room_for_turns() -> None:
    waiting = [turn(1, "a", "m", bytes=50)]
    assert plan(waiting, [], room=50) == [open_(waiting[0])]


# --- 8: places or bytes are becoming free -----------------------------------------------------------------------------


def test_8_a_place_that_is_becoming_free_is_waited_for() -> None:
    assert plan([turn(1, "c", "o")], [closing("m"), live("b", "n")], live_contexts=2) == []


def test_8_a_place_that_is_becoming_free_is_waited_for_by_one_only() -> None:
    waiting = [turn(1, "c", "o"), turn(2, "d", "p")]
    assert plan(waiting, [closing("m"), live("b", "n")], live_contexts=2) == [drain("n", for_turn=2)]


def test_8_two_agents_of_a_closing_pools_model_wait_for_one_place_not_for_two() -> None:
    places = [closing("m"), closing("n"), live("y", "o")]
    waiting = [turn(1, "b", "m"), turn(2, "c", "m"), turn(3, "d", "p")]
    assert plan(waiting, places, live_contexts=3) == [], "n's place is becoming free for d: y may stay"


def test_8_a_place_that_an_agent_of_its_model_waits_for_is_no_other_models() -> None:
    waiting = [turn(1, "b", "m"), turn(2, "d", "p")]
    assert plan(waiting, [closing("m"), live("y", "n")], live_contexts=2) == [drain("n", for_turn=2)]


def test_8_bytes_that_are_becoming_free_are_waited_for_by_as_many_as_they_suffice_for() -> None:
    places = [closing("m", bytes=100), live("b", "n", bytes=50)]
    waiting = [turn(1, "c", "o", bytes=60), turn(2, "d", "p", bytes=40), turn(3, "e", "q", bytes=1)]
    assert plan(waiting[:2], places, live_contexts=9, room=150) == []
    assert plan(waiting, places, live_contexts=9, room=150) == [drain("n", for_turn=3)]


def test_8_weights_that_are_leaving_bring_bytes_too() -> None:
    models = [loose("m", ModelState.UNLOADING, bytes=60)]
    assert plan([turn(1, "b", "n", bytes=160)], [live("x", "o", bytes=40)], models, live_contexts=2, room=200) == []
    steps = plan([turn(1, "b", "n", bytes=161)], [live("x", "o", bytes=40)], models, live_contexts=2, room=200)
    assert steps == [drain("o", for_turn=1)]


def test_8_so_do_weights_that_will_be_idle_once_the_pool_above_them_is_gone() -> None:
    places, models = [closing("m", bytes=10), live("x", "o", bytes=90)], [loose("m", bytes=100)]
    assert plan([turn(1, "b", "n", bytes=110)], places, models, live_contexts=3, room=200) == []
    assert plan([turn(1, "b", "n", bytes=111)], places, models, live_contexts=3, room=200) == [drain("o", for_turn=1)]


# --- 9: send away what is idle ----------------------------------------------------------------------------------------


def test_9_the_pool_used_longest_ago_is_emptied() -> None:
    places = [live("a", "m", last_turn=2), live("b", "n", last_turn=1), live("c", "o", last_turn=3)]
    assert plan([turn(1, "d", "p")], places, live_contexts=3) == [drain("n", for_turn=1)]


def test_9_a_best_effort_agents_pool_goes_before_a_shared_one_used_longer_ago() -> None:
    places = [live("a", "m", last_turn=1), live("b", "n", last_turn=2, best_effort=True)]
    assert plan([turn(1, "d", "p")], places, live_contexts=2) == [drain("n", for_turn=1)]


def test_9_weights_that_only_best_effort_agents_use_are_parked_before_a_shared_agents_pool_goes() -> None:
    models = [loose("m", bytes=60, last_turn=9)]
    assert plan([turn(1, "d", "p", bytes=60)], [live("a", "n", bytes=60)], models, live_contexts=2, room=120) == [park("m")]


def test_9_among_best_effort_agents_pools_and_weights_go_by_their_last_use() -> None:
    places, models = [live("a", "n", bytes=60, last_turn=5, best_effort=True)], [loose("m", bytes=60, last_turn=6)]
    assert plan([turn(1, "d", "p", bytes=60)], places, models, live_contexts=2, room=120) == [drain("n", for_turn=1)]


def test_9_as_many_go_as_bring_the_bytes_and_no_more() -> None:
    places = [live(name, name, bytes=30, last_turn=i) for i, name in enumerate("abcd")]
    steps = plan([turn(1, "x", "p", bytes=40)], places, live_contexts=9, room=120)
    assert steps == [drain("a", for_turn=1), drain("b", for_turn=1)]


def test_9_whoever_just_began_is_left_alone_however_long_ago_its_last_turn_was() -> None:
    places = [live("a", "m", Phase.BUSY, last_turn=1), live("b", "n", last_turn=2)]
    assert plan([turn(1, "c", "o")], places, live_contexts=2) == [drain("n", for_turn=1)]


@pytest.mark.parametrize("phase", Phase)
def test_9_weights_under_a_live_pool_are_left_alone(phase: Phase) -> None:
    places = [live("a", "m", phase)]
    assert park("m") not in plan([turn(1, "b", "n", bytes=50)], places, [loose("m", bytes=60)], live_contexts=2, room=100)


def test_9_weights_that_an_earlier_turn_needs_are_left_alone() -> None:
    waiting = [turn(1, "a", "m", bytes=10), turn(2, "b", "n", bytes=50)]
    assert plan(waiting, [], [loose("m", bytes=60)], live_contexts=2, room=100) == [open_(waiting[0])]


def test_9_weights_under_a_pool_that_leaves_for_one_turn_are_counted_for_the_next_one_too() -> None:
    places = [live("a", "m", bytes=10, best_effort=True), live("x", "o", bytes=90)]
    waiting = [turn(1, "b", "n", bytes=60), turn(2, "c", "p", bytes=50)]
    steps = plan(waiting, places, [loose("m", bytes=100)], live_contexts=9, room=200)
    assert steps == [drain("m", for_turn=1)], "110 bytes for both"


def test_9_a_ready_agent_that_is_first_in_line_itself_is_not_evicted() -> None:
    places = [live("a", "m", last_turn=1), live("b", "n", last_turn=2)]
    waiting = [turn(1, "a", "m"), turn(2, "c", "o")]
    assert plan(waiting, places, live_contexts=2) == [start(1, "a"), drain("n", for_turn=2)]


def test_9_whoever_is_further_back_in_line_gives_way() -> None:
    assert plan([turn(1, "b", "n"), turn(2, "a", "m")], [live("a", "m")]) == [drain("m", for_turn=1)]


def test_9_the_pool_that_leaves_for_its_place_brings_its_bytes_too() -> None:
    places = [live("a", "m", bytes=60, last_turn=1), live("b", "n", bytes=60, last_turn=2)]
    assert plan([turn(1, "c", "o", bytes=60)], places, live_contexts=2, room=120) == [drain("m", for_turn=1)]


def test_9_a_guaranteed_agents_pool_is_never_sent_away() -> None:
    places = [live("g", "m", bytes=500, guaranteed=True)]
    assert plan([turn(1, "a", "n", bytes=50)], places, room=40) == []
    waiting = [turn(1, "a", "n", bytes=40)]
    assert plan(waiting, places, room=40) == [open_(waiting[0])], "nor in anybody's way"


# --- 10: wait for turns to end ----------------------------------------------------------------------------------------


def test_10_otherwise_one_waits() -> None:
    assert plan([turn(1, "b", "n")], [live("a", "m", Phase.BUSY)]) == []
    assert plan([turn(1, "b", "n")], [opening("m")]) == []


def test_10_nobody_behind_takes_the_bytes_that_were_freed_so_far() -> None:
    waiting = [turn(1, "b", "n", bytes=80), turn(2, "c", "o", bytes=10)]
    assert plan(waiting, [live("a", "m", Phase.BUSY, bytes=50)], live_contexts=3, room=100) == []
    assert plan(waiting[1:], [live("a", "m", Phase.BUSY, bytes=50)], live_contexts=3, room=100) == [open_(waiting[1])]


def test_10_whoever_is_ready_behind_it_starts_it_takes_nothing() -> None:
    waiting = [turn(1, "b", "n", bytes=80), turn(2, "c", "o", bytes=50), turn(3, "g", "o")]
    places = [live("a", "m", Phase.BUSY, bytes=50), live("g", "o", bytes=10, guaranteed=True)]
    assert plan(waiting, places, live_contexts=3, room=100) == [start(3, "g")]


# --- guaranteed agents ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "steps"), [(Phase.READY, [start(2, "g")]), (Phase.BUSY, [])])
def test_a_guaranteed_agents_turn_starts_or_waits_for_its_own_earlier_one_and_nothing_else(
    phase: Phase, steps: list[Start]
) -> None:
    crowd = [live("a", "m", Phase.BUSY, bytes=90), live("g", "m", phase, bytes=50, window=50, guaranteed=True)]
    assert plan([turn(1, "b", "m", bytes=90), turn(2, "g", "m")], crowd, room=100) == steps

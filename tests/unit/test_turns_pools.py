"""Pools with several slots: who gets a seat, who makes way for whom, which pool is made, and when one is made anew.

See also: `test_turns.py`, for the ten rules.
"""

from __future__ import annotations

import pytest

from conductor.core.moment import Prospect, Sitter, Step, WaitingTurn
from conductor.core.sessions import Phase
from conductor.types import ModelState
from tests.support.moments import (
    closing,
    drain,
    leave,
    live,
    load,
    loose,
    open_,
    park,
    pause,
    plan,
    pool,
    runs,
    sits,
    start,
    take,
    turn,
)

# --- free seats ---------------------------------------------------------------------------------------------------------


def test_each_free_seat_is_given_once_in_order() -> None:
    waiting = [turn(1, "b", "m"), turn(2, "c", "m"), turn(3, "d", "m")]
    places = [pool("m", runs(9, "a", may_pause=False), slots=3)]
    assert plan(waiting, places) == [take(1, "b"), take(2, "c")]


@pytest.mark.parametrize("leaver", [sits("x", Phase.LEAVING), runs(9, "x", pausing=True)])
def test_a_seat_that_becomes_free_is_waited_for_by_one_only(leaver: Sitter) -> None:
    places = [pool("m", leaver, sits("y"), slots=2)]
    assert plan([turn(1, "b", "m")], places) == []
    assert plan([turn(1, "b", "m"), turn(2, "c", "m")], places) == [leave("y", for_turn=2)]


def test_those_who_sit_start_and_those_who_stand_sit_down_in_one_plan() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "m"), turn(3, "c", "m")]
    assert plan(waiting, [pool("m", sits("a"), sits("b"), slots=3)]) == [start(1, "a"), start(2, "b"), take(3, "c")]


def test_nobody_leaves_while_a_seat_is_free() -> None:
    assert plan([turn(1, "b", "m")], [pool("m", sits("a"), slots=2)]) == [take(1, "b")]


# --- idle ones give way -------------------------------------------------------------------------------------------------


def test_the_idle_one_used_longest_ago_gives_way() -> None:
    places = [pool("m", sits("a", last_turn=3), sits("b", last_turn=1), sits("c", last_turn=2), slots=3)]
    assert plan([turn(1, "x", "m"), turn(2, "y", "m")], places) == [leave("b", for_turn=1), leave("c", for_turn=2)]


def test_a_best_effort_agent_gives_way_before_a_shared_one_used_longer_ago() -> None:
    places = [pool("m", sits("a", last_turn=1), sits("b", last_turn=2, best_effort=True), slots=2)]
    assert plan([turn(1, "x", "m")], places) == [leave("b", for_turn=1)]


def test_whoever_has_a_turn_waiting_gives_way_last_even_if_best_effort() -> None:
    places = [pool("m", sits("a", last_turn=9), sits("b", last_turn=1, best_effort=True), slots=2)]
    assert plan([turn(1, "x", "m"), turn(2, "b", "m")], places) == [leave("a", for_turn=1), start(2, "b")]


def test_a_seat_whose_agent_starts_in_this_plan_is_not_left_for_somebody_behind() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "x", "m")]
    assert plan(waiting, [live("a", "m")]) == [start(1, "a")]


# --- running ones stand still -------------------------------------------------------------------------------------------


def crowd(*, may_pause: bool = True) -> list[Step]:
    """What is done for a turn of priority 5 with 100 tokens served, where three run."""
    running = [
        runs(7, "a", priority=5, served=10, may_pause=may_pause),
        runs(8, "b", priority=5, served=300, may_pause=may_pause),
        runs(9, "c", priority=5, served=200, may_pause=may_pause),
    ]
    return plan([turn(1, "x", "m", priority=5, served=100)], [pool("m", *running, slots=3)])


def test_of_those_who_run_the_one_that_had_most_stands_still() -> None:
    assert crowd() == [pause(8)]


def test_nobody_stands_still_before_it_ran_its_minimum() -> None:
    assert crowd(may_pause=False) == []


def test_a_lower_priority_stands_still_before_a_larger_share() -> None:
    places = [pool("m", runs(8, "b", priority=1, served=900), runs(9, "c", priority=0, served=1), slots=2)]
    assert plan([turn(1, "x", "m", priority=2)], places) == [pause(9)]


@pytest.mark.parametrize("rank", [(0, 100), (1, 500)])
def test_nobody_stands_still_for_an_equal_or_for_a_lower_rank(rank: tuple[int, int]) -> None:
    priority, served = rank
    places = [pool("m", runs(9, "a", priority=priority, served=served))]
    assert plan([turn(1, "x", "m", served=100)], places) == []


def test_each_turn_makes_another_one_stand_still() -> None:
    waiting = [turn(1, "x", "m", served=1), turn(2, "y", "m", served=1), turn(3, "z", "m", served=1)]
    places = [pool("m", runs(8, "a", served=5), runs(9, "b", served=6), slots=2)]
    assert plan(waiting, places) == [pause(9), pause(8)]


def test_nobody_stands_still_while_somebody_idles() -> None:
    places = [pool("m", runs(9, "a", served=500), sits("b"), slots=2)]
    assert plan([turn(1, "x", "m")], places) == [leave("b", for_turn=1)]


# --- which pool is made -------------------------------------------------------------------------------------------------


def three(*, slots: int = 8) -> list[WaitingTurn]:
    return [turn(id, agent, "m", bytes=10, slots=slots) for id, agent in ((1, "a"), (2, "b"), (3, "c"))]


@pytest.mark.parametrize(("room", "slots"), [(1000, 3), (30, 3), (29, 2), (10, 1)])
def test_a_pool_is_made_with_a_seat_for_each_that_waits_as_far_as_memory_goes(room: int, slots: int) -> None:
    waiting = three()
    assert plan(waiting, [], room=room) == [open_(waiting[0], slots=slots)]


def test_it_is_made_with_no_more_slots_than_there_may_be() -> None:
    waiting = three(slots=2)
    assert plan(waiting, []) == [open_(waiting[0], slots=2)]


def test_it_has_seats_for_those_who_do_not_wait_too_as_far_as_memory_is_idle() -> None:
    waiting = three()
    assert plan(waiting, [], prospects={"m": Prospect(5)}) == [open_(waiting[0], slots=5)]
    assert plan(waiting, [], prospects={"m": Prospect(5)}, room=45) == [open_(waiting[0], slots=4)]


@pytest.mark.parametrize(("room", "slots"), [(250, 5), (249, 4), (220, 2), (205, 1)])
def test_what_the_least_pools_of_others_would_take_is_left_for_them(room: int, slots: int) -> None:
    waiting = three()
    others = {"m": Prospect(5), "n": Prospect(2, 120), "o": Prospect(1, 80)}
    assert plan(waiting, [], prospects=others, live_contexts=3, room=room) == [open_(waiting[0], slots=slots)]


def test_nothing_is_left_for_more_of_them_than_there_are_places_for() -> None:
    waiting, others = three(), {"m": Prospect(5), "n": Prospect(2, 120), "o": Prospect(1, 80)}
    assert plan(waiting, [], prospects=others, live_contexts=2, room=170) == [open_(waiting[0], slots=5)]
    assert plan(waiting, [], prospects=others, live_contexts=1, room=50) == [open_(waiting[0], slots=5)]


def test_nothing_is_left_for_others_whose_pool_is_there() -> None:
    waiting, others = three(), {"n": Prospect(2, 120)}
    places = [live("x", "n", bytes=120)]
    assert plan(waiting, places, prospects=others, live_contexts=2, room=150) == [open_(waiting[0], slots=3)]


def test_bytes_that_seats_took_are_given_to_nobody_else() -> None:
    waiting = [*three(), turn(4, "d", "n", bytes=10)]
    assert plan(waiting, [], live_contexts=2, room=39) == [open_(waiting[0], slots=3)]
    assert plan(waiting, [], live_contexts=2, room=40) == [open_(waiting[0], slots=3), open_(waiting[3])]


def test_it_has_the_window_that_most_of_those_who_wait_can_go_on_in() -> None:
    waiting = [turn(1, "a", "m", bytes=10, slots=4, window=10), turn(2, "b", "m", bytes=40, slots=4, window=40, tokens=30)]
    assert plan(waiting, [], room=1000) == [open_(waiting[0], slots=2, window_of=waiting[1])]
    assert plan(waiting, [], room=39) == [open_(waiting[0], slots=2)], "b's does not fit beside anything"


def test_one_seat_that_suits_two_is_better_than_two_seats_that_suit_one() -> None:
    waiting = [turn(1, "a", "m", bytes=10, slots=4, window=10), turn(2, "b", "m", bytes=40, slots=4, window=40, tokens=30)]
    assert plan(waiting, [], room=79) == [open_(waiting[0], slots=1, window_of=waiting[1])]


def test_it_suits_the_first_in_line_however_many_others_a_smaller_one_would_serve() -> None:
    first = turn(1, "a", "m", bytes=40, slots=4, window=40, tokens=30)
    others = [turn(id, f"b{id}", "m", bytes=10, slots=4, window=10) for id in (2, 3, 4)]
    assert plan([first, *others], [], room=50) == [open_(first)]


def test_among_equals_the_cheapest_is_made() -> None:
    waiting = [turn(1, "a", "m", bytes=40, window=40), turn(2, "b", "m", bytes=10, window=10)]
    assert plan(waiting, [], room=1000) == [open_(waiting[0], window_of=waiting[1])]


def test_weights_are_loaded_for_one_seat_even_where_many_wait() -> None:
    waiting = three()
    assert plan(waiting, [], [loose("m", ModelState.PARKED, bytes=60)], room=70) == [load("m")]


def test_two_pools_of_one_model_load_its_weights_once() -> None:
    first = turn(1, "a", "m", bytes=20)
    second = turn(2, "b", "m", bytes=20, pool="m with other KV")
    waiting, parked = [first, second], [loose("m", ModelState.PARKED, bytes=60)]
    assert plan(waiting, [], parked, live_contexts=2, room=100) == [load("m")]
    third = turn(3, "c", "n", bytes=1)
    assert plan([*waiting, third], [], parked, live_contexts=3, room=100) == [load("m")], "60 and twice 20"
    assert plan([*waiting, third], [], parked, live_contexts=3, room=101) == [load("m"), open_(third)]
    assert plan(waiting, [], [loose("m", bytes=60)], live_contexts=2, room=100) == [open_(first), open_(second)]


# --- made anew with more seats ------------------------------------------------------------------------------------------

one_more = [turn(1, "b", "m", bytes=50, slots=2)]


@pytest.mark.parametrize(("room", "steps"), [(100, [drain("m", for_turn=1)]), (99, [])])
def test_a_pool_is_emptied_to_be_made_anew_with_more_seats_if_there_is_memory_for_them(room: int, steps: list[Step]) -> None:
    assert plan(one_more, [pool("m", runs(9, "a"), bytes=50, up_to=2)], room=room) == steps


@pytest.mark.parametrize(("room", "steps"), [(130, [drain("m", for_turn=1)]), (129, [])])
def test_not_with_memory_that_others_might_ask_for(room: int, steps: list[Step]) -> None:
    others = {"n": Prospect(1, 30)}
    places = [pool("m", runs(9, "a"), bytes=50, up_to=2)]
    assert plan(one_more, places, room=room, prospects=others, live_contexts=2) == steps


def test_not_for_agents_that_are_not_there() -> None:
    waiting, places = [turn(1, "b", "m", bytes=50, slots=3)], [pool("m", runs(8, "a"), runs(9, "c"), bytes=50, slots=2, up_to=3)]
    assert plan(waiting, places, prospects={"m": Prospect(2)}) == []
    assert plan(waiting, places, prospects={"m": Prospect(3)}) == [drain("m", for_turn=1)]


@pytest.mark.parametrize("sitter", [runs(9, "a", may_pause=False), sits("a", Phase.TAKING)])
def test_not_before_those_who_sit_there_had_their_minimum(sitter: Sitter) -> None:
    assert plan(one_more, [pool("m", sitter, bytes=50, up_to=2)]) == []


def test_not_before_the_pool_has_been_there_for_the_minimum() -> None:
    assert plan(one_more, [pool("m", runs(9, "a"), bytes=50, up_to=2, settled=False)]) == []


def test_nobody_gives_way_for_a_seat_that_idle_memory_is_there_for() -> None:
    assert plan(one_more, [pool("m", runs(9, "a", served=9), bytes=50, up_to=2)]) == [drain("m", for_turn=1)]
    assert plan(one_more, [pool("m", sits("a"), bytes=50, up_to=2)]) == [drain("m", for_turn=1)]


# --- made anew with a larger window -------------------------------------------------------------------------------------


def grown(*, served: int = 0) -> WaitingTurn:
    """Its session has 80 tokens, and the pool windows of 50."""
    return turn(1, "b", "m", bytes=80, slots=2, window=80, tokens=80, served=served)


@pytest.mark.parametrize(("room", "steps"), [(160, [drain("m", for_turn=1)]), (159, [])])
def test_turns_stand_still_for_a_larger_window_if_there_is_memory_for_all_to_go_on_in_it(room: int, steps: list[Step]) -> None:
    places = [pool("m", runs(9, "a"), sits("b"), bytes=50, window=50, slots=2)]
    assert plan([grown(served=100)], places, room=room) == steps


def test_else_only_those_of_lower_rank_do() -> None:
    places = [pool("m", runs(9, "a", served=100), sits("b"), bytes=50, window=50, slots=2)]
    assert plan([grown(served=100)], places, room=100) == []
    assert plan([grown(served=99)], places, room=100) == [drain("m", for_turn=1)]


def test_others_who_wait_have_their_minimum_first_in_the_pool_that_there_is() -> None:
    waiting = [grown(), turn(2, "c", "m", bytes=50, window=50, served=5)]
    new = pool("m", sits("c"), bytes=50, window=50, slots=1, settled=False)
    assert plan(waiting, [new]) == [start(2, "c")]
    assert plan(waiting[:1], [new]) == [drain("m", for_turn=1)], "nobody else wants it"
    old = pool("m", sits("c"), bytes=50, window=50, slots=1)
    assert plan(waiting, [old]) == [drain("m", for_turn=1)]


# --- room for another model ---------------------------------------------------------------------------------------------


def test_a_pool_that_is_new_and_wanted_is_not_sent_away_for_another() -> None:
    new = pool("m", sits("a"), settled=False)
    assert plan([turn(1, "b", "n"), turn(2, "a", "m")], [new]) == [start(2, "a")]
    assert plan([turn(1, "b", "n")], [new]) == [drain("m", for_turn=1)], "unless nobody wants it"


def test_one_that_is_too_small_for_whoever_wants_it_is_sent_away_new_or_not() -> None:
    new = pool("m", sits("a"), bytes=20, window=20, settled=False)
    stuck = turn(1, "a", "m", bytes=400, window=400, tokens=175)
    assert plan([stuck, turn(2, "b", "n", bytes=20)], [new], room=100) == [drain("m", for_turn=2)]


def test_a_pool_whose_turns_all_rank_lower_makes_place_for_another() -> None:
    places = [pool("m", runs(8, "a", served=5), runs(9, "b", served=7), slots=2)]
    assert plan([turn(1, "x", "n", served=5)], places) == []
    assert plan([turn(1, "x", "n", served=4)], places) == [drain("m", for_turn=1)]


def test_the_pool_of_the_lowest_rank_goes_first_and_what_idles_before_it() -> None:
    busy = [pool("m", runs(8, "a", served=5)), pool("n", runs(9, "b", served=7))]
    assert plan([turn(1, "x", "o")], busy, live_contexts=2) == [drain("n", for_turn=1)]
    assert plan([turn(1, "x", "o")], [*busy, live("c", "p")], live_contexts=3) == [drain("p", for_turn=1)]
    assert plan([turn(1, "x", "o")], [*busy, closing("p")], live_contexts=3) == []


@pytest.mark.parametrize(
    "sitters",
    [
        [runs(9, "a", served=5, may_pause=False)],
        [runs(9, "a", served=5), sits("b", Phase.TAKING)],
        [runs(8, "a", served=5), runs(9, "b", served=5, may_pause=False)],
    ],
)
def test_no_pool_goes_before_those_who_sit_there_had_their_minimum(sitters: list[Sitter]) -> None:
    assert plan([turn(1, "x", "n")], [pool("m", *sitters, slots=2)]) == []


def test_no_pool_goes_in_which_somebody_starts_or_sits_down_in_this_plan() -> None:
    waiting = [turn(1, "b", "m", priority=2), turn(2, "x", "n", priority=1)]
    assert plan(waiting, [pool("m", runs(9, "a", served=5), sits("b"), slots=2)]) == [start(1, "b")]
    assert plan(waiting, [pool("m", runs(9, "a", served=5), slots=2)]) == [take(1, "b")]


@pytest.mark.parametrize(
    ("sitters", "step"),
    [
        ([sits("b")], [leave("b", for_turn=1)]),
        ([runs(8, "b", served=3)], [pause(9)]),
        ([runs(8, "b", served=9, pausing=True)], []),
        ([sits("b", Phase.LEAVING)], []),
    ],
)
def test_nor_one_in_which_a_seat_is_being_cleared_for_somebody_before(sitters: list[Sitter], step: list[Step]) -> None:
    waiting = [turn(1, "x", "m", served=0), turn(2, "y", "n", served=1)]
    assert plan(waiting, [pool("m", runs(9, "a", served=9), *sitters, slots=2)]) == step


@pytest.mark.parametrize(("bytes", "steps"), [(90, [drain("m", for_turn=1), drain("n", for_turn=1)]), (91, [])])
def test_busy_pools_go_for_bytes_only_if_they_bring_them_together(bytes: int, steps: list[Step]) -> None:
    places = [
        pool("m", runs(7, "a", served=5), bytes=40),
        pool("n", runs(8, "b", served=4), bytes=50),
        pool("o", runs(9, "c", may_pause=False), bytes=10),
    ]
    assert plan([turn(1, "x", "p", bytes=bytes)], places, live_contexts=9, room=100) == steps


def test_the_weights_under_a_busy_pool_are_brought_too() -> None:
    places, models = [pool("m", runs(9, "a", served=5, best_effort=True), bytes=20)], [loose("m", bytes=80)]
    assert plan([turn(1, "x", "n", bytes=100)], places, models, live_contexts=2, room=100) == [drain("m", for_turn=1)]
    assert park("m") not in plan([turn(1, "x", "n", bytes=10)], places, models, live_contexts=2, room=100)


# --- turns that come and go one by one --------------------------------------------------------------------------------


def test_nobody_behind_starts_in_a_pool_that_another_will_have_once_its_turns_had_their_minimum() -> None:
    """Else somebody there would always have begun just now."""
    waiting = [turn(1, "x", "n", served=4), turn(2, "b", "m", served=6), turn(3, "c", "m", served=6)]
    places = [pool("m", runs(9, "a", served=5, may_pause=False), sits("b"), slots=3)]
    assert plan(waiting, places) == []
    assert plan(waiting, places, live_contexts=2) == [open_(waiting[0]), start(2, "b"), take(3, "c")]


def test_those_before_it_do_and_so_do_all_where_one_that_runs_ranks_higher_or_the_pool_is_new() -> None:
    before = [turn(1, "b", "m", served=3), turn(2, "x", "n", served=4), turn(3, "c", "m", served=6)]
    assert plan(before, [pool("m", runs(9, "a", served=5, may_pause=False), sits("b"), sits("c"), slots=3)]) == [
        start(1, "b"),
        start(3, "c"),
    ]
    behind = before[1:]
    assert plan(behind, [pool("m", runs(9, "a", served=4, may_pause=False), sits("c"), slots=2)]) == [start(3, "c")]
    unsettled = pool("m", runs(9, "a", served=5, may_pause=False), sits("c"), slots=2, settled=False)
    assert plan(behind, [unsettled]) == [start(3, "c")]


def test_nobody_behind_starts_in_a_pool_that_will_be_made_anew_for_one_that_is_too_large_for_it() -> None:
    waiting = [turn(1, "a", "m", served=4, tokens=20, window=30), turn(2, "b", "m", served=6, window=10)]
    places = [pool("m", sits("a"), runs(9, "c", served=5, may_pause=False), sits("b"), slots=3, window=10)]
    assert plan(waiting, places) == []


def test_for_bytes_that_pools_bring_together_nobody_behind_starts_in_any_of_them() -> None:
    waiting = [
        turn(1, "x", "o", served=4, bytes=90),
        turn(2, "b", "m", served=6, bytes=20),
        turn(3, "c", "n", served=6, bytes=25),
    ]
    places = [
        pool("m", runs(8, "a", served=5), sits("b"), slots=2, bytes=20),
        pool("n", runs(9, "d", served=5, may_pause=False), sits("c"), slots=2, bytes=25),
    ]
    assert plan(waiting, places, live_contexts=9, room=90) == []
    assert plan(waiting, places, live_contexts=9, room=89) == [start(2, "b"), start(3, "c")], "(5): it is in nobody's way"

"""How much of the weights comes, as stories: rules (11) and (12), and (7) of weights that have a home in host memory.

With R layers and a ring of two slots a model takes 30 + 10 R bytes and makes a token in 9 - R seconds; see `moments.TENTHS`.
See also: `test_placing.py`, which part is best, and `test_state_streaming.py`, what comes of it.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.moment import Load, Open, Park, Prospect, Sitter, WaitingTurn
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.core.streaming import Placement
from conductor.types import ModelState
from tests.support.moments import (
    TENTHS,
    WHOLE,
    Place,
    closing,
    drain,
    live,
    load,
    loose,
    movable,
    open_,
    park,
    plan,
    pool,
    runs,
    sits,
    start,
    take,
    turn,
)

LEAST = Placement(0, 2)


def resident(layers: int) -> Placement:
    return Placement(layers, 2)


def ask(agents: int = 1, *, bytes: int = 40, slots: int = 1, model: str = "m") -> list[WaitingTurn]:
    """Turns of so many agents of one model."""
    return [turn(n + 1, "abcdefgh"[n], model, bytes=bytes, slots=slots) for n in range(agents)]


# --- 7: parked ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "brought"), [(1000, WHOLE), (140, WHOLE), (139, resident(6)), (129, resident(5)), (80, resident(1)), (70, LEAST)]
)
def test_7_as_much_of_the_weights_comes_as_leaves_room_for_the_turns_pool(room: int, brought: Placement) -> None:
    assert plan(ask(), [], [movable("m")], room=room) == [load("m", brought)]


def test_5_where_not_even_the_least_part_fits_beside_the_pool_the_turn_waits_and_holds_up_nobody() -> None:
    waiting = [*ask(), turn(2, "b", "n", bytes=50)]
    assert plan(waiting, [], [movable("m")], room=69) == [open_(waiting[1])]


def test_7_a_step_that_takes_longer_than_the_link_needs_no_more_layers() -> None:
    """Of 4 s of computation the link fills six layers' worth and rests."""
    assert plan(ask(), [], [movable("m", step_s=4.0)], room=1000) == [load("m", resident(5))]


@pytest.mark.parametrize(("agents", "brought"), [(1, resident(5)), (2, resident(3)), (3, resident(1)), (8, resident(1))])
def test_7_with_many_agents_waiting_it_leaves_room_for_their_slots(agents: int, brought: Placement) -> None:
    """100 bytes: each slot takes what two layers do, and adds a token to every step."""
    assert plan(ask(agents, bytes=20, slots=3), [], [movable("m")], room=100) == [load("m", brought)]


def test_7_two_models_at_once_share_what_is_free_in_the_order_of_their_turns() -> None:
    waiting = [*ask(), turn(2, "b", "n", bytes=40)]
    models = [movable("m"), movable("n")]
    assert plan(waiting, [], models, live_contexts=2, room=280) == [load("m", WHOLE), load("n", WHOLE)]
    assert plan(waiting, [], models, live_contexts=2, room=230) == [load("m", WHOLE), load("n", resident(2))]
    assert plan(waiting, [], models, live_contexts=2, room=209) == [load("m", WHOLE)], "the second keeps waiting, not the first"


def test_6_the_room_of_the_pool_is_kept_while_its_weights_are_on_their_way() -> None:
    waiting = [*ask(), turn(2, "b", "n", bytes=11)]
    coming = movable("m", ModelState.LOADING, placed=resident(1))
    assert plan(waiting, [], [coming], live_contexts=2, room=90) == []
    assert plan(waiting, [], [coming], live_contexts=2, room=91) == [open_(waiting[1])]


# --- 11: what gives way to more of it -----------------------------------------------------------------------------------


def test_11_idle_others_give_way_for_more_of_it_though_the_least_would_fit_beside_them() -> None:
    idle = live("x", "n", bytes=30, best_effort=True)
    assert plan(ask(), [idle], [movable("m")], live_contexts=2, room=140) == [drain("n", for_turn=1)]
    promised_more = live("x", "n", bytes=30)
    assert plan(ask(), [promised_more], [movable("m")], live_contexts=2, room=140) == [load("m", resident(4))]
    assert plan(ask(), [closing("n", bytes=30)], [movable("m")], live_contexts=2, room=140) == [], "and are waited for"
    assert plan(ask(), [], [movable("m")], live_contexts=2, room=140) == [load("m", WHOLE)]


def test_11_idle_weights_of_others_are_parked_for_more_of_it() -> None:
    others = [movable("n", placed=LEAST, last_turn=1), loose("o", bytes=30, last_turn=2)]
    assert plan(ask(), [], [movable("m"), *others], room=200) == [load("m", WHOLE)]
    assert plan(ask(), [], [movable("m"), *others], room=199) == [park("n")], "the one used longest ago"
    assert plan(ask(), [], [movable("m"), *others], room=169) == [park("n"), park("o")]


def test_11_only_as_many_give_way_as_bring_what_is_worth_having() -> None:
    places = [live(name, name, bytes=20, last_turn=n, best_effort=True) for n, name in enumerate("xyz")]
    assert plan(ask(), places, [movable("m")], live_contexts=9, room=200) == [load("m", WHOLE)]
    assert plan(ask(), places, [movable("m")], live_contexts=9, room=170) == [drain("x", for_turn=1), drain("y", for_turn=1)]
    computes_long = movable("m", step_s=4.0)  # 80 bytes of it are as good as all
    assert plan(ask(), places, [computes_long], live_contexts=9, room=180) == [load("m", resident(5))]


def busy(*, bytes: int = 30, priority: float = -1, may_pause: bool = True) -> Place:
    """A turn that may stand still, of lower rank."""
    return pool("n", runs(9, "x", priority=priority, may_pause=may_pause), bytes=bytes)


def test_11_a_busy_one_stands_still_only_for_the_least() -> None:
    assert plan(ask(), [busy()], [movable("m")], live_contexts=2, room=100) == [load("m", LEAST)]
    assert plan(ask(), [busy()], [movable("m")], live_contexts=2, room=125) == [load("m", resident(2))]
    assert plan(ask(), [busy()], [movable("m")], live_contexts=2, room=99) == [drain("n", for_turn=1)]


@pytest.mark.parametrize("other", [busy(priority=1), busy(may_pause=False)])
def test_11_one_of_higher_rank_or_that_just_began_is_waited_for(other: Place) -> None:
    assert plan(ask(), [other], [movable("m")], live_contexts=2, room=99) == []


def test_11_where_idle_ones_suffice_for_the_least_no_busy_one_stands_still() -> None:
    places = [busy(), live("y", "o", bytes=10)]
    assert plan(ask(), places, [movable("m")], live_contexts=3, room=100) == [drain("o", for_turn=1)]


# --- 12: another part of it ---------------------------------------------------------------------------------------------


def test_12_an_idle_pool_is_emptied_for_a_larger_part_when_memory_became_free() -> None:
    """Step by step: the pool, the weights, the larger part, and a pool again."""
    part = movable("m", placed=LEAST)
    assert plan(ask(), [live("a", "m", bytes=40)], [part], room=70) == [start(1, "a")]
    assert plan(ask(), [live("a", "m", bytes=40)], [part], room=140) == [drain("m", for_turn=1)]
    assert plan(ask(), [closing("m", bytes=40)], [part], room=140) == []
    assert plan(ask(), [], [part], room=140) == [park("m")]
    assert plan(ask(), [], [movable("m", ModelState.UNLOADING, placed=LEAST)], room=140) == []
    assert plan(ask(), [], [movable("m")], room=140) == [load("m", WHOLE)]
    whole = movable("m", placed=WHOLE)
    assert plan(ask(), [], [whole], room=140) == [open_(ask()[0])]
    assert plan(ask(), [live("a", "m", bytes=40)], [whole], room=140) == [start(1, "a")]


@pytest.mark.parametrize(
    ("there", "room", "moves"),
    [
        (resident(3), 110, False),  # a token in 6 s, or in 5
        (resident(3), 120, True),  # in 4
        (resident(4), 120, True),  # in 5 s, or in 4: a quarter more, just worth it
        (resident(5), 120, False),
    ],
)
def test_12_it_is_not_emptied_for_a_small_gain(there: Placement, room: int, moves: bool) -> None:
    steps = plan(ask(), [live("a", "m", bytes=40)], [movable("m", placed=there)], room=room)
    assert steps == [drain("m", for_turn=1) if moves else start(1, "a")]


def test_12_it_is_not_emptied_before_it_is_settled_if_others_could_go_on_there() -> None:
    part = movable("m", placed=LEAST)
    for settled in (False, True):
        here = pool("m", sits("a"), sits("b"), bytes=40, slots=2, settled=settled)
        steps = plan(ask(2, slots=2), [here], [part], room=180)
        assert steps == ([drain("m", for_turn=1)] if settled else [start(1, "a"), start(2, "b")])


def test_12_with_more_agents_it_is_emptied_for_more_slots_and_fewer_layers() -> None:
    part = movable("m", placed=resident(5))
    assert plan(ask(1, bytes=20, slots=3), [live("a", "m", bytes=20)], [part], room=100) == [start(1, "a")]
    assert plan(ask(3, bytes=20, slots=3), [live("a", "m", bytes=20)], [part], room=100) == [drain("m", for_turn=1)]
    assert plan(ask(3, bytes=20, slots=3), [], [part], room=100) == [park("m")]


@pytest.mark.parametrize("may_pause", [True, False])
def test_12_a_running_turn_stands_still_for_it_once_it_ran_its_minimum(may_pause: bool) -> None:
    here = pool("m", runs(9, "x", may_pause=may_pause), bytes=20, slots=2)
    steps = plan(ask(2, bytes=20, slots=4), [here], [movable("m", placed=resident(3))], room=200)
    assert steps == ([drain("m", for_turn=1)] if may_pause else [take(1, "a")])


def test_12_weights_that_leave_no_room_for_their_own_pool_are_brought_smaller() -> None:
    assert plan(ask(), [], [movable("m", placed=WHOLE)], room=139) == [park("m")]
    assert plan(ask(), [], [movable("m", placed=WHOLE)], room=140) == [open_(ask()[0])]
    from_its_file = movable("m", ModelState.RESIDENT)  # loaded before it had a home, when it had to be all of it
    assert plan(ask(), [], [from_its_file], room=139) == [park("m")]


def test_12_what_its_own_weights_bring_is_asked_of_nobody_else() -> None:
    """30 bytes of it leave, and come back as 100 in a room with 110 to spare."""
    places, part = [live("x", "n", bytes=40, best_effort=True)], movable("m", placed=LEAST)
    assert plan(ask(), places, [part], live_contexts=2, room=180) == [park("m")]
    assert plan(ask(), places, [part], live_contexts=2, room=179) == [park("m"), drain("n", for_turn=1)]


def test_12_weights_that_stay_or_have_no_home_are_left_as_they_are() -> None:
    for weights in (loose("m", bytes=100), movable("m", placed=WHOLE)):
        assert plan(ask(), [live("a", "m", bytes=40)], [weights], room=1000) == [start(1, "a")]
        assert plan(ask(), [], [weights], room=1000) == [open_(ask()[0])]


@pytest.mark.parametrize("sitter", [runs(9, "x"), sits("x")])
def test_12_weights_under_another_pool_of_the_model_stay_and_no_pool_is_emptied_in_vain(sitter: Sitter) -> None:
    other, part = pool("m", sitter, bytes=40, name="m-q8"), movable("m", placed=LEAST)
    assert plan(ask(), [other], [part], live_contexts=2, room=250) == [open_(ask()[0])]
    assert plan(ask(), [other, live("a", "m", bytes=40)], [part], live_contexts=2, room=250) == [start(1, "a")]


def test_12_a_pool_is_not_emptied_for_slots_that_these_weights_would_have_room_for_as_well() -> None:
    """100 bytes: R = 2 and one slot, where R = 1 would have room for three; kept for others, not even R = 2 has more."""
    waiting, part, here = ask(3, bytes=10, slots=4), movable("m", placed=resident(2)), live("x", "m", bytes=10)
    others = {"o": Prospect(1, 30)}
    for places in ([here], []):
        steps = plan(waiting, places, [part], live_contexts=2, room=90, prospects=others)
        assert park("m") not in steps
        assert drain("m", for_turn=1) not in steps


def test_12_a_pool_that_serves_in_a_small_window_is_not_emptied_because_a_larger_one_would_not_fit() -> None:
    here, whole = live("a", "m", bytes=5, window=5), movable("m", placed=WHOLE)
    waiting = [turn(1, "a", "m", bytes=40, window=40, tokens=5), turn(2, "b", "m", bytes=40, window=40, tokens=5)]
    assert plan(waiting, [here], [whole], room=110)[0] == start(1, "a")


# --- two turns of one plan ----------------------------------------------------------------------------------------------


def test_weights_that_leave_for_an_earlier_turn_are_no_later_turns_to_open_a_pool_over() -> None:
    waiting = [turn(1, "b", "n", bytes=100), turn(2, "a", "m", bytes=10)]
    assert plan(waiting, [], [movable("m", placed=WHOLE)], live_contexts=2, room=150) == [park("m")]
    assert plan(waiting, [], [loose("m")], live_contexts=2, room=150) == [park("m")]


def test_weights_that_leave_for_an_earlier_turn_are_loaded_smaller_beside_it() -> None:
    waiting = [turn(1, "b", "n", bytes=100), turn(2, "a", "m", bytes=10)]
    places, leaving = [live("b", "n", bytes=100, phase=Phase.BUSY)], movable("m", ModelState.UNLOADING, placed=WHOLE)
    assert plan(waiting, places, [leaving], live_contexts=2, room=150) == []
    assert plan(waiting, places, [movable("m")], live_contexts=2, room=150) == [load("m", resident(1))]


def test_a_second_turn_of_a_model_that_is_being_moved_waits_for_it_too() -> None:
    waiting = [turn(1, "a", "m", bytes=40), turn(2, "b", "m", bytes=40, pool="m-q8")]
    assert plan(waiting, [], [movable("m", placed=LEAST)], live_contexts=2, room=300) == [park("m")]
    assert plan(waiting, [], [movable("m")], live_contexts=2, room=300) == [load("m", WHOLE)]


def test_weights_under_a_pool_that_leaves_for_an_earlier_turn_leave_with_it() -> None:
    here = live("a", "m", bytes=10)
    waiting = [turn(1, "b", "n", bytes=130), turn(2, "a", "m", bytes=10)]
    assert plan(waiting, [here], [movable("m", placed=WHOLE)], live_contexts=2, room=150) == [drain("m", for_turn=1)]
    assert plan(waiting, [closing("m", bytes=10)], [movable("m", placed=WHOLE)], live_contexts=2, room=150) == []


# --- laws ---------------------------------------------------------------------------------------------------------------

some_placements = st.sampled_from([None, LEAST, resident(1), resident(4), resident(6), WHOLE])


@st.composite
def moments(draw: st.DrawFn) -> tuple[list[WaitingTurn], list[Place], dict[str, Placement | None], int]:
    names = ["m", "n", "o"]
    placed = {name: draw(some_placements) for name in names}
    turns = [
        turn(
            n + 1, f"agent-{n}", draw(st.sampled_from(names)), bytes=20, slots=draw(st.integers(1, 4)),
            priority=draw(st.integers(0, 1)),
        )
        for n in range(draw(st.integers(0, 5)))
    ]  # fmt: skip
    places = [
        pool(
            name,
            *(runs(90 + n, f"agent-{9 + n}") for n in range(draw(st.integers(0, 1)))),
            phase=draw(st.sampled_from([PoolPhase.READY, PoolPhase.READY, PoolPhase.CLOSING])),
            bytes=20, slots=2, settled=draw(st.booleans()),
        )
        for name in names
        if placed[name] and draw(st.booleans())
    ]  # fmt: skip
    places = [Place(it.pool, it.sitters if it.pool.phase is PoolPhase.READY else ()) for it in places]
    return turns, places, placed, draw(st.integers(0, 400))


@given(moments(), st.integers(1, 4))
def test_whatever_is_brought_fits_and_nothing_opens_over_weights_that_leave(
    moment: tuple[list[WaitingTurn], list[Place], dict[str, Placement | None], int], live_contexts: int
) -> None:
    turns, places, placed, room = moment
    models = {name: movable(name, placed=placement) for name, placement in placed.items()}
    prospects = {name: Prospect(2, 30) for name in models}
    steps = plan(turns, places, models.values(), live_contexts=live_contexts, room=room, prospects=prospects)
    takes = {offer.placement: offer.bytes for offer in models["m"].offers}
    parked = [step.model_id for step in steps if isinstance(step, Park)]
    loads = [step for step in steps if isinstance(step, Load)]
    opens = [step for step in steps if isinstance(step, Open)]
    over = {place.pool.model_id for place in places}
    used = sum(place.pool.bytes for place in places) + sum(models[name].bytes for name, it in placed.items() if it)
    comes = sum(takes[it.placement] for it in loads if it.placement) + sum(dict(it.shapes)[it.slots] for it in opens)
    assert not comes or used + comes <= room
    assert len({*parked}) == len(parked)
    assert not {*parked} & over
    assert all(placed[name] for name in parked)
    assert all(it.placement in takes and placed[it.model_id] is None for it in loads)
    assert all(placed[next(it.model_id for it in turns if it.id == open.turn_id)] for open in opens)
    assert not {next(it.model_id for it in turns if it.id == open.turn_id) for open in opens} & {*parked}


def test_tenths_are_as_they_are_described() -> None:
    assert [(it.bytes, round(it.link_s, 9)) for it in movable("m").offers if it.placement.slots == 2] == [
        (30 + 10 * layers, 9.0 - layers) for layers in range(7)
    ]
    assert TENTHS.whole_bytes == movable("m").bytes == 100

"""Pools as stories: agents of a model sit side by side, and the pool is made as large as they need and memory allows.

A pool of n slots takes n times its window. See also: `test_state_fair_turns.py`, for more agents than slots.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.core.sessions import Phase
from conductor.errors import DecodeFailed
from conductor.types import AgentId, KvPlace
from tests.support.calls import TurnCall
from tests.support.stories import ALPHA, BETA, Stage, model

A, B, C = (AgentId(name) for name in "abc")
NO_MEMORY = DecodeFailed(A, "no memory")


@pytest.fixture
def crew(given: Callable[..., Stage]) -> Stage:
    """Three agents on one model, whose pool may have up to four slots of 50 bytes; there is room for all of them."""
    stage = given(cap=1000)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50, slots=4)
    return stage


def all_ask(stage: Stage, agents: str = "abc") -> list[TurnCall]:
    """They ask at once, and the engine makes what they need until it has only turns to do."""
    with stage.at_once():
        turns = [stage.asks(agent) for agent in agents]
    make_ready(stage)
    return turns


def make_ready(stage: Stage) -> None:
    while work := next((it for it in stage.engine.todo if not isinstance(it, actions.RunTurn)), None):
        stage.does(work)


def slots(stage: Stage, agent: str = "a") -> int | None:
    """Of the agent's pool, if it is there or on its way."""
    pool = stage.state.pools.get(stage.pool_of(agent))
    return pool.context.slots if pool else None


# --- side by side -----------------------------------------------------------------------------------------------------


def test_several_agents_of_a_model_run_in_one_pool(crew: Stage) -> None:
    turns = all_ask(crew)
    assert all(turn.runs for turn in turns)
    assert [turn.evidence for turn in turns] == 3 * [(None, False, 0)]
    assert len(crew.state.pools) == 1
    crew.settle()


def test_a_pool_has_a_seat_for_each_agent_that_is_in_booked_before_it_is_made(crew: Stage) -> None:
    crew.asks("a")
    assert crew.engine.todo == [crew.opening("a", window=50, slots=3)]
    assert crew.booked == 100 + 150, "one turn of 50 is promised, the rest is there while nobody asks"
    crew.settle()


def test_whoever_comes_next_takes_a_seat_and_nobody_moves(crew: Stage) -> None:
    crew.converses("a")
    turn = crew.asks("b")
    assert crew.engine.todo == [actions.TakeSeat(B, crew.pool_of("b"))]
    crew.seat_taken("b")
    assert turn.evidence == (None, False, 0)
    crew.finished(turn)
    assert crew.state.agents[A].place is KvPlace.SLOT


def test_where_memory_is_short_it_has_fewer_seats_and_they_take_turns(given: Callable[..., Stage]) -> None:
    stage = given(cap=249)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50, slots=4)
    turns = all_ask(stage)
    assert slots(stage) == 2
    assert [turn.runs for turn in turns] == [True, True, False]
    stage.finished(turns[1])
    make_ready(stage)
    assert turns[2].evidence == ("b", False, 20)
    stage.settle()


def test_memory_that_another_models_agents_may_ask_for_is_not_given_to_seats(given: Callable[..., Stage]) -> None:
    stage = given(cap=349, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", ALPHA), ("x", BETA)):
        stage.has(agent, plan, context=50, slots=4)
    for agent in "abxabx":
        stage.converses(agent)
    assert (slots(stage, "a"), slots(stage, "x")) == (1, 1), "149 bytes: three seats would not do for both models"
    stage.unregisters("x")
    stage.settle()
    turns = all_ask(stage, "ab")
    assert slots(stage) == 2, "now they would"
    assert [turn.runs for turn in turns] == [True, True]
    stage.settle()


def test_a_newcomer_gets_the_room_of_seats_beyond_the_promise(given: Callable[..., Stage]) -> None:
    stage = given(cap=300, live_contexts=2)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50, slots=4)
    for agent in "abc":
        stage.converses(agent)
    assert stage.booked == 250
    call = stage.registers("x", BETA, context=50)
    assert {type(work) for work in stage.engine.todo} == {actions.LeaveSeat}
    stage.settle()
    assert call.admission.charged_bytes == 100
    assert stage.converses("a").evidence == (None, True, 20), "everybody's KV was kept"
    assert slots(stage) == 1, "of the 100 bytes that are left, x may ask for 50"


# --- another size -----------------------------------------------------------------------------------------------------


def test_a_pool_that_is_too_small_for_a_newcomer_is_made_anew_and_the_turn_in_it_goes_on(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50, slots=4)
    first = stage.asks("a")
    stage.opened("a")
    assert slots(stage) == 1
    stage.registers("b", ALPHA, context=50, slots=4)
    second = stage.asks("b")
    assert first.pausing
    stage.paused(first, tokens=15)
    make_ready(stage)
    assert slots(stage) == 2
    assert first.runs
    assert second.runs
    assert first.run is not None
    assert (first.run.pauses, first.evidence) == (1, (None, False, 30))
    assert second.evidence == ("a", False, 30)
    stage.settle()


def test_not_before_that_turn_had_its_minimum(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, min_turn_s=2.0)
    stage.has("a", ALPHA, context=50, slots=4)
    first = stage.asks("a")
    stage.opened("a")
    stage.registers("b", ALPHA, context=50, slots=4)
    second = stage.asks("b")
    stage.passes(1.9)
    assert not first.pausing
    stage.passes(0.1)
    assert first.pausing
    stage.settle()
    assert second.endings


def test_one_that_outgrows_the_pool_makes_the_others_stand_still_and_all_go_on_in_the_larger_one(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=1000)
    for agent in "ab":
        stage.has(agent, ALPHA, context=80, ladder=(20, 40), slots=2)
    turns = all_ask(stage, "ab")
    stage.outgrew(turns[0], tokens=20)
    assert turns[1].pausing
    stage.paused(turns[1], tokens=12)
    make_ready(stage)
    pool = stage.state.pools[stage.pool_of("a")]
    assert (pool.context.window, pool.context.slots) == (40, 2)
    assert [turn.run and (turn.run.room, turn.run.growths, turn.run.pauses) for turn in turns] == [(40, 1, 0), (20, 0, 1)]
    assert stage.booked == 100 + 80
    stage.settle()


def test_where_there_is_no_memory_for_all_it_waits_for_the_others(given: Callable[..., Stage]) -> None:
    stage = given(cap=140)
    for agent in "ab":
        stage.has(agent, ALPHA, context=80, ladder=(20, 40), slots=2)
    turns = all_ask(stage, "ab")
    assert slots(stage) == 2
    stage.outgrew(turns[0], tokens=20)
    assert not turns[1].pausing, "of two with an equal share, the one that runs goes on"
    stage.finished(turns[1])
    make_ready(stage)
    assert turns[0].run is not None
    assert turns[0].run.room == 40
    assert slots(stage) == 1
    stage.settle()


def test_nobody_runs_further_than_what_is_booked_for_it_however_large_the_pool_is(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, slots=2)
    stage.has("b", ALPHA, context=80, ladder=(20, 40), slots=2)
    turns = all_ask(stage, "ab")
    assert [turn.run and turn.run.room for turn in turns] == [20, 20], "the cheapest pool that suits both"
    stage.outgrew(turns[0], tokens=20)
    stage.paused(turns[1], tokens=20)
    make_ready(stage)
    assert [turn.run and turn.run.room for turn in turns] == [80, 20]
    stage.settle()


def test_whose_session_needs_a_larger_window_is_not_seated_in_a_smaller_one(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent, plan in (("a", ALPHA), ("b", ALPHA), ("x", BETA)):
        stage.has(agent, plan, context=80, ladder=(20, 40), slots=2)
    stage.converses("a", tokens=60)
    stage.converses("x")
    (small,) = all_ask(stage, "b")
    assert slots(stage) == 2
    large = stage.asks("a")
    assert small.pausing, "there is a free seat, but of 20 tokens"
    stage.paused(small, tokens=12)
    make_ready(stage)
    assert [turn.run and turn.run.room for turn in (small, large)] == [20, 80]
    stage.settle()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_pool_that_cannot_be_made_with_more_slots_is_made_with_fewer(crew: Stage) -> None:
    crew.has("d", ALPHA, context=50, slots=4)
    turn = crew.asks("a")
    for tried in (4, 2):
        assert slots(crew) == tried
        crew.open_failed("a", NO_MEMORY)
    assert turn.waits
    assert slots(crew) == 1
    crew.opened("a")
    assert turn.runs
    crew.finished(turn)
    crew.converses("b")
    assert slots(crew) == 1, "and it is not tried again soon"


def test_one_that_cannot_be_made_with_one_slot_fails_the_turn(crew: Stage) -> None:
    turns = [crew.asks("a"), crew.asks("b")]
    while turns[0].waits:
        crew.open_failed("a", NO_MEMORY)
    turns[0].failed_with(DecodeFailed)
    crew.settle()
    assert turns[1].endings


def test_after_they_have_all_left_more_slots_are_tried_again(crew: Stage) -> None:
    crew.asks("a")
    crew.open_failed("a", NO_MEMORY)
    crew.settle()
    for agent in "abc":
        crew.unregisters(agent)
    crew.settle()
    crew.has("a", ALPHA, context=50, slots=4)
    crew.has("b", ALPHA, context=50, slots=4)
    all_ask(crew, "ab")
    assert slots(crew) == 2
    crew.settle()


def test_a_pool_that_took_more_than_estimated_is_booked_so_and_costs_that_from_then_on(crew: Stage) -> None:
    turn = crew.asks("a")
    crew.opened("a", takes=170)
    assert turn.runs
    assert crew.booked == 100 + 170
    assert crew.state.agents[B].ladder[0].shapes == ((1, 50), (2, 100), (3, 170), (4, 200))
    crew.settle()


def test_one_that_took_more_than_there_is_is_made_with_fewer_slots_and_no_turn_is_refused(given: Callable[..., Stage]) -> None:
    stage = given(cap=260)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50, slots=4)
    turn = stage.asks("a")
    assert slots(stage) == 3
    stage.opened("a", takes=161)
    assert turn.waits
    stage.closed("a")
    assert slots(stage) == 2
    stage.opened("a")
    assert turn.runs
    stage.settle()


def test_a_seat_that_cannot_be_taken_fails_its_turn_and_is_free_for_the_next(crew: Stage) -> None:
    crew.converses("a")
    turns = [crew.asks("b"), crew.asks("b")]
    crew.open_failed("b", DecodeFailed(B, "a broken cache"))
    turns[0].failed_with(DecodeFailed)
    crew.seat_taken("b")
    assert turns[1].runs
    crew.settle()


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_one_that_leaves_gives_up_its_seat_and_the_pool_stays_for_the_others(crew: Stage) -> None:
    turns = all_ask(crew, "ab")
    crew.finished(turns[0])
    leaving = crew.unregisters("a")
    assert [work for work in crew.engine.todo if not isinstance(work, actions.RunTurn)] == [actions.LeaveSeat(A, KvPlace.TOKENS)]
    crew.seat_left("a")
    assert leaving.is_done
    assert turns[1].runs
    assert not turns[1].pausing
    crew.finished(turns[1])
    assert crew.engine.todo == []


def test_with_the_last_one_goes_the_pool_and_then_the_model(crew: Stage) -> None:
    all_ask(crew, "ab")
    crew.settle()
    pool = crew.pool_of("a")
    for agent in "abc":
        crew.unregisters(agent)
    done: list[object] = []
    while crew.engine.todo:
        done.append(crew.engine.todo[0])
        crew.does(crew.engine.todo[0])
    assert done[-2:] == [actions.ClosePool(pool), actions.UnloadModel(ALPHA.id)]
    assert crew.booked == 0


def test_one_that_leaves_while_it_sits_down_gets_up_again(crew: Stage) -> None:
    crew.converses("a")
    crew.asks("b")
    leaving = crew.unregisters("b")
    assert crew.state.agents[B].phase is Phase.TAKING
    crew.seat_taken("b")
    assert crew.engine.todo == [actions.LeaveSeat(B, KvPlace.TOKENS)]
    crew.settle()
    assert leaving.is_done
    assert crew.agents == ["a", "c"]


# --- pools of their own -----------------------------------------------------------------------------------------------


def test_agents_whose_kv_has_another_layout_have_a_pool_of_their_own(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    for agent, kv_type in (("a", "f16"), ("b", "f16"), ("c", "q8_0")):
        stage.has(agent, ALPHA, context=50, slots=4, kv_type=kv_type)
    turns = all_ask(stage)
    assert all(turn.runs for turn in turns)
    assert stage.pool_of("a") == stage.pool_of("b") != stage.pool_of("c")
    assert {pool.context.kv_type: pool.context.slots for pool in stage.state.pools.values()} == {"f16": 2, "q8_0": 1}
    stage.settle()


def test_two_pools_of_one_model_take_turns_in_one_place_and_the_weights_stay(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=1)
    stage.has("a", ALPHA, context=50, kv_type="f16", kind="best_effort")
    stage.has("b", ALPHA, context=50, kv_type="q8_0", kind="best_effort")
    stage.converses("a")
    assert stage.converses("b").evidence == ("a", False, 20)
    assert stage.converses("a").evidence == ("b", True, 20 + 20)
    assert ALPHA.id in stage.engine.weights


def test_windows_on_both_sides_of_a_models_border_never_share_a_pool(given: Callable[..., Stage]) -> None:
    """Their positions turn otherwise, so that one's KV would be nonsense to the other."""
    stage, long = given(cap=1000), model("long", border=60)
    for agent, window in (("a", 50), ("b", 60), ("c", 61), ("d", 80)):
        stage.has(agent, long, context=window)
    assert stage.pool_of("a") == stage.pool_of("b") != stage.pool_of("c") == stage.pool_of("d")


def test_a_guaranteed_agent_shares_its_pool_with_nobody(crew: Stage) -> None:
    crew.has("g", ALPHA, context=50, slots=4, kind="guaranteed")
    turns = all_ask(crew, "gab")
    assert all(turn.runs for turn in turns)
    assert slots(crew, "g") == 1
    assert [id for id, agent in crew.state.agents.items() if agent.pool == crew.pool_of("g")] == ["g"]
    crew.settle()

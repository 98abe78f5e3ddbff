"""Turns as stories: who runs, whose KV moves for whom, and what measured contexts do to the books."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import AdmissionRefused, DecodeFailed, RefusalCode, TurnCancelled, TurnQueueFull, TurnTimedOut, UnknownAgent
from conductor.types import AgentId, KvPlace
from tests.support.calls import TurnCall
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model

A = AgentId("a")
DELTA = model("delta")


@pytest.fixture
def crew(given: Callable[..., Stage]) -> Stage:
    """Three agents on three models, one live context; 400 bytes booked of 1000."""
    stage = given(cap=1000, live_contexts=1)
    for agent, plan in (("a", ALPHA), ("b", BETA), ("c", GAMMA)):
        stage.has(agent, plan, context=100)
    return stage


def whereabouts(stage: Stage) -> tuple[KvPlace, int, int]:
    """Of agent `a`: where its KV is, the tokens of its session, the bytes saved."""
    agent = stage.state.agents[A]
    return agent.place, agent.tokens, stage.state.kv_books.saved_bytes(agent)


def order_of_service(stage: Stage) -> list[TurnCall]:
    """The engine does everything, in order; the turns as they began."""
    order: list[TurnCall] = []
    while stage.engine.todo:
        work = stage.engine.todo[0]
        if isinstance(work, actions.RunTurn):
            order.append(stage.turns[work.turn_id])
        stage.does(work)
    return order


# --- the swap ---------------------------------------------------------------------------------------------------------


def test_a_then_b_then_a_and_each_turn_says_what_moved_for_it(crew: Stage) -> None:
    assert crew.converses("a", tokens=10).evidence == (None, False, 0)
    assert crew.converses("b", tokens=7).evidence == ("a", False, 20)
    assert crew.converses("a", tokens=15).evidence == ("b", True, 14 + 20)
    assert crew.converses("a", tokens=20).evidence == (None, False, 0), "its context was live still"


def test_a_switch_moves_bytes_between_holders_and_books_none(crew: Stage) -> None:
    crew.converses("a")
    turn = crew.asks("b")
    assert crew.booked == 400
    crew.closed("a")
    assert crew.booked == 400
    crew.opened("b")
    assert crew.booked == 400
    crew.finished(turn)


def test_a_swap_closes_then_opens_then_runs(crew: Stage) -> None:
    crew.converses("a")
    turn = crew.asks("b")
    assert crew.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    crew.closed("a")
    assert [type(work) for work in crew.engine.todo] == [actions.OpenPool]
    crew.opened("b")
    assert turn.runs
    crew.finished(turn)


def test_the_records_say_where_an_agents_kv_is(crew: Stage) -> None:
    assert whereabouts(crew) == (KvPlace.TOKENS, 0, 0)
    crew.converses("a", tokens=10)
    assert whereabouts(crew) == (KvPlace.SLOT, 10, 0)
    crew.converses("b")
    assert whereabouts(crew) == (KvPlace.HOST, 10, 20)


def test_kv_that_could_not_be_used_is_not_called_restored(crew: Stage) -> None:
    crew.converses("a")
    crew.converses("b", tokens=7)
    turn = crew.asks("a")
    crew.closed("b")
    crew.opened("a", kv_lost=True)
    assert turn.evidence == ("b", False, 14)
    crew.finished(turn)


def test_a_context_that_held_no_tokens_is_evicted_without_evidence(crew: Stage) -> None:
    turn = crew.asks("a")
    crew.gives_up(turn)
    crew.opened("a")
    assert crew.converses("b").evidence == (None, False, 0)


def test_agents_of_one_model_take_turns_in_one_place_even_with_places_free(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=3)
    stage.has("a", ALPHA)
    stage.has("b", ALPHA)
    stage.converses("a", tokens=10)
    assert stage.converses("b").evidence == ("a", False, 20)


def test_with_places_enough_nobody_is_evicted(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    stage.has("a", ALPHA)
    stage.has("b", BETA)
    for agent in "abab":
        assert stage.converses(agent).evidence == (None, False, 0)
    assert stage.booked == 300, "both contexts are live; 50 bytes of them are beyond the promise, and there while nobody asks"


def test_the_one_used_longest_ago_makes_room(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA), ("c", GAMMA)):
        stage.has(agent, plan)
    for agent in "aba":
        stage.converses(agent)
    assert stage.converses("c").evidence[0] == "b"


# --- whose turn it is -------------------------------------------------------------------------------------------------


def test_turns_of_different_models_run_side_by_side_where_contexts_may(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    stage.has("a", ALPHA)
    stage.has("b", BETA)
    turns = [stage.asks("a"), stage.asks("b")]
    stage.opened("b")
    stage.opened("a")
    assert all(turn.runs for turn in turns)
    stage.settle()


def test_turns_are_taken_in_the_order_of_their_arrival(crew: Stage) -> None:
    turns = [crew.asks(agent) for agent in "abcab"]
    assert order_of_service(crew) == turns


def test_one_agents_turns_never_overlap_and_keep_their_order(crew: Stage) -> None:
    first, second = crew.asks("a"), crew.asks("a")
    crew.opened("a")
    assert first.runs
    assert second.waits
    crew.finished(first)
    assert second.runs
    crew.finished(second)


def test_a_higher_priority_is_served_first(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent, plan, priority in (("a", ALPHA, 0), ("b", BETA, 0), ("c", GAMMA, 5)):
        stage.has(agent, plan, priority=priority)
    running = stage.asks("a")
    stage.opened("a")
    second, urgent = stage.asks("b"), stage.asks("c")
    stage.finished(running)
    stage.closed("a")
    stage.opened("c")
    assert urgent.runs
    assert second.waits
    stage.settle()


def test_whoever_waits_grows_in_priority_so_a_stream_of_urgent_ones_keeps_nobody_out(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, ageing_s=60.0)
    for agent, plan, priority in (("a", ALPHA, 0), ("b", BETA, 0), ("c", GAMMA, 2), ("d", DELTA, 2)):
        stage.has(agent, plan, priority=priority)
    running = stage.asks("a")
    stage.opened("a")
    patient = stage.asks("b")
    stage.passes(119.0)
    urgent = stage.asks("c")
    stage.finished(running)
    stage.brings_on(urgent)
    stage.passes(2.0)
    too_late = stage.asks("d")
    assert order_of_service(stage) == [urgent, patient, too_late], "whole priorities count: after 120 s it has two"


def test_an_agent_that_is_not_admitted_yet_has_no_turns(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.registers("a", ALPHA)
    stage.asks("a").failed_with(UnknownAgent)
    stage.loaded(ALPHA)
    stage.converses("a")


def test_everybody_admitted_gets_its_turn_on_a_full_ledger(given: Callable[..., Stage]) -> None:
    stage = given(cap=400)
    for agent, plan, context in (("a", ALPHA, 100), ("b", BETA, 60), ("c", GAMMA, 100)):
        stage.has(agent, plan, context=context)
    assert stage.booked == 400
    for agent in "abcacb":
        stage.converses(agent)


# --- giving up --------------------------------------------------------------------------------------------------------


def test_a_waiting_turn_given_up_ends_at_once(crew: Stage) -> None:
    running, waiting = crew.asks("a"), crew.asks("b")
    crew.opened("a")
    crew.gives_up(waiting)
    waiting.failed_with(TurnCancelled)
    crew.finished(running)
    assert crew.engine.todo == []


def test_a_running_turn_given_up_is_asked_to_stop_and_frees_its_agent_when_it_did(crew: Stage) -> None:
    turn = crew.asks("a")
    crew.opened("a")
    crew.gives_up(turn)
    assert turn.stopped
    crew.finished(turn)
    assert crew.converses("a").evidence == (None, False, 0)


def test_giving_up_twice_or_too_late_changes_nothing(crew: Stage) -> None:
    turn = crew.asks("a")
    crew.opened("a")
    crew.finished(turn)
    before = crew.picture()
    crew.gives_up(turn)
    crew.gives_up(turn)
    assert crew.picture() == before


def test_a_turn_given_up_while_its_context_opens_leaves_the_context_for_the_next(crew: Stage) -> None:
    crew.gives_up(crew.asks("a"))
    crew.opened("a")
    assert crew.engine.todo == []
    turn = crew.asks("a")
    assert crew.engine.todo == [actions.TakeSeat(A, crew.pool_of("a"))]
    crew.seat_taken("a")
    assert turn.runs
    crew.finished(turn)


def test_a_turn_given_up_while_another_agent_is_evicted_for_it_leaves_the_place_to_the_next(crew: Stage) -> None:
    crew.converses("a")
    turn = crew.asks("b")
    crew.gives_up(turn)
    crew.closed("a")
    assert crew.engine.todo == []
    assert crew.converses("c").evidence == (None, False, 0)


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_turn_that_waits_too_long_is_told_what_it_waited_for_and_the_others_go_on(crew: Stage) -> None:
    crew.has("a2", ALPHA, context=100)
    running = crew.asks("a")
    reasons = {
        crew.asks("a2"): "its model's seat",
        crew.asks("b"): "turns of others to end",
    }
    crew.opened("a")
    reasons[crew.asks("a")] = "an earlier turn of the same agent"
    crew.at += 7.5
    for turn, reason in reasons.items():
        crew.runs_out_of_time(turn)
        assert turn.failed_with(TurnTimedOut).reason == reason
        assert turn.failed_with(TurnTimedOut).waited_s == 7.5
    crew.finished(running)
    assert crew.engine.todo == [], "nobody is evicted for those who gave up"


def test_a_turn_whose_context_is_being_made_has_what_it_waited_for(crew: Stage) -> None:
    """So that a turn that may not wait at all has its turn on an idle device, and after a swap that is only a moment's work."""
    opening = crew.asks("a")
    crew.runs_out_of_time(opening)
    crew.opened("a")
    crew.finished(opening)
    swapping = crew.asks("b")
    crew.runs_out_of_time(swapping)
    crew.closed("a")
    crew.opened("b")
    assert swapping.runs
    crew.finished(swapping)


def test_a_turn_that_runs_has_what_it_waited_for(crew: Stage) -> None:
    turn = crew.asks("a")
    crew.opened("a")
    before = crew.picture()
    crew.runs_out_of_time(turn)
    assert crew.picture() == before
    assert turn.runs
    crew.finished(turn)
    crew.runs_out_of_time(turn)
    assert len(turn.endings) == 1


def test_the_line_of_turns_is_bounded(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, turn_queue_limit=2)
    stage.has("a", ALPHA)
    running = stage.asks("a")
    stage.opened("a")
    waiting = [stage.asks("a"), stage.asks("a")]
    before = stage.picture()
    assert stage.asks("a").failed_with(TurnQueueFull).waiting == 2
    assert stage.picture() == before
    stage.gives_up(waiting[0])
    assert stage.asks("a").waits
    stage.finished(running)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_context_that_cannot_be_opened_fails_its_turn_and_nothing_else(crew: Stage) -> None:
    crew.converses("a", tokens=10)
    crew.converses("b")
    turn = crew.asks("a")
    crew.closed("b")
    crew.open_failed("a", DecodeFailed(A, "no memory"))
    assert turn.failed_with(DecodeFailed).problem == "no memory"
    agent = crew.state.agents[A]
    assert (agent.place, agent.tokens, agent.seat) == (KvPlace.HOST, 10, None)
    assert crew.booked == 400
    assert crew.converses("a").evidence == (None, True, 20)


def test_the_next_turn_of_the_same_agent_tries_again(crew: Stage) -> None:
    first, second = crew.asks("a"), crew.asks("a")
    crew.open_failed("a", DecodeFailed(A, "no memory"))
    first.failed_with(DecodeFailed)
    crew.opened("a")
    assert second.runs
    crew.finished(second)


@pytest.mark.parametrize(("takes", "booked"), [(130, 430), (100, 400), (60, 400)])
def test_a_measured_context_replaces_the_estimate_in_the_books(crew: Stage, takes: int, booked: int) -> None:
    turn = crew.asks("a")
    crew.opened("a", takes=takes)
    assert turn.runs
    assert crew.state.agents[A].context_bytes == takes
    assert crew.booked == booked, "b and c are promised 100 still"
    crew.finished(turn)


def test_a_context_measured_smaller_lets_the_next_one_in(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA, context=200)
    waiting = stage.registers("b", BETA, context=50, may_wait=True)
    turn = stage.asks("a")
    assert waiting.waits
    stage.opened("a", takes=100)
    stage.loaded(BETA)
    assert waiting.admission.charged_bytes == 100
    stage.finished(turn)


def test_a_measured_price_holds_for_the_next_agent_with_the_same_context(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50)
    turn = stage.asks("a")
    stage.opened("a", takes=80)
    stage.finished(turn)
    assert stage.registers("b", ALPHA, context=50).admission.context_bytes == 80
    assert stage.registers("c", ALPHA, context=51).admission.context_bytes == 51


def test_a_context_too_large_for_the_books_refuses_the_turn_and_keeps_the_session(given: Callable[..., Stage]) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=7)
    turn = stage.asks("a")
    stage.closed("b")
    stage.opened("a", takes=51)
    refusal = turn.failed_with(AdmissionRefused).refusal
    assert (refusal.code, refusal.requested_bytes, refusal.free_bytes) == (RefusalCode.CAP, 1, 0)
    assert stage.engine.todo == [actions.ClosePool(stage.pool_of("a"))]
    assert stage.booked == 250
    stage.closed("a")
    assert whereabouts(stage) == (KvPlace.HOST, 10, 20)
    assert stage.converses("a").evidence == (None, True, 20), "with the size it was promised it goes on where it was"

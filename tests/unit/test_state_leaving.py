"""Leaving as stories: asked for or by the owner's death, at whatever moment it comes, every byte comes back once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import DecodeFailed, TurnCancelled, UnknownAgent
from conductor.types import AgentId, KvPlace
from tests.support.calls import Call, TurnCall
from tests.support.stories import ALPHA, BETA, Stage

A = AgentId("a")


@pytest.fixture
def pair(given: Callable[..., Stage]) -> Stage:
    """Two agents on two models with one live context between them; each belongs to a worker of its own."""
    stage = given(cap=1000, live_contexts=1)
    stage.has("a", ALPHA, owner="worker of a")
    stage.has("b", BETA, owner="worker of b")
    return stage


def unregister(stage: Stage) -> Call | None:
    return stage.unregisters("a")


def owner_dies(stage: Stage) -> Call | None:
    stage.dies("worker of a")
    return None


departures = pytest.mark.parametrize("leave", [unregister, owner_dies])
Leave = Callable[[Stage], "Call | None"]


def assert_a_is_gone(stage: Stage, leaving: Call | None) -> None:
    stage.settle()
    assert leaving is None or leaving.is_done
    assert stage.agents == ["b"]
    assert stage.booked == 150
    assert ALPHA.id not in stage.engine.weights
    assert A not in stage.engine.saved


@departures
def test_leaving_with_nothing_live(pair: Stage, leave: Leave) -> None:
    leaving = leave(pair)
    assert pair.engine.todo == [actions.UnloadModel(ALPHA.id)]
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_with_an_idle_live_context_closes_it_unsaved(pair: Stage, leave: Leave) -> None:
    pair.converses("a")
    leaving = leave(pair)
    assert pair.engine.todo == [actions.LeaveSeat(A, KvPlace.TOKENS)]
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_with_kv_in_host_memory_forgets_it(pair: Stage, leave: Leave) -> None:
    pair.converses("a")
    pair.converses("b")
    assert A in pair.engine.saved
    assert_a_is_gone(pair, leave(pair))


@departures
def test_leaving_while_its_turn_waits_in_line_cancels_the_turn(pair: Stage, leave: Leave) -> None:
    running = pair.asks("b")
    pair.opened("b")
    waiting = pair.asks("a")
    leaving = leave(pair)
    waiting.failed_with(TurnCancelled)
    assert running.runs
    assert not running.stopped
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_while_its_turn_runs_stops_the_turn_and_waits_for_its_step(pair: Stage, leave: Leave) -> None:
    running, next_turn = pair.asks("a"), pair.asks("a")
    pair.opened("a")
    leaving = leave(pair)
    assert running.stopped
    next_turn.failed_with(TurnCancelled)
    assert [type(work) for work in pair.engine.todo] == [actions.RunTurn], "a context is not closed under a step"
    pair.finished(running)
    assert pair.engine.todo == [actions.LeaveSeat(A, KvPlace.TOKENS)]
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_while_its_context_opens_closes_it_once_it_is_there(pair: Stage, leave: Leave) -> None:
    turn = pair.asks("a")
    leaving = leave(pair)
    turn.failed_with(TurnCancelled)
    pair.opened("a")
    assert pair.engine.todo == [actions.ClosePool(pair.pool_of("a"))]
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_while_its_context_opens_and_the_opening_fails(pair: Stage, leave: Leave) -> None:
    turn = pair.asks("a")
    leaving = leave(pair)
    pair.open_failed("a", DecodeFailed(A, "no memory"))
    assert len(turn.endings) == 1
    assert_a_is_gone(pair, leaving)


@departures
def test_leaving_while_its_context_opens_too_large_for_the_books(given: Callable[..., Stage], leave: Leave) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA, owner="worker of a")
    stage.has("b", BETA)
    stage.asks("a")
    leaving = leave(stage)
    stage.opened("a", takes=51)
    assert_a_is_gone(stage, leaving)


@departures
def test_leaving_while_its_context_closes_for_another(pair: Stage, leave: Leave) -> None:
    pair.converses("a")
    turn = pair.asks("b")
    leaving = leave(pair)
    assert pair.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    pair.closed("a")
    assert turn.waits
    assert_a_is_gone(pair, leaving)
    assert len(turn.endings) == 1


def test_unregistering_while_the_model_loads_is_too_early(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("a", ALPHA)
    stage.unregisters("a").failed_with(UnknownAgent)
    stage.loaded(ALPHA)
    assert call.is_admitted


def test_an_owner_that_dies_while_the_model_loads_leaves_it_to_be_unloaded(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.registers("a", ALPHA, owner="worker of a")
    stage.dies("worker of a")
    assert stage.agents == []
    stage.loaded(ALPHA)
    assert stage.engine.todo == [actions.UnloadModel(ALPHA.id)]
    stage.unloaded(ALPHA.id)
    assert stage.booked == 0


def test_an_owner_that_dies_before_a_load_fails_is_not_answered_twice(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.registers("a", ALPHA, owner="worker of a")
    stage.dies("worker of a")
    stage.load_failed(ALPHA)
    assert stage.booked == 0


def test_a_newcomer_to_a_model_whose_loader_died_is_admitted_all_the_same(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.registers("a", ALPHA, owner="worker of a")
    stage.dies("worker of a")
    call = stage.registers("b", ALPHA)
    stage.loaded(ALPHA)
    assert call.is_admitted


def test_a_death_takes_all_agents_of_its_owner_and_their_model_once(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    stage.has("a", ALPHA, owner="w")
    stage.has("b", ALPHA, owner="w")
    stage.has("c", BETA, owner="w")
    stage.has("d", BETA, owner="somebody else")
    stage.converses("a")
    running = stage.asks("c")
    stage.opened("c")
    stage.dies("w")
    stage.dies("w")
    assert running.stopped
    stage.settle()
    assert stage.agents == ["d"]
    assert stage.booked == 150


def test_the_death_of_a_stranger_changes_nothing(pair: Stage) -> None:
    before = pair.picture()
    pair.dies("nobody")
    assert pair.picture() == before


def test_agents_without_an_owner_outlive_everybody(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    stage.dies("w")
    assert stage.agents == ["a"]


def test_two_who_unregister_one_agent_are_both_answered_when_it_is_gone(pair: Stage) -> None:
    turn = pair.asks("a")
    pair.opened("a")
    first, second = pair.unregisters("a"), pair.unregisters("a")
    assert first.waits
    assert second.waits
    pair.finished(turn)
    pair.settle()
    assert first.is_done
    assert second.is_done
    pair.unregisters("a").failed_with(UnknownAgent)


def test_an_unregister_and_a_death_at_once_are_one_departure(pair: Stage) -> None:
    pair.converses("a")
    leaving = pair.unregisters("a")
    pair.dies("worker of a")
    assert_a_is_gone(pair, leaving)


def test_whoever_is_leaving_takes_no_more_turns_and_its_name_is_free_when_it_is_gone(pair: Stage) -> None:
    turn: TurnCall = pair.asks("a")
    pair.opened("a")
    leaving = pair.unregisters("a")
    pair.asks("a").failed_with(UnknownAgent)
    again = pair.registers("a", ALPHA)
    assert again.waits
    pair.finished(turn)
    pair.settle()
    assert leaving.is_done
    assert again.admission.agent.id == "a"

"""Turns that end before their end, as stories: cancelled, overdue or given up while they wait, run or stand still."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import TurnCancelled, UnknownAgent
from conductor.types import AgentId, FinishReason
from tests.support.calls import Call, TurnCall
from tests.support.stories import ALPHA, Stage

A = AgentId("a")


@pytest.fixture
def chair(given: Callable[..., Stage]) -> Stage:
    """Two agents on one model that has one seat; the session of `a` has 8 tokens."""
    stage = given(cap=1000)
    for agent in "ab":
        stage.has(agent, ALPHA, context=50)
    stage.converses("a", tokens=8)
    return stage


def tokens_of_a(stage: Stage) -> int:
    assert stage.engine.tokens[A] == stage.state.agents[A].tokens
    return stage.state.agents[A].tokens


def make_ready(stage: Stage) -> None:
    while work := next((it for it in stage.engine.todo if not isinstance(it, actions.RunTurn)), None):
        stage.does(work)


def standing(stage: Stage, *, has_made: bool) -> TurnCall:
    """A turn of `a` that stands still with 15 tokens, while one of `b` runs."""
    turn = stage.asks("a")
    stage.asks("b")
    stage.progresses(a=1)
    stage.paused(turn, tokens=15, has_made=has_made)
    make_ready(stage)
    assert turn.waits
    return turn


def cancel(stage: Stage, turn: TurnCall) -> FinishReason:
    assert ended(stage.cancels(turn.agent)) == 1
    return FinishReason.CANCELLED


def let_time_run_out(stage: Stage, turn: TurnCall) -> FinishReason:
    stage.is_overdue(turn)
    return FinishReason.TIMEOUT


def ended(call: Call) -> int:
    """How many turns the caller is told that it ended."""
    assert isinstance(call.answer, actions.AnswerCancel), call.answer
    return call.answer.turns


early = pytest.mark.parametrize("end", [cancel, let_time_run_out])
End = Callable[[Stage, TurnCall], FinishReason]


# --- one turn ---------------------------------------------------------------------------------------------------------


@early
def test_one_that_waits_is_over_at_once(chair: Stage, end: End) -> None:
    chair.asks("b")
    make_ready(chair)
    turn = chair.asks("a")
    reason = end(chair, turn)
    assert turn.ended_for is reason
    assert tokens_of_a(chair) == 8
    chair.settle()


@early
def test_one_that_runs_is_asked_to_stop_and_is_over_when_it_did(chair: Stage, end: End) -> None:
    turn = chair.asks("a")
    reason = end(chair, turn)
    assert turn.stopped is reason
    assert turn.runs
    chair.finished(turn, tokens=20)
    assert tokens_of_a(chair) == 20


@early
def test_one_that_stands_still_is_over_with_what_it_made(chair: Stage, end: End) -> None:
    turn = standing(chair, has_made=True)
    reason = end(chair, turn)
    assert turn.ended_for is reason
    assert tokens_of_a(chair) == 15
    chair.settle()
    assert chair.converses("a").evidence == ("b", True, 20 + 30), "all of its KV is the session's"


@early
def test_one_that_stands_still_and_made_nothing_leaves_the_session_as_before_it(chair: Stage, end: End) -> None:
    turn = standing(chair, has_made=False)
    reason = end(chair, turn)
    assert turn.ended_for is reason
    assert tokens_of_a(chair) == 8
    chair.settle()


@early
def test_one_that_stands_still_after_it_was_asked_to_stop_is_over(chair: Stage, end: End) -> None:
    turn, other = chair.asks("a"), chair.asks("b")
    chair.progresses(a=1)
    assert turn.pausing
    reason = end(chair, turn)
    chair.paused(turn, tokens=15)
    assert turn.ended_for is reason
    make_ready(chair)
    assert other.runs
    chair.settle()


@early
def test_one_that_is_asked_to_stop_is_not_asked_to_stand_still(chair: Stage, end: End) -> None:
    turn = chair.asks("a")
    end(chair, turn)
    other = chair.asks("b")
    chair.progresses(a=1)
    assert not turn.pausing
    chair.finished(turn)
    make_ready(chair)
    assert other.runs
    chair.settle()


@early
def test_one_whose_larger_window_is_being_made_is_over_and_the_agent_goes_on(given: Callable[..., Stage], end: End) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, ladder=(20, 40))
    stage.converses("a", tokens=8)
    turn = stage.asks("a")
    stage.outgrew(turn, tokens=20, has_made=True)
    reason = end(stage, turn)
    assert turn.ended_for is reason
    stage.settle()
    assert tokens_of_a(stage) == 20
    stage.converses("a", tokens=25)


@early
def test_one_whose_seat_is_being_made_leaves_it_for_the_next(given: Callable[..., Stage], end: End) -> None:
    stage = given(cap=1000)
    for agent in "ab":
        stage.has(agent, ALPHA, context=50)
    turn, other = stage.asks("a"), stage.asks("b")
    reason = end(stage, turn)
    assert turn.ended_for is reason
    make_ready(stage)
    assert other.runs
    stage.settle()


def test_what_came_first_is_why_it_stops(chair: Stage) -> None:
    turn = chair.asks("a")
    chair.is_overdue(turn)
    chair.cancels("a")
    assert turn.stopped is FinishReason.TIMEOUT
    chair.finished(turn)


def test_too_late_changes_nothing(chair: Stage) -> None:
    turn = chair.asks("a")
    chair.finished(turn)
    before = chair.picture()
    chair.is_overdue(turn)
    assert ended(chair.cancels("a")) == 0
    assert chair.picture() == before


# --- all of an agent's ------------------------------------------------------------------------------------------------


def test_all_turns_of_an_agent_are_cancelled_and_nobody_elses(chair: Stage) -> None:
    running, waiting, other = chair.asks("a"), chair.asks("a"), chair.asks("b")
    call = chair.cancels("a")
    assert ended(call) == 2
    assert call.is_done
    assert running.stopped is FinishReason.CANCELLED
    assert waiting.ended_for is FinishReason.CANCELLED
    assert other.waits
    chair.settle()


def test_the_agent_stays_and_its_next_turn_is_like_any_other(chair: Stage) -> None:
    chair.cancels("a")
    turn = chair.asks("a")
    assert turn.runs
    chair.finished(turn)


def test_a_stranger_has_nothing_to_cancel(chair: Stage) -> None:
    assert chair.cancels("nobody").failed_with(UnknownAgent).agent_id == "nobody"


def test_a_guaranteed_agents_turn_is_cancelled_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("g", ALPHA, context=50, kind="guaranteed")
    running, waiting = stage.asks("g"), stage.asks("g")
    assert ended(stage.cancels("g")) == 2
    assert running.stopped
    assert waiting.ended_for is FinishReason.CANCELLED
    stage.finished(running)


# --- given up ---------------------------------------------------------------------------------------------------------


def test_a_standing_turn_that_nobody_waits_for_any_more_is_taken_back_whole(chair: Stage) -> None:
    turn = standing(chair, has_made=True)
    chair.gives_up(turn)
    turn.failed_with(TurnCancelled)
    assert A not in chair.engine.suspended
    assert tokens_of_a(chair) == 8
    chair.settle()


def test_an_agent_that_leaves_takes_its_standing_turn_along(chair: Stage) -> None:
    turn = standing(chair, has_made=True)
    leaving = chair.unregisters("a")
    turn.failed_with(TurnCancelled)
    assert leaving.is_done
    assert not chair.engine.saved
    chair.settle()
    assert chair.agents == ["b"]

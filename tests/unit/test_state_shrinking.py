"""What is given back, as stories: windows that shrink, contexts that idle beyond the promise, agents that nobody uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import TurnTimedOut, UnknownAgent, WindowRefused
from conductor.types import AgentId, KvPlace, ModelState
from tests.support.stories import ALPHA, BETA, GAMMA, Stage

A = AgentId("a")
LADDER = (20, 40)


def grow(stage: Stage, *, to_hold: int) -> None:
    """A turn of `a` that outgrows its first window and ends with so many tokens."""
    turn = stage.asks("a")
    stage.brings_on(turn)
    stage.outgrew(turn, tokens=20, desired=80)
    stage.brings_on(turn)
    stage.finished(turn, tokens=to_hold)


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "promised"), [(5, 20), (20, 20), (21, 40), (40, 40), (41, 80), (80, 80)])
def test_after_a_turn_the_smallest_window_that_the_conversation_fits_in_is_promised(
    given: Callable[..., Stage], tokens: int, promised: int
) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    grow(stage, to_hold=tokens)
    assert stage.state.agents[A].window_in_use == promised
    assert stage.booked == 180, "its context is live still, as large as it was made"
    stage.has("b", BETA, context=10)
    stage.converses("b")
    assert stage.booked == 200 + promised


def test_a_conversation_that_was_reset_comes_back_in_a_small_window(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.has("b", BETA, context=10)
    grow(stage, to_hold=70)
    turn = stage.asks("a")
    assert turn.run is not None
    assert turn.run.room == 80
    stage.finished(turn, tokens=3)
    stage.converses("b")
    turn = stage.asks("a")
    stage.settle()
    assert turn.run is not None
    assert turn.run.room == 20


def test_the_room_of_a_window_that_shrank_goes_to_whoever_asks(given: Callable[..., Stage]) -> None:
    stage = given(cap=270)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    grow(stage, to_hold=5)
    call = stage.registers("b", BETA, context=70)
    assert call.waits
    assert stage.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    stage.settle()
    assert call.admission.charged_bytes == 150


def test_a_larger_window_that_was_measured_cheaper_is_taken_instead(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    turn = stage.asks("a")
    stage.opened("a", takes=45)
    stage.outgrew(turn, tokens=20)
    stage.closed("a")
    stage.opened("a", takes=41)
    stage.finished(turn, tokens=5)
    assert stage.state.agents[A].window_in_use == 40, "41 bytes, where 20 tokens took 45"


# --- contexts that idle beyond the promise ----------------------------------------------------------------------------


@pytest.fixture
def idle(given: Callable[..., Stage]) -> Stage:
    """Contexts of 50 and 30 are live, 50 bytes of turns are promised; what idles for 60 s is given back."""
    stage = given(cap=1000, live_contexts=2, idle_shrink_s=60.0)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=30)
    stage.converses("a", tokens=10)
    stage.passes(30.0)
    stage.converses("b", tokens=10)
    return stage


def test_what_idles_beyond_the_promise_is_given_back_after_its_time_used_longest_ago_first(idle: Stage) -> None:
    idle.passes(29.0)
    assert (idle.booked, idle.engine.todo) == (280, [])
    idle.passes(1.0)
    assert idle.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    idle.settle()
    idle.passes(1.0)
    assert idle.booked == 250, "b's context is part of what is promised"
    idle.passes(10_000.0)
    assert idle.engine.todo == []
    assert idle.converses("a").evidence == (None, True, 20)


def test_whoever_is_used_does_not_idle(idle: Stage) -> None:
    idle.passes(29.0)
    turn = idle.asks("a")
    idle.passes(1000.0)
    assert [work for work in idle.engine.todo if isinstance(work, actions.LeaveSeat)] == [
        actions.LeaveSeat(AgentId("b"), KvPlace.HOST)
    ]
    idle.finished(turn)
    idle.settle()


def test_without_a_time_nothing_is_given_back_before_somebody_asks(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    stage.passes(1_000_000.0)
    assert (stage.booked, stage.engine.todo) == (300, [])


def test_idle_weights_of_best_effort_agents_are_given_back_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=3, idle_shrink_s=60.0)
    for agent, plan in (("a", ALPHA), ("b", BETA), ("c", GAMMA)):
        stage.has(agent, plan, context=50, kind="best_effort")
        stage.converses(agent)
    assert stage.booked == 450
    for _ in range(4):
        stage.passes(61.0)
        stage.settle()
    assert stage.booked == 150
    assert sum(model.state is ModelState.RESIDENT for model in stage.state.models.values()) <= 1


def test_a_window_that_grew_is_given_back_when_it_idles(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, idle_shrink_s=60.0)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    grow(stage, to_hold=5)
    assert stage.booked == 180
    stage.passes(60.0)
    stage.settle()
    stage.passes(1.0)
    assert stage.booked == 120


# --- agents that nobody uses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["guaranteed", "shared", "best_effort"])
def test_an_agent_that_nobody_used_for_its_time_is_unregistered(given: Callable[..., Stage], kind: str) -> None:
    stage = given(cap=1000, idle_ttl_s=60.0)
    stage.has("a", ALPHA, kind=kind)
    stage.passes(59.0)
    assert stage.agents == ["a"]
    stage.passes(1.0)
    stage.settle()
    assert (stage.agents, stage.booked) == ([], 0)
    stage.asks("a").failed_with(UnknownAgent)


def test_a_turn_begins_its_time_anew_and_while_one_waits_or_runs_it_stands_still(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, idle_ttl_s=60.0)
    stage.has("a", ALPHA)
    stage.has("b", ALPHA)
    running, waiting = stage.asks("a"), stage.asks("b")
    stage.opened("a")
    stage.passes(1000.0)
    assert stage.agents == ["a", "b"]
    stage.finished(running)
    stage.settle()
    assert waiting.endings
    stage.passes(59.0)
    assert stage.agents == ["a", "b"]
    stage.passes(1.0)
    stage.settle()
    assert stage.agents == []


def test_who_waits_for_room_gets_that_of_whom_nobody_uses(given: Callable[..., Stage]) -> None:
    stage = given(cap=150, idle_ttl_s=60.0)
    stage.has("a", ALPHA)
    call = stage.registers("b", BETA, may_wait=True)
    stage.passes(60.0)
    stage.settle()
    assert call.is_admitted
    assert stage.agents == ["b"]


def test_an_agent_whose_turn_waited_in_vain_was_in_use_until_then(given: Callable[..., Stage]) -> None:
    stage = given(cap=140, idle_ttl_s=60.0)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.converses("a", tokens=8)
    trainer = stage.reserves("trainer", 20).reservation
    turn = stage.asks("a")
    stage.outgrew(turn, tokens=20)
    stage.passes(100.0)
    stage.runs_out_of_time(turn)
    turn.failed_with(WindowRefused)
    stage.passes(1.0)
    stage.settle()
    assert stage.agents == ["a"]
    stage.releases(trainer)


def test_an_agent_whose_turn_timed_out_was_in_use_until_then(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, idle_ttl_s=60.0)
    stage.has("a", ALPHA)
    stage.has("b", ALPHA)
    running, waiting = stage.asks("a"), stage.asks("b")
    stage.opened("a")
    stage.passes(100.0)
    stage.runs_out_of_time(waiting)
    waiting.failed_with(TurnTimedOut)
    stage.passes(1.0)
    assert stage.agents == ["a", "b"]
    stage.finished(running)

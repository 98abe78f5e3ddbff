"""Strangers on the device, as stories: the cap falls, best-effort agents give way first, newcomers wait, nobody is dropped.

What may be booked is nine tenths of what there is, so the physical limit is a ninth of the cap above it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.core.sessions import Phase
from conductor.errors import AdmissionRefused, RefusalCode, TurnTimedOut
from conductor.types import AgentId, KvPlace, ModelState
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model

A, B, Z = AgentId("a"), AgentId("b"), AgentId("z")


@pytest.fixture
def crew(given: Callable[..., Stage]) -> Stage:
    """Two shared agents and a best-effort one, all live: 450 bytes in use of 900, 350 of them promised."""
    stage = given(cap=900, live_contexts=3)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    stage.has("z", GAMMA, context=50, kind="best_effort")
    for agent in "abz":
        stage.converses(agent, tokens=10)
    assert stage.booked == 450
    return stage


def live(stage: Stage) -> list[str]:
    return [agent.id for agent in stage.state.agents.values() if agent.phase in (Phase.READY, Phase.BUSY)]


# --- who gives way ----------------------------------------------------------------------------------------------------


def test_strangers_in_free_memory_disturb_nobody(crew: Stage) -> None:
    crew.reads_device(strangers=450)
    assert (crew.booked, crew.engine.todo) == (450, [])
    crew.reads_device(strangers=0)
    assert (crew.booked, crew.engine.todo) == (450, [])


def test_best_effort_agents_give_way_first_their_context_and_then_their_weights(crew: Stage) -> None:
    crew.reads_device(strangers=451)
    assert crew.engine.todo == [actions.LeaveSeat(Z, KvPlace.HOST)]
    crew.settle()
    assert crew.booked == 400
    crew.reads_device(strangers=501)
    assert crew.engine.todo == [actions.UnloadModel(GAMMA.id)]
    crew.settle()
    assert crew.booked == 350, "its turn is promised still"
    assert live(crew) == ["a", "b"]


def test_shared_agents_keep_their_contexts_while_best_effort_memory_suffices(crew: Stage) -> None:
    crew.reads_device(strangers=600)
    crew.settle()
    assert live(crew) == ["a", "b"]
    assert crew.booked == 300


def test_idle_shared_agents_give_way_next_used_longest_ago_first(crew: Stage) -> None:
    crew.reads_device(strangers=600)
    crew.settle()
    crew.converses("b")
    crew.converses("a")
    assert live(crew) == ["b", "a"] or live(crew) == ["a", "b"]
    crew.reads_device(strangers=601)
    assert crew.engine.todo == [actions.LeaveSeat(B, KvPlace.HOST)]
    crew.settle()
    assert crew.booked == 250, "one turn of theirs is promised still"


def test_whoever_runs_goes_on(crew: Stage) -> None:
    running = crew.asks("z")
    crew.reads_device(strangers=800)
    assert [work for work in crew.engine.todo if not isinstance(work, actions.RunTurn)] == [
        actions.LeaveSeat(A, KvPlace.HOST),
        actions.LeaveSeat(B, KvPlace.HOST),
    ]
    assert running.runs
    assert not running.stopped
    crew.finished(running)
    crew.settle()
    assert live(crew) == []
    assert crew.agents == ["a", "b", "z"], "and nobody was dropped"


def test_guaranteed_agents_give_nothing(given: Callable[..., Stage]) -> None:
    stage = given(cap=900)
    stage.has("g", ALPHA, context=300, kind="guaranteed")
    stage.reads_device(strangers=900)
    assert (stage.booked, stage.engine.todo) == (400, [])
    assert stage.asks("g").runs
    stage.settle()


# --- newcomers --------------------------------------------------------------------------------------------------------


def test_newcomers_are_refused_with_drift_while_more_is_booked_than_there_is(crew: Stage) -> None:
    crew.reads_device(strangers=700)
    refusal = crew.registers("c", ALPHA, context=10).refusal
    assert (refusal.code, refusal.retry_after_s) == (RefusalCode.DRIFT, 1.0), "it would add nothing, and waits all the same"
    assert crew.reserves("trainer", 1).refusal.code is RefusalCode.DRIFT
    crew.settle()


def test_newcomers_whose_room_strangers_have_are_refused_with_drift(crew: Stage) -> None:
    crew.reads_device(strangers=401)
    heavy = model("heavy", weights=500)
    refusal = crew.registers("c", heavy, context=10).refusal
    assert (refusal.code, refusal.retry_after_s) == (RefusalCode.DRIFT, 1.0)
    assert crew.registers("d", model("huge", weights=900), context=1).refusal.code is RefusalCode.NEVER
    crew.reads_device()
    assert crew.registers("d", model("large", weights=551), context=10).refusal.code is RefusalCode.CAP


def test_whoever_may_wait_is_admitted_when_the_strangers_leave(crew: Stage) -> None:
    crew.reads_device(strangers=700)
    call = crew.registers("c", ALPHA, context=10, may_wait=True)
    crew.settle()
    assert call.waits
    crew.reads_device(strangers=300)
    assert call.is_admitted


def test_freed_memory_is_confirmed_before_it_is_given_away(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.has("a", ALPHA)
    call = stage.registers("b", BETA, may_wait=True)
    stage.unregisters("a")
    with stage.at_once():
        stage.unloaded(ALPHA.id)
        stage.reads_device(strangers=100)  # llama.cpp gave it back, the driver did not
    assert call.waits
    assert stage.booked == 0
    stage.reads_device()
    stage.settle()
    assert call.is_admitted


# --- turns ------------------------------------------------------------------------------------------------------------


def test_shared_agents_have_their_turns_within_what_is_physically_there(crew: Stage) -> None:
    """200 bytes may be booked, and are by the weights alone; 300 are there."""
    crew.reads_device(strangers=700)
    crew.settle()
    assert crew.state.ledger.cap_bytes == 200
    assert crew.booked == 250, "one turn is booked still: it was promised before the strangers came"
    assert crew.converses("a").evidence == (None, True, 20)
    assert live(crew) == [], "whoever idles gives its bytes back at once"
    assert crew.converses("b").evidence == (None, True, 20)


def test_a_context_that_was_opened_for_a_turn_is_not_closed_before_the_turn_had_it(given: Callable[..., Stage]) -> None:
    stage = given(cap=900)
    stage.has("a", ALPHA, context=500)
    stage.reads_device(strangers=350)
    turn = stage.asks("a")
    stage.opened("a")
    assert turn.runs, "600 bytes are needed, 550 may be booked, 650 are there"
    stage.finished(turn)
    assert stage.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]


def test_what_is_not_physically_there_is_waited_for_and_whoever_fits_goes_on(crew: Stage) -> None:
    crew.has("c", ALPHA, context=150)
    crew.converses("c", tokens=150)
    crew.reads_device(strangers=700)
    crew.settle()
    too_large, fits = crew.asks("c"), crew.asks("a")
    crew.settle()
    assert fits.endings
    assert too_large.waits
    crew.reads_device()
    crew.settle()
    assert too_large.endings


def test_a_turn_that_strangers_keep_waiting_is_told_so(crew: Stage) -> None:
    crew.reads_device(strangers=600)
    crew.settle()
    turn = crew.asks("z")
    assert turn.waits
    assert crew.engine.todo == []
    crew.runs_out_of_time(turn)
    assert turn.failed_with(TurnTimedOut).reason == "other programs took memory of this device"


def test_when_the_strangers_leave_everything_is_as_before(crew: Stage) -> None:
    crew.reads_device(strangers=600)
    crew.settle()
    waiting = crew.asks("z")
    assert waiting.waits
    crew.reads_device()
    crew.settle()
    for agent in "ab":
        crew.converses(agent)
    assert crew.booked == 450
    assert waiting.evidence[1], "its KV came back with its weights"
    assert crew.state.models[GAMMA.id].state is ModelState.RESIDENT


def test_best_effort_turns_go_on_where_they_fit(crew: Stage) -> None:
    crew.reads_device(strangers=500)
    crew.settle()
    assert crew.converses("z").run


def test_a_shared_agents_window_grows_where_only_best_effort_promises_are_in_its_way(given: Callable[..., Stage]) -> None:
    stage = given(cap=900)
    stage.has("a", ALPHA, context=80, ladder=(50,))
    stage.has("z", GAMMA, context=300, kind="best_effort")
    stage.reads_device(strangers=600)
    turn = stage.asks("a")
    stage.opened("a")
    stage.outgrew(turn, tokens=50)
    stage.settle()
    assert turn.endings, "180 bytes of 300"


def test_a_best_effort_agents_window_does_not_grow_while_its_promise_is_gone(given: Callable[..., Stage]) -> None:
    stage = given(cap=900)
    stage.has("z", ALPHA, context=80, ladder=(50,), kind="best_effort")
    stage.has("y", GAMMA, context=600, kind="best_effort")
    stage.reads_device(strangers=600)
    turn = stage.asks("z")
    stage.loaded(ALPHA)
    stage.opened("z")
    stage.outgrew(turn, tokens=50)
    stage.settle()
    assert turn.waits
    stage.reads_device()
    stage.settle()
    assert turn.endings


def test_a_measured_context_is_not_refused_for_a_promise_that_is_gone_anyway(given: Callable[..., Stage]) -> None:
    stage = given(cap=900)
    stage.has("a", ALPHA, context=50)
    stage.has("z", GAMMA, context=300, kind="best_effort")
    stage.reads_device(strangers=600)
    turn = stage.asks("a")
    stage.opened("a", takes=53)
    assert turn.runs, "153 bytes of 300"
    stage.finished(turn)


def test_an_agent_whose_larger_window_is_booked_but_cannot_be_made_gives_way_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=900, min_turn_s=5.0)
    stage.has("a", ALPHA, context=600, ladder=(200,), slots=2)
    stage.has("b", ALPHA, context=200, slots=2)
    large, small = stage.asks("a"), stage.asks("b")
    stage.brings_on(large)
    stage.brings_on(small)
    stage.outgrew(large, tokens=200)
    assert not small.pausing, "it has just begun"
    stage.reads_device(strangers=550)
    stage.finished(small)
    assert stage.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST), actions.LeaveSeat(B, KvPlace.HOST)]
    stage.settle()
    assert large.waits
    stage.reads_device()
    stage.settle()
    assert large.endings


def test_a_best_effort_agent_that_waits_to_grow_gives_way_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=250)
    stage.has("z", ALPHA, context=150, ladder=(50,), kind="best_effort")
    stage.reads_device(strangers=90)
    turn = stage.asks("z")
    stage.loaded(ALPHA)
    stage.opened("z")
    stage.outgrew(turn, tokens=50)
    assert (turn.waits, stage.engine.todo) == (True, [])
    stage.reads_device(strangers=150)
    assert stage.engine.todo == [actions.LeaveSeat(Z, KvPlace.HOST)]
    stage.settle()
    assert turn.waits
    stage.reads_device()
    stage.settle()
    assert turn.endings


@pytest.mark.parametrize(("kind", "context", "weights"), [("shared", 20, 121), ("best_effort", 40, 215)])
def test_weights_that_would_break_the_promise_when_the_strangers_are_gone_are_refused(
    given: Callable[..., Stage], kind: str, context: int, weights: int
) -> None:
    stage = given(cap=250)
    stage.has("z", BETA, context=30, kind="best_effort")
    call = stage.registers("a", ALPHA, context=context, kind=kind)
    turn = stage.asks("a") if kind == "best_effort" else None
    stage.reads_device(strangers=30)
    stage.loaded(ALPHA, weights=weights)
    if turn is None:
        assert call.refusal.requested_bytes == 21
    else:
        turn.failed_with(AdmissionRefused)
    stage.settle()
    stage.reads_device()
    assert stage.converses("z").run


def test_a_measured_context_that_breaks_the_promise_is_refused(given: Callable[..., Stage]) -> None:
    stage = given(cap=500)
    stage.has("a", ALPHA, context=350)
    stage.has("z", GAMMA, context=300, kind="best_effort")
    turn = stage.asks("a")
    stage.opened("a", takes=401)
    assert turn.failed_with(AdmissionRefused).refusal.requested_bytes == 51


def test_memory_that_strangers_gave_back_since_the_start_is_had_like_any_other(given: Callable[..., Stage]) -> None:
    stage = given(cap=149)
    assert stage.registers("a", ALPHA).refusal.code is RefusalCode.NEVER
    stage.reads_device(strangers=-1)
    stage.has("a", ALPHA)
    stage.reads_device(strangers=0)
    assert stage.registers("b", BETA).refusal.code is RefusalCode.DRIFT, "on this device it fits: that is known by now"
    assert stage.converses("a").run


@pytest.mark.parametrize("moment", ["loading", "opening", "closing"])
def test_strangers_that_come_in_the_middle_of_something_change_nothing_about_it(given: Callable[..., Stage], moment: str) -> None:
    stage = given(cap=400)
    stage.has("a", ALPHA, context=100, kind="best_effort")
    stage.has("b", BETA, context=100, kind="best_effort")
    stage.converses("a", tokens=10)
    turn = stage.asks("b")
    for step in ("closing", "loading", "opening"):
        if moment == step:
            stage.reads_device(strangers=100)
            stage.reads_device(strangers=0)
        stage.does(next(iter(stage.engine.todo)))
    stage.settle()
    assert turn.evidence[0] == "a"
    assert turn.endings

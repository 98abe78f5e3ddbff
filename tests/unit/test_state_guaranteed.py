"""Guaranteed agents as stories: all is there before they are admitted, nobody takes it, their turns wait for nobody."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.core.sessions import Phase
from conductor.errors import DecodeFailed, DuplicateAgent, ModelLoadFailed, RefusalCode, TurnQueueFull, TurnTimedOut, UnknownAgent
from conductor.types import AgentId, Kind, ModelState
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model

G = AgentId("g")


@pytest.fixture
def house(given: Callable[..., Stage]) -> Stage:
    """A guaranteed agent and a shared one on one model, a shared one on another; 350 bytes, every one of them promised."""
    stage = given(cap=350)
    stage.has("g", ALPHA, context=100, kind="guaranteed")
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    return stage


# --- admitted when it is there ----------------------------------------------------------------------------------------


def test_its_model_is_loaded_and_its_context_made_before_it_is_told(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, context=80, kind="guaranteed")
    assert stage.booked == 180, "all of it, at once"
    stage.loaded(ALPHA)
    assert call.waits
    assert stage.engine.todo == [stage.opening("g", window=80)]
    stage.opened("g")
    told = call.admission
    assert (told.weights_bytes, told.context_bytes, told.charged_bytes, told.model_loaded) == (100, 80, 180, True)
    assert [(r.holder, r.kind, r.bytes) for r in stage.state.ledger.snapshot()] == [
        ("alpha", Kind.WEIGHTS, 100),
        ("g", Kind.CONTEXT, 80),
    ]


def test_its_first_window_is_its_whole_window(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("g", ALPHA, context=80, ladder=(20, 40), kind="guaranteed")
    turn = stage.asks("g")
    assert turn.run is not None
    assert turn.run.room == 80
    stage.finished(turn, tokens=80)


def test_it_takes_no_turns_and_cannot_be_unregistered_before_it_is_admitted(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.asks("g").failed_with(UnknownAgent)
    stage.unregisters("g").failed_with(UnknownAgent)
    stage.registers("g", ALPHA).failed_with(DuplicateAgent)
    stage.opened("g")
    assert call.is_admitted


def test_several_on_one_model_are_all_live_at_once_beside_one_of_the_others(house: Stage) -> None:
    house.unregisters("b")
    house.settle()
    house.has("h", ALPHA, context=100, kind="guaranteed")
    turns = [house.asks(agent) for agent in "gha"]
    house.opened("a")
    assert all(turn.runs for turn in turns)
    house.settle()


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_context_that_cannot_be_made_refuses_it_with_nothing_left(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.open_failed("g", DecodeFailed(G, "no memory"))
    assert call.failed_with(DecodeFailed).problem == "no memory"
    assert stage.agents == []
    stage.unloaded(ALPHA.id)
    assert stage.booked == 0
    stage.has("g", ALPHA, kind="guaranteed")


def test_a_context_that_cannot_be_made_leaves_the_other_agents_of_the_model_alone(house: Stage) -> None:
    house.unregisters("g")
    house.settle()
    before = house.picture()
    call = house.registers("h", ALPHA, context=100, kind="guaranteed")
    house.open_failed("h", DecodeFailed(AgentId("h"), "no memory"))
    call.failed_with(DecodeFailed)
    assert house.picture() == before


def test_a_context_larger_than_the_room_refuses_it_with_nothing_left(given: Callable[..., Stage]) -> None:
    stage = given(cap=180)
    call = stage.registers("g", ALPHA, context=80, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.opened("g", takes=81)
    assert (call.refusal.code, call.refusal.requested_bytes) == (RefusalCode.CAP, 1)
    stage.settle()
    assert (stage.agents, stage.booked) == ([], 0)


def test_where_llama_cpp_does_not_tell_what_its_context_took_its_price_stands(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, context=80, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.opened("g", tells=False)
    assert call.admission.context_bytes == 80


@pytest.mark.parametrize("takes", [60, 81])
def test_what_its_context_really_takes_is_booked_and_told(given: Callable[..., Stage], takes: int) -> None:
    stage = given(cap=181)
    call = stage.registers("g", ALPHA, context=80, kind="guaranteed")
    stage.loaded(ALPHA)
    stage.opened("g", takes=takes)
    assert call.admission.context_bytes == takes
    assert stage.booked == 100 + takes


def test_a_load_that_fails_refuses_it_with_nothing_left(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, kind="guaranteed")
    stage.load_failed(ALPHA)
    call.failed_with(ModelLoadFailed)
    assert (stage.agents, stage.booked) == ([], 0)


@pytest.mark.parametrize("moment", ["loading", "opening", "admitted"])
@pytest.mark.parametrize("how", ["goes away", "dies"])
def test_a_registrant_that_goes_takes_everything_along(given: Callable[..., Stage], moment: str, how: str) -> None:
    stage = given(cap=1000)
    call = stage.registers("g", ALPHA, kind="guaranteed", owner="worker")
    if moment != "loading":
        stage.loaded(ALPHA)
    if moment == "admitted":
        stage.opened("g")
    if how == "dies":
        stage.dies("worker")
    else:
        stage.goes_away(call)
    stage.settle()
    assert (stage.agents, stage.booked) == ([], 0)


# --- nobody takes it --------------------------------------------------------------------------------------------------


def test_its_turn_starts_at_once_whoever_else_runs_or_waits(house: Stage) -> None:
    running, waiting = house.asks("a"), house.asks("b")
    house.opened("a")
    turn = house.asks("g")
    assert turn.runs
    assert turn.evidence == (None, False, 0)
    house.finished(turn)
    assert waiting.waits
    house.finished(running)
    house.settle()


def test_its_turn_waits_for_its_own_earlier_one_only_and_may_give_up_on_that(house: Stage) -> None:
    first, second = house.asks("g"), house.asks("g")
    assert first.runs
    house.runs_out_of_time(second)
    assert second.failed_with(TurnTimedOut).reason == "an earlier turn of the same agent"
    house.finished(first)
    house.converses("g")


def test_its_turn_starts_at_once_however_many_others_wait(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, turn_queue_limit=1)
    stage.has("g", ALPHA, kind="guaranteed")
    stage.has("a", ALPHA)
    stage.asks("a")
    turn = stage.asks("g")
    assert turn.runs
    stage.asks("g").failed_with(TurnQueueFull)
    stage.finished(turn)


def test_whatever_others_do_its_context_stays(house: Stage) -> None:
    house.converses("g", tokens=100)
    for agent in "abab":
        house.converses(agent)
    assert house.registers("c", GAMMA).refusal.code is RefusalCode.CAP
    assert house.reserves("trainer", 1).refusal.code is RefusalCode.CAP
    waiting = house.registers("d", GAMMA, may_wait=True, kind="guaranteed", priority=9)
    house.passes(10_000.0)
    assert waiting.waits
    assert house.state.agents[G].phase is Phase.READY
    assert house.asks("g").runs
    house.settle()


def test_it_costs_what_it_costs_however_idle_it_is(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, idle_shrink_s=1.0)
    stage.has("g", ALPHA, context=80, kind="guaranteed")
    stage.converses("g")
    stage.passes(10_000.0)
    assert (stage.booked, stage.engine.todo) == (180, [])


def test_when_it_leaves_its_window_comes_back_and_the_weights_stay_for_the_others(house: Stage) -> None:
    turn = house.asks("g")
    leaving = house.unregisters("g")
    assert turn.stopped
    house.finished(turn)
    assert leaving.waits
    house.settle()
    assert leaving.is_done
    assert house.booked == 250
    assert house.state.models[ALPHA.id].state is ModelState.RESIDENT


# --- what it takes from best-effort agents ----------------------------------------------------------------------------


@pytest.fixture
def lodging(given: Callable[..., Stage]) -> Stage:
    """Two best-effort agents whose contexts and weights fill the device, though one turn is all they were promised."""
    stage = given(cap=300, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50, kind="best_effort")
        stage.converses(agent, tokens=10)
    assert stage.booked == 300
    return stage


def test_its_arrival_swaps_and_parks_idle_best_effort_memory_and_ends_nobody(lodging: Stage) -> None:
    call = lodging.registers("g", GAMMA, context=50, kind="guaranteed")
    assert call.waits
    lodging.settle()
    assert call.admission.charged_bytes == 150
    assert lodging.agents == ["a", "b", "g"]
    assert lodging.booked == 300
    assert lodging.converses("a", tokens=12).evidence[1], "swapped, not lost"
    assert lodging.converses("b", tokens=12).evidence == ("a", True, 24 + 20)


def test_its_arrival_makes_a_best_effort_turn_stand_still_that_runs_beyond_the_promise_and_no_more(lodging: Stage) -> None:
    running = [lodging.asks("a"), lodging.asks("b")]
    call = lodging.registers("g", GAMMA, context=50, kind="guaranteed")
    assert [turn.pausing for turn in running] == [True, False], "one of them with its weights is enough"
    lodging.paused(running[0], tokens=15)
    while call.waits:
        (work,) = [work for work in lodging.engine.todo if not isinstance(work, actions.RunTurn)]
        lodging.does(work)
    assert call.is_admitted
    assert running[1].runs
    assert running[0].waits, "what is promised to both is used by the other"
    lodging.finished(running[1])
    lodging.settle()
    assert running[0].run is not None
    assert running[0].run.pauses == 1


def test_what_was_promised_to_best_effort_agents_is_theirs(lodging: Stage) -> None:
    assert lodging.registers("g", GAMMA, context=51, kind="guaranteed").refusal.code is RefusalCode.CAP
    assert lodging.registers("h", model("light", weights=99), context=51, kind="guaranteed").waits
    lodging.settle()

"""Best-effort agents as stories: they cost a turn, their weights come with it and leave when others need the room.

See also: `test_state_guaranteed.py`; shared agents are everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import AdmissionRefused, ModelLoadFailed, RefusalCode, TurnCancelled, TurnTimedOut
from conductor.types import ModelId, ModelState
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model


@pytest.fixture
def pair(given: Callable[..., Stage]) -> Stage:
    """Two best-effort agents on two models; room for one turn of either, with its weights."""
    stage = given(cap=150)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    stage.has("b", BETA, context=40, kind="best_effort")
    return stage


def state_of(stage: Stage, model_id: ModelId) -> ModelState:
    return stage.state.models[model_id].state


# --- a turn is all they cost ------------------------------------------------------------------------------------------


def test_it_is_admitted_at_once_and_nothing_is_loaded(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    told = stage.registers("a", ALPHA, context=50, kind="best_effort").admission
    assert (told.weights_bytes, told.context_bytes, told.charged_bytes, told.model_loaded) == (100, 50, 150, False)
    assert stage.engine.todo == []
    assert stage.booked == 150, "one turn of it, weights included"


def test_many_cost_one_turn_of_the_largest(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for i in range(9):
        stage.has(f"agent-{i}", model(f"model-{i}"), context=50 + i, kind="best_effort")
    assert stage.booked == 158


def test_beside_a_shared_agent_of_its_model_it_costs_its_context(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.has("a", ALPHA, context=50)
    assert stage.registers("b", ALPHA, context=50, kind="best_effort").admission.charged_bytes == 0
    assert stage.booked == 150


def test_its_first_turn_loads_its_model_and_then_opens_its_context(pair: Stage) -> None:
    turn = pair.asks("a")
    assert pair.engine.todo == [actions.LoadModel(ALPHA)]
    pair.loaded(ALPHA)
    assert [type(work) for work in pair.engine.todo] == [actions.OpenPool]
    pair.opened("a")
    assert turn.runs
    assert pair.booked == 150
    pair.finished(turn)


def test_its_weights_stay_while_nobody_needs_the_room(pair: Stage) -> None:
    pair.converses("a")
    turn = pair.asks("a")
    assert turn.runs
    pair.finished(turn)
    assert pair.engine.todo == []


def test_a_turn_of_another_model_closes_parks_loads_and_opens_in_that_order(pair: Stage) -> None:
    pair.converses("a", tokens=10)
    turn = pair.asks("b")
    done: list[str] = []
    while turn.waits:
        done.append(type(pair.engine.todo[0]).__name__)
        pair.does(pair.engine.todo[0])
    assert done == ["LeaveSeat", "ClosePool", "UnloadModel", "LoadModel", "OpenPool", "TakeSeat"]
    assert turn.evidence == ("a", False, 20)
    assert state_of(pair, ALPHA.id) is ModelState.PARKED
    pair.settle()
    assert pair.converses("a", tokens=12).evidence == ("b", True, 20 + 20), "parked is not forgotten: its KV came back"


def test_a_turn_that_gives_up_while_its_model_is_loaded_leaves_the_weights_for_the_next(pair: Stage) -> None:
    turn, next_turn = pair.asks("a"), pair.asks("b")
    pair.gives_up(turn)
    turn.failed_with(TurnCancelled)
    pair.loaded(ALPHA)
    assert pair.engine.todo == [actions.UnloadModel(ALPHA.id)], "b needs the room"
    pair.settle()
    assert next_turn.endings


def test_a_turn_that_waits_for_its_model_is_told_so_when_its_time_is_up(pair: Stage) -> None:
    turn = pair.asks("a")
    pair.runs_out_of_time(turn)
    assert turn.failed_with(TurnTimedOut).reason == "its model is being loaded"


def test_with_room_for_both_models_neither_is_parked(given: Callable[..., Stage]) -> None:
    stage = given(cap=290, live_contexts=2)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    stage.has("b", BETA, context=40, kind="best_effort")
    for agent in "abab":
        assert stage.converses(agent).evidence == (None, False, 0)
    assert stage.booked == 290, "150 of it are promised, the rest is there while nobody asks"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_load_that_fails_fails_the_turns_that_waited_for_it_and_keeps_the_agents(pair: Stage) -> None:
    pair.has("a2", ALPHA, context=30, kind="best_effort")
    turns = [pair.asks("a"), pair.asks("a2"), pair.asks("a")]
    pair.load_failed(ALPHA)
    for turn in turns:
        assert turn.failed_with(ModelLoadFailed).problem == "it is broken"
    assert pair.agents == ["a", "b", "a2"]
    pair.converses("a")  # the next turn tries again


def test_weights_that_turn_out_too_heavy_are_unloaded_and_the_turn_refused(pair: Stage) -> None:
    turn = pair.asks("a")
    pair.loaded(ALPHA, weights=101)
    refusal = turn.failed_with(AdmissionRefused).refusal
    assert (refusal.code, refusal.requested_bytes) == (RefusalCode.CAP, 1)
    assert pair.engine.todo == [actions.UnloadModel(ALPHA.id)]
    pair.settle()
    pair.converses("b")


@pytest.mark.parametrize(("measured", "promised"), [(120, 170), (60, 140)])
def test_measured_weights_replace_the_estimate_in_the_promise(given: Callable[..., Stage], measured: int, promised: int) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    stage.has("b", BETA, context=40, kind="best_effort")
    turn = stage.asks("a")
    stage.loaded(ALPHA, weights=measured)
    stage.settle()
    assert stage.booked == promised
    assert turn.endings


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_one_whose_model_was_never_loaded_is_gone_at_once(pair: Stage) -> None:
    assert pair.unregisters("a").is_done
    assert pair.agents == ["b"]
    assert pair.booked == 140


def test_one_that_leaves_while_its_model_is_loaded_is_answered_when_the_weights_are_gone(pair: Stage) -> None:
    turn = pair.asks("a")
    leaving = pair.unregisters("a")
    turn.failed_with(TurnCancelled)
    assert leaving.waits
    pair.loaded(ALPHA)
    assert leaving.waits
    pair.unloaded(ALPHA.id)
    assert leaving.is_done


def test_one_that_leaves_while_its_model_is_loaded_does_not_wait_for_a_newcomer_to_leave_too(pair: Stage) -> None:
    pair.asks("a")
    leaving = pair.unregisters("a")
    newcomer = pair.registers("c", ALPHA, context=50, kind="best_effort")
    pair.settle()
    assert newcomer.is_admitted
    assert leaving.is_done


# --- room for others --------------------------------------------------------------------------------------------------


def test_idle_weights_are_parked_for_a_shared_newcomer_and_nobody_ends(given: Callable[..., Stage]) -> None:
    stage = given(cap=240, live_contexts=2)
    stage.has("a", ALPHA, context=20, kind="best_effort")
    stage.has("b", BETA, context=20, kind="best_effort")
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=10)
    assert stage.booked == 240
    call = stage.registers("c", GAMMA, context=20)
    stage.settle()
    assert call.admission.charged_bytes == 100
    assert state_of(stage, ALPHA.id) is ModelState.PARKED
    assert state_of(stage, BETA.id) is ModelState.RESIDENT, "used last, and not in the way"
    assert stage.agents == ["a", "b", "c"]
    assert stage.converses("a").evidence[1], "its KV was kept"


def test_idle_weights_are_parked_for_another_task(given: Callable[..., Stage]) -> None:
    stage = given(cap=300, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50, kind="best_effort")
        stage.converses(agent)
    call = stage.reserves("trainer", 150)
    stage.settle()
    assert call.reservation
    assert stage.booked == 300


def test_the_weights_that_a_newcomer_needs_are_not_parked_for_it(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    for agent, plan in (("a", ALPHA), ("b", BETA), ("c", GAMMA)):
        stage.has(agent, plan, context=0, kind="best_effort")
        stage.converses(agent, tokens=0)
    assert stage.booked == 300
    call = stage.registers("d", ALPHA, context=60, kind="guaranteed")
    assert actions.UnloadModel(ALPHA.id) not in stage.engine.todo
    stage.settle()
    assert not call.admission.model_loaded


# --- weights that become firm, and loose again ------------------------------------------------------------------------


def test_a_shared_newcomer_takes_over_the_weights_that_a_best_effort_turn_brought(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    turn = stage.asks("a")
    stage.loaded(ALPHA)
    stage.opened("a")
    call = stage.registers("c", ALPHA, context=50)
    assert (call.admission.charged_bytes, call.admission.model_loaded) == (0, False)
    assert turn.runs, "and disturbs nobody"
    stage.finished(turn)
    assert stage.registers("d", ALPHA, context=51).refusal.code is RefusalCode.NEVER


def test_weights_that_a_shared_agent_took_over_are_not_parked_any_more(given: Callable[..., Stage]) -> None:
    stage = given(cap=240)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    stage.has("b", BETA, context=40, kind="best_effort")
    stage.converses("a")
    stage.has("c", ALPHA, context=50)
    stage.converses("b")  # beside them
    assert state_of(stage, ALPHA.id) is ModelState.RESIDENT


def test_a_shared_newcomer_whose_model_is_on_its_way_for_a_turn_waits_for_that_load(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.has("a", ALPHA, context=50, kind="best_effort")
    turn = stage.asks("a")
    call = stage.registers("c", ALPHA, context=50)
    assert stage.engine.todo == [actions.LoadModel(ALPHA)]
    stage.loaded(ALPHA)
    assert call.is_admitted
    stage.settle()
    assert turn.endings


def test_a_shared_newcomer_whose_model_is_being_parked_is_taken_up_when_it_is_gone(pair: Stage) -> None:
    pair.converses("a")
    turn = pair.asks("b")
    pair.closed("a")
    call = pair.registers("c", ALPHA, context=50)
    assert pair.engine.todo == [actions.UnloadModel(ALPHA.id)]
    assert call.waits
    pair.unloaded(ALPHA.id)
    assert call.answers
    pair.settle()
    assert turn.endings


def test_when_the_last_shared_agent_leaves_the_weights_stay_but_only_while_nobody_needs_the_room(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA, context=50)
    stage.has("b", ALPHA, context=50, kind="best_effort")
    assert stage.unregisters("a").is_done
    assert (stage.booked, stage.engine.todo) == (150, [])
    turn = stage.asks("b")
    stage.opened("b")
    assert turn.runs
    stage.finished(turn)
    call = stage.registers("c", BETA, context=50)
    stage.loaded(BETA)
    assert call.admission.charged_bytes == 100, "b's turn with its weights, or c's: 150 bytes for either"
    stage.converses("c")
    assert state_of(stage, ALPHA.id) is ModelState.RESIDENT, "b's context had to go, and that was enough"
    stage.has("d", BETA, context=51)
    stage.converses("d", tokens=51)
    assert state_of(stage, ALPHA.id) is ModelState.PARKED


def test_weights_whose_shared_agent_died_before_they_came_are_as_loose_as_their_best_effort_agent_needs_them(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=300, live_contexts=2)
    stage.registers("a", ALPHA, owner="worker")
    stage.dies("worker")
    stage.has("b", ALPHA, context=50, kind="best_effort")
    stage.has("c", BETA, context=50, kind="best_effort")
    stage.converses("c")
    call = stage.registers("d", GAMMA, context=50)
    stage.settle()
    assert call.is_admitted
    assert state_of(stage, ALPHA.id) is ModelState.PARKED


def test_a_newcomer_to_a_model_whose_loader_died_needs_no_more_room_than_there_is(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.registers("a", ALPHA, context=50, owner="worker")
    stage.dies("worker")
    call = stage.registers("b", ALPHA, context=50)
    stage.loaded(ALPHA)
    assert call.is_admitted

"""Admission as stories: what is booked when, what a refusal leaves, and what measuring changes.

Shared agents, mostly. See also: `test_state_room.py`, `test_state_classes.py`, `test_state_guaranteed.py`,
`test_state_waitlist.py`, `test_state_turns.py`, `test_state_pools.py`, `test_state_fair_turns.py`, `test_state_cancel.py`,
`test_state_growth.py`, `test_state_shrinking.py`, `test_state_leaving.py`, `test_state_drift.py`,
`test_state_host_memory.py`, and `test_state_machine.py` for all at once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import (
    AdmissionRefused,
    DuplicateAgent,
    ModelLoadFailed,
    RefusalCode,
    UnknownAgent,
    UnknownReservation,
)
from conductor.types import Kind
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model

# --- booking ----------------------------------------------------------------------------------------------------------


def test_an_admission_is_booked_whole_before_anything_is_loaded(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("a", ALPHA, context=50)
    assert call.waits
    assert stage.booked == 150
    assert stage.engine.todo == [actions.LoadModel(ALPHA)]


def test_whoever_is_admitted_is_told_what_it_cost(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("a", ALPHA, context=50)
    stage.loaded(ALPHA)
    told = call.admission
    assert (told.weights_bytes, told.context_bytes, told.charged_bytes, told.model_loaded) == (100, 50, 150, True)


def test_weights_are_booked_once_however_many_agents_use_them(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50)
    second, third = stage.registers("b", ALPHA, context=50), stage.registers("c", ALPHA, context=70)
    assert (second.admission.charged_bytes, second.admission.model_loaded) == (0, False)
    assert third.admission.charged_bytes == 20, "one context of a model is live at a time: only the larger window adds"
    assert stage.booked == 170


def test_two_who_come_while_the_model_loads_are_admitted_together_when_it_is_there(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    first, second = stage.registers("a", ALPHA), stage.registers("b", ALPHA)
    assert first.waits
    assert second.waits
    assert stage.engine.todo == [actions.LoadModel(ALPHA)]
    stage.loaded(ALPHA)
    assert (first.admission.model_loaded, second.admission.model_loaded) == (True, False)


def test_agents_of_different_models_share_the_promise_of_one_live_context(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=1)
    for agent, plan, context in (("a", ALPHA, 50), ("b", BETA, 80), ("c", GAMMA, 30)):
        stage.has(agent, plan, context=context)
    assert stage.booked == 3 * 100 + 80


def test_one_turn_is_promised_however_many_contexts_may_be_live(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=3)
    for agent, plan, context in (("a", ALPHA, 50), ("b", BETA, 80), ("c", GAMMA, 30)):
        stage.has(agent, plan, context=context)
    assert stage.booked == 3 * 100 + 80


def test_every_booked_byte_has_a_holder_and_a_kind(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, overhead=7)
    stage.has("a", ALPHA, context=50)
    stage.reserves("trainer", 40)
    turn = stage.asks("a")
    stage.opened("a")
    assert [(r.holder, r.kind, r.bytes) for r in stage.state.ledger.snapshot()] == [
        ("process", Kind.OVERHEAD, 7),
        ("alpha", Kind.WEIGHTS, 100),
        ("trainer", Kind.EXTERNAL, 40),
        ("alpha", Kind.CONTEXT, 50),
    ]
    stage.finished(turn)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_refusal_carries_the_numbers_and_leaves_no_trace(given: Callable[..., Stage]) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA, context=50)
    before = stage.picture()
    refusal = stage.registers("b", BETA, context=60).refusal
    assert refusal.code is RefusalCode.CAP
    assert (refusal.requested_bytes, refusal.cap_bytes, refusal.booked_bytes, refusal.free_bytes) == (110, 250, 150, 100)
    assert [(r.holder, r.bytes) for r in refusal.holders] == [("conductor", 50), ("alpha", 100)]
    assert stage.picture() == before
    assert stage.engine.todo == []


def test_the_last_byte_can_be_had(given: Callable[..., Stage]) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    assert stage.booked == 250


def test_what_the_device_could_not_hold_even_when_empty_is_refused_for_good(given: Callable[..., Stage]) -> None:
    stage = given(cap=150, overhead=1)
    before = stage.picture()
    refused = stage.registers("a", ALPHA, context=50, may_wait=True).failed_with(AdmissionRefused)
    assert refused.code is RefusalCode.NEVER
    assert not refused.retryable
    assert stage.picture() == before


def test_an_id_can_be_registered_once_whatever_its_first_registration_is_waiting_for(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    loading = stage.registers("a", ALPHA)
    stage.registers("a", ALPHA).failed_with(DuplicateAgent)
    stage.loaded(ALPHA)
    assert loading.is_admitted
    stage.registers("a", BETA).failed_with(DuplicateAgent)
    waiting = stage.registers("b", BETA, may_wait=True)
    before = stage.picture()
    stage.registers("b", ALPHA).failed_with(DuplicateAgent)
    assert stage.picture() == before
    assert waiting.waits
    leaving = stage.unregisters("a")
    deferred = stage.registers("c", ALPHA)
    stage.registers("c", BETA).failed_with(DuplicateAgent)
    stage.settle()
    assert leaving.is_done
    assert waiting.is_admitted
    assert deferred.refusal.code is RefusalCode.CAP


def test_a_refused_id_is_free_again(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    assert stage.registers("a", ALPHA, context=51).is_refused
    stage.has("a", ALPHA, context=50)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_load_that_fails_unwinds_everybody_who_waited_for_it(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("x", BETA)
    before = stage.picture()
    calls = [stage.registers("a", ALPHA), stage.registers("b", ALPHA, context=90)]
    stage.load_failed(ALPHA)
    for call in calls:
        assert call.failed_with(ModelLoadFailed).problem == "it is broken"
    assert stage.picture() == before


def test_after_a_failed_load_the_next_one_tries_again(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.registers("a", ALPHA)
    stage.load_failed(ALPHA)
    stage.has("a", ALPHA)


def test_the_last_to_leave_unloads_the_model_and_is_answered_when_the_bytes_are_back(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    stage.has("b", ALPHA)
    assert stage.unregisters("a").is_done, "b still uses the weights"
    leaving = stage.unregisters("b")
    assert leaving.waits
    assert stage.booked == 100, "booked until the engine says that they are gone"
    stage.unloaded(ALPHA.id)
    assert leaving.is_done
    assert stage.booked == 0


def test_the_same_file_under_another_name_is_the_same_model(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50)
    other_name = model("alpha")
    assert other_name is not ALPHA
    assert stage.registers("b", other_name, context=50).admission.charged_bytes == 0


@pytest.mark.parametrize(("measured", "booked"), [(120, 170), (80, 130), (0, 50)])
def test_measured_weights_replace_the_estimate_up_and_down(given: Callable[..., Stage], measured: int, booked: int) -> None:
    stage = given(cap=1000)
    call = stage.registers("a", ALPHA, context=50)
    stage.loaded(ALPHA, weights=measured)
    assert stage.booked == booked
    assert call.admission.weights_bytes == measured


def test_weights_that_turn_out_too_heavy_are_unloaded_and_everybody_who_waited_refused(given: Callable[..., Stage]) -> None:
    stage = given(cap=170)
    first, second = stage.registers("a", ALPHA, context=50), stage.registers("b", ALPHA, context=60)
    stage.loaded(ALPHA, weights=111)
    assert first.refusal.code is RefusalCode.CAP
    assert second.refusal.requested_bytes == 11
    assert stage.agents == []
    stage.unloaded(ALPHA.id)
    assert stage.booked == 0


def test_weights_lighter_than_estimated_let_a_window_in_that_the_estimate_alone_would_not(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.registers("a", ALPHA, context=50)
    stage.loaded(ALPHA, weights=80)
    assert stage.registers("b", ALPHA, context=70).admission.charged_bytes == 20
    assert stage.booked == 150


def test_a_registration_for_a_model_that_is_being_unloaded_is_taken_up_when_it_is_gone(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    stage.has("a", ALPHA)
    leaving = stage.unregisters("a")
    deferred = stage.registers("b", ALPHA, may_wait=False)
    assert deferred.waits
    stage.unloaded(ALPHA.id)
    assert leaving.is_done
    assert stage.engine.todo == [actions.LoadModel(ALPHA)]
    stage.loaded(ALPHA)
    assert deferred.admission.model_loaded


def test_deferred_registrations_keep_their_order_while_another_model_unloads_first(given: Callable[..., Stage]) -> None:
    stage = given(cap=500)
    stage.has("a", ALPHA)
    stage.has("b", BETA)
    stage.unregisters("a")
    stage.unregisters("b")
    first, second = stage.registers("c", BETA), stage.registers("d", ALPHA)
    stage.unloaded(ALPHA.id)
    assert stage.engine.todo == [actions.UnloadModel(BETA.id), actions.LoadModel(ALPHA)]
    stage.settle()
    assert first.is_admitted
    assert second.is_admitted


def test_a_deferred_registration_may_be_abandoned(given: Callable[..., Stage]) -> None:
    stage = given(cap=500)
    stage.has("a", ALPHA)
    stage.unregisters("a")
    stage.goes_away(stage.registers("b", ALPHA))
    stage.settle()
    assert stage.agents == []
    assert stage.booked == 0


# --- other tasks' bytes -----------------------------------------------------------------------------------------------


def test_an_outsider_books_in_the_same_ledger(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    id = stage.reserves("trainer", 1).reservation
    assert stage.registers("a", ALPHA, context=50).refusal.code is RefusalCode.CAP
    assert stage.releases(id).is_done
    stage.has("a", ALPHA, context=50)


@pytest.mark.parametrize(("bytes", "code"), [(91, RefusalCode.CAP), (141, RefusalCode.NEVER)])
def test_an_outsider_is_refused_with_the_numbers_and_without_a_trace(
    given: Callable[..., Stage], bytes: int, code: RefusalCode
) -> None:
    stage = given(cap=150, overhead=10)
    stage.reserves("trainer", 50)
    before = stage.picture()
    refusal = stage.reserves("renderer", bytes).refusal
    assert (refusal.code, refusal.requested_bytes, refusal.free_bytes) == (code, bytes, 90)
    assert stage.picture() == before


def test_a_release_says_how_much_came_back_and_a_second_one_is_an_error(given: Callable[..., Stage]) -> None:
    stage = given(cap=100)
    id = stage.reserves("trainer", 60).reservation
    answer = stage.releases(id).answer
    assert isinstance(answer, actions.AnswerRelease)
    assert answer.released_bytes == 60
    assert stage.releases(id).failed_with(UnknownReservation).reservation_id == id


def test_nobody_can_release_what_an_agent_or_the_conductor_holds(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, overhead=10)
    stage.has("a", ALPHA)
    stage.converses("a")
    before = stage.picture()
    ids = [r.id for r in stage.state.ledger.snapshot()]
    assert len(ids) == 3
    for id in (*ids, "r999", ""):
        stage.releases(id).failed_with(UnknownReservation)
    assert stage.picture() == before


def test_bytes_whose_id_nobody_received_are_given_back(given: Callable[..., Stage]) -> None:
    stage = given(cap=100)
    call, other = stage.reserves("trainer", 60), stage.reserves("renderer", 10)
    stage.forgets_to_reserve(call)
    assert stage.booked == 10
    stage.releases(call.reservation).failed_with(UnknownReservation)
    stage.releases(other.reservation)
    stage.forgets_to_reserve(other)
    assert stage.booked == 0, "and bytes that were given back are not given back twice"


def test_a_dead_outsiders_bytes_come_back_and_the_others_stay(given: Callable[..., Stage]) -> None:
    stage = given(cap=100)
    stage.reserves("trainer", 30, owner="worker-1")
    stage.reserves("trainer", 20, owner="worker-1")
    stage.reserves("renderer", 10, owner="worker-2")
    stage.reserves("script", 5)
    stage.dies("worker-1")
    assert stage.booked == 15
    stage.dies("worker-1")
    assert stage.booked == 15


def test_a_stranger_can_neither_leave_nor_take_a_turn(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    before = stage.picture()
    assert stage.unregisters("nobody").failed_with(UnknownAgent).agent_id == "nobody"
    assert stage.asks("nobody").failed_with(UnknownAgent).agent_id == "nobody"
    assert stage.picture() == before

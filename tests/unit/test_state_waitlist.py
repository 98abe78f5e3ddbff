"""Waiting for room as stories: in order, bounded, nobody overtakes, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.errors import RefusalCode
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model

DELTA = model("delta")


@pytest.fixture
def full(given: Callable[..., Stage]) -> Stage:
    """Room for one model; agent `a` has it."""
    stage = given(cap=150)
    stage.has("a", ALPHA, owner="owner of a")
    return stage


def test_whoever_may_wait_is_admitted_when_there_is_room(full: Stage) -> None:
    call = full.registers("b", BETA, may_wait=True)
    assert call.waits
    assert full.booked == 150
    full.unregisters("a")
    assert call.waits, "the weights are still there"
    full.settle()
    assert call.admission.charged_bytes == 150


def test_room_may_come_from_an_outsider_too(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    id = stage.reserves("trainer", 10).reservation
    call = stage.registers("a", ALPHA, may_wait=True)
    assert call.waits
    stage.releases(id)
    stage.settle()
    assert call.is_admitted


def test_first_come_first_served_within_a_priority(full: Stage) -> None:
    first, second = full.registers("b", BETA, may_wait=True), full.registers("c", GAMMA, may_wait=True)
    full.unregisters("a")
    full.settle()
    assert first.is_admitted
    assert second.waits
    full.unregisters("b")
    full.settle()
    assert second.is_admitted


def test_a_higher_priority_goes_first_whenever_it_came(full: Stage) -> None:
    low = full.registers("b", BETA, may_wait=True, priority=-1)
    middle = full.registers("c", GAMMA, may_wait=True)
    high = full.registers("d", DELTA, may_wait=True, priority=5)
    for last, call in (("a", high), ("d", middle), ("c", low)):
        assert call.waits
        full.unregisters(last)
        full.settle()
        assert call.is_admitted


def test_nobody_overtakes_a_waiter_by_being_small(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA)
    large = stage.registers("b", model("large", weights=200), may_wait=True)
    before = stage.picture()
    assert stage.registers("c", ALPHA).refusal.code is RefusalCode.CAP, "it would fit, but somebody waits before it"
    assert stage.picture() == before
    small = stage.registers("d", ALPHA, may_wait=True)
    assert large.waits
    assert small.waits
    stage.unregisters("a")
    stage.settle()
    assert large.is_admitted
    assert small.waits


def test_a_newcomer_of_higher_priority_does_not_wait_behind_a_lower_one(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA)
    low = stage.registers("b", model("large", weights=200), may_wait=True)
    assert stage.registers("c", ALPHA, priority=1).is_admitted
    assert low.waits


def test_whoever_waited_long_enough_is_not_overtaken_by_a_higher_priority_any_more(given: Callable[..., Stage]) -> None:
    stage = given(cap=300, ageing_s=60.0)
    stage.has("a", ALPHA)
    patient = stage.registers("b", model("large", weights=200), may_wait=True)
    stage.passes(59.0)
    assert stage.registers("c", ALPHA, priority=1).is_admitted
    stage.passes(1.0)
    refusal = stage.registers("d", ALPHA, priority=1).refusal
    assert (refusal.code, refusal.waiting_ahead) == (RefusalCode.CAP, 1)
    late = stage.registers("e", model("other", weights=200), priority=1, may_wait=True)
    for agent in "ac":
        stage.unregisters(agent)
    stage.settle()
    assert patient.is_admitted
    assert late.waits


def test_a_turn_goes_on_for_those_who_are_in_while_somebody_waits_to_come_in(full: Stage) -> None:
    full.registers("b", BETA, may_wait=True)
    for _ in range(3):
        full.converses("a")


def test_when_the_first_gives_up_the_next_is_served_at_once(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA)
    large = stage.registers("b", model("large", weights=200), may_wait=True)
    small = stage.registers("c", ALPHA, may_wait=True)
    stage.goes_away(large)
    assert small.is_admitted


def test_several_are_admitted_at_once_if_they_fit(given: Callable[..., Stage]) -> None:
    stage = given(cap=350)
    stage.has("a", model("large", weights=300))
    calls = [stage.registers(agent, plan, may_wait=True) for agent, plan in (("b", ALPHA), ("c", BETA), ("d", GAMMA))]
    stage.unregisters("a")
    stage.settle()
    assert all(call.is_admitted for call in calls)
    assert stage.booked == 350


def test_whose_time_is_up_is_refused_with_the_numbers_of_that_moment(full: Stage) -> None:
    call = full.registers("b", BETA, may_wait=True)
    before = full.picture()
    full.loses_patience(call)
    assert call.refusal.code is RefusalCode.TIMEOUT
    assert (call.refusal.requested_bytes, call.refusal.free_bytes) == (100, 0)
    assert before != full.picture()
    full.unregisters("a")
    full.settle()
    assert full.agents == []


def test_a_deadline_that_comes_after_the_answer_changes_nothing(full: Stage) -> None:
    call = full.registers("b", BETA, may_wait=True)
    full.unregisters("a")
    full.settle()
    before = full.picture()
    full.loses_patience(call)
    assert full.picture() == before
    assert call.is_admitted


def test_a_deadline_does_not_interrupt_a_load(given: Callable[..., Stage]) -> None:
    stage = given(cap=150)
    call = stage.registers("a", ALPHA, may_wait=True)
    stage.loses_patience(call)
    assert call.waits
    stage.loaded(ALPHA)
    assert call.is_admitted


def test_a_deadline_that_passes_while_a_model_unloads_is_not_forgotten(given: Callable[..., Stage]) -> None:
    stage = given(cap=250)
    stage.has("a", ALPHA)
    stage.has("b", BETA)
    stage.unregisters("a")
    outsider = stage.registers("x", GAMMA, may_wait=True)  # in line before
    deferred = stage.registers("c", ALPHA, may_wait=True)
    stage.loses_patience(deferred)
    assert deferred.waits, "whether there is room is not known before the weights are gone"
    stage.unloaded(ALPHA.id)
    assert deferred.is_refused, "there is none, and its time is up: nothing would wake it any more"
    stage.settle()
    assert outsider.is_admitted


def test_whoever_went_away_is_not_admitted_and_nobody_is_told(full: Stage) -> None:
    call = full.registers("b", BETA, may_wait=True)
    full.goes_away(call)
    full.unregisters("a")
    full.settle()
    assert full.agents == []
    assert call.answers == []


def test_whoever_goes_away_while_the_model_loads_takes_its_bytes_along(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.goes_away(stage.registers("a", ALPHA, context=50))
    assert stage.booked == 100, "a load cannot be stopped; its context's promise is gone already"
    stage.loaded(ALPHA)
    stage.unloaded(ALPHA.id)
    assert stage.booked == 0


def test_a_load_somebody_else_waits_for_goes_on(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    gone, stays = stage.registers("a", ALPHA, context=90), stage.registers("b", ALPHA, context=50)
    stage.goes_away(gone)
    stage.loaded(ALPHA)
    assert stays.is_admitted
    assert stage.booked == 150


def test_a_grant_that_its_caller_did_not_live_to_see_is_given_back(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    call = stage.registers("a", ALPHA)
    stage.loaded(ALPHA)
    stage.goes_away(call)
    stage.settle()
    assert stage.agents == []
    assert stage.booked == 0


def test_the_waitlist_is_bounded(given: Callable[..., Stage]) -> None:
    stage = given(cap=150, waitlist_limit=1)
    stage.has("a", ALPHA)
    first = stage.registers("b", BETA, may_wait=True)
    before = stage.picture()
    assert stage.registers("c", BETA, may_wait=True, priority=9).refusal.code is RefusalCode.QUEUE_FULL
    assert stage.picture() == before
    stage.loses_patience(first)
    assert stage.registers("c", BETA, may_wait=True).waits


def test_without_a_waitlist_nobody_waits(given: Callable[..., Stage]) -> None:
    stage = given(cap=150, waitlist_limit=0)
    stage.has("a", ALPHA)
    assert stage.registers("b", BETA, may_wait=True).refusal.code is RefusalCode.QUEUE_FULL


@pytest.mark.parametrize("may_wait", [False, True])
def test_without_a_waitlist_whoever_needs_only_what_is_idle_gets_it(given: Callable[..., Stage], may_wait: bool) -> None:
    stage = given(cap=350, live_contexts=2, waitlist_limit=0)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    call = stage.registers("c", GAMMA, context=50, may_wait=may_wait)
    stage.settle()
    assert call.is_admitted


def test_whose_room_is_being_cleared_takes_no_place_of_the_waitlist(given: Callable[..., Stage]) -> None:
    stage = given(cap=350, live_contexts=2, waitlist_limit=1)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    cleared_for = stage.registers("c", GAMMA, context=50)
    waiting = stage.registers("d", DELTA, context=50, may_wait=True)
    assert waiting.waits
    assert stage.registers("e", DELTA, context=50, may_wait=True).refusal.code is RefusalCode.QUEUE_FULL
    stage.settle()
    assert cleared_for.is_admitted
    assert waiting.waits


def test_whose_cleared_room_a_higher_priority_took_is_refused_if_it_may_not_wait(given: Callable[..., Stage]) -> None:
    stage = given(cap=350, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    first = stage.registers("c", GAMMA, context=50)
    urgent = stage.registers("d", DELTA, context=50, priority=1)
    stage.settle()
    assert urgent.is_admitted
    assert first.refusal.code is RefusalCode.CAP


def test_whom_somebody_that_has_to_wait_came_before_is_refused_if_it_may_not_wait(given: Callable[..., Stage]) -> None:
    stage = given(cap=350, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    hasty = stage.registers("c", GAMMA, context=50)
    assert hasty.waits, "its room is being cleared"
    patient = stage.registers("d", model("heavy", weights=150), context=50, priority=1, may_wait=True)
    assert hasty.refusal.waiting_ahead == 1
    assert patient.waits


def test_whose_room_could_be_cleared_is_refused_behind_others_if_it_may_not_wait(given: Callable[..., Stage]) -> None:
    stage = given(cap=350, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    large = stage.registers("c", model("large", weights=200), may_wait=True)
    refusal = stage.registers("d", GAMMA, context=50).refusal
    assert (refusal.code, refusal.waiting_ahead) == (RefusalCode.CAP, 1)
    assert large.waits


@pytest.mark.parametrize("how", ["goes away", "loses patience", "dies"])
def test_whoever_goes_while_room_is_cleared_for_it_leaves_nothing(given: Callable[..., Stage], how: str) -> None:
    stage = given(cap=350, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    call = stage.registers("c", GAMMA, context=50, may_wait=True, owner="worker")
    if how == "goes away":
        stage.goes_away(call)
    elif how == "dies":
        stage.dies("worker")
    else:
        stage.loses_patience(call)
        assert call.refusal.code is RefusalCode.TIMEOUT
    stage.settle()
    assert stage.agents == ["a", "b"]
    assert stage.converses("a").evidence[1]


def test_a_waiter_who_can_never_fit_any_more_is_told_so_and_holds_nobody_up(given: Callable[..., Stage]) -> None:
    """Priced at 50 when it came; a context like its own was then measured at 910, beside weights lighter than estimated."""
    stage = given(cap=1000)
    stage.registers("a", ALPHA, context=50)
    stage.loaded(ALPHA, weights=80)
    first = stage.registers("b", model("large", weights=900), context=50, may_wait=True)
    like_a, last = stage.registers("c", ALPHA, context=50, may_wait=True), stage.registers("d", BETA, may_wait=True)
    turn = stage.asks("a")
    stage.opened("a", takes=910)
    stage.finished(turn)
    stage.unregisters("a")
    stage.settle()
    assert first.is_admitted
    stage.unregisters("b")
    stage.settle()
    assert like_a.refusal.code is RefusalCode.NEVER
    assert last.is_admitted


@pytest.mark.parametrize("moment", ["waiting", "deferred", "loading"])
def test_a_registration_whose_owner_dies_ends_without_an_agent(given: Callable[..., Stage], moment: str) -> None:
    stage = given(cap=250)
    stage.has("x", BETA)
    if moment != "loading":
        stage.has("a", ALPHA)
    if moment == "deferred":
        stage.unregisters("a")
    call = stage.registers("b", model("heavy", weights=150) if moment == "waiting" else ALPHA, may_wait=True, owner="worker")
    assert call.waits
    stage.dies("worker")
    assert call.answers, "an answer that nobody hears, so that whoever carries the call stops waiting too"
    stage.settle()
    assert "b" not in stage.agents

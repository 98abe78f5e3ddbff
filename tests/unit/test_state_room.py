"""The room for turns as stories: one turn is promised, more may be live while memory is free, and what idles gives way."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import RefusalCode
from conductor.types import AgentId, KvPlace
from tests.support.stories import ALPHA, BETA, GAMMA, Stage, model


@pytest.fixture
def roomy(given: Callable[..., Stage]) -> Stage:
    """Two models, one shared agent each; 270 bytes promised of 350, and two contexts may be live."""
    stage = given(cap=350, live_contexts=2)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=70)
    return stage


def test_while_memory_is_free_more_contexts_are_live_than_promised_and_booked_before_they_are_opened(roomy: Stage) -> None:
    roomy.converses("a")
    assert roomy.booked == 270, "its context is part of what is promised"
    turn = roomy.asks("b")
    assert roomy.engine.todo[0] == roomy.opening("b", window=70)
    assert roomy.booked == 320
    roomy.settle()
    assert not turn.waits
    booked = [(r.holder, r.bytes) for r in roomy.state.ledger.snapshot()]
    assert booked == [("alpha", 100), ("beta", 100), ("alpha", 50), ("beta", 70)]


def test_a_context_that_does_not_fit_beside_the_others_waits_for_their_room(given: Callable[..., Stage]) -> None:
    stage = given(cap=319, live_contexts=2)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=70)
    stage.converses("a")
    assert stage.converses("b").evidence == ("a", False, 20), "a place was free, 50 bytes for both were not"


def test_a_newcomer_gets_the_room_of_what_is_idle_beyond_the_promise_as_soon_as_it_is_cleared(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    assert roomy.registers("c", ALPHA, context=81).admission.charged_bytes == 11, "120 bytes are in use: 81 are no more"
    assert roomy.booked == 320
    call = roomy.registers("d", model("delta", weights=60), context=10)
    assert call.waits
    assert roomy.engine.todo == [actions.LeaveSeat(AgentId("a"), KvPlace.HOST)]
    roomy.closed("a")
    assert roomy.booked == 341, "81 bytes are promised, 70 of them in use"
    roomy.settle()
    assert call.admission.charged_bytes == 60


def test_what_turns_use_beyond_the_promise_is_taken_back_for_a_newcomer_and_they_go_on_later(roomy: Stage) -> None:
    running, heavy = [roomy.asks("a"), roomy.asks("b")], model("delta", weights=60)
    roomy.opened("a")
    roomy.opened("b")
    roomy.progresses(a=100, b=10)
    call = roomy.registers("d", heavy, context=10)
    assert [turn.pausing for turn in running] == [True, False], "30 bytes are missing: whoever had most stands still for them"
    roomy.paused(running[0], tokens=12)
    roomy.closed("a")
    roomy.loaded(heavy)
    assert call.admission.charged_bytes == 60
    assert running[0].waits
    roomy.finished(running[1])
    roomy.brings_on(running[0])
    assert running[0].evidence == ("b", False, 20 + 24), "b's KV went for it, and its own came back"
    roomy.settle()


def test_what_idles_leaves_first_for_a_newcomer_and_no_more_turns_stand_still_than_need_be(given: Callable[..., Stage]) -> None:
    stage = given(cap=450, live_contexts=3)
    for agent, plan, context in (("a", ALPHA, 50), ("b", BETA, 50), ("c", GAMMA, 50)):
        stage.has(agent, plan, context=context)
        stage.converses(agent)
    running = [stage.asks("a"), stage.asks("b")]
    stage.progresses(a=10, b=11)
    call = stage.registers("d", model("delta", weights=60), context=10)
    assert AgentId("c") in {work.agent_id for work in stage.engine.todo if isinstance(work, actions.LeaveSeat)}
    assert [turn.pausing for turn in running] == [False, True]
    stage.settle()
    assert call.is_admitted


def test_nobody_is_disturbed_for_a_newcomer_that_the_promise_leaves_no_room_for(given: Callable[..., Stage]) -> None:
    stage = given(cap=450, live_contexts=3)
    for agent, plan, context in (("a", ALPHA, 50), ("b", BETA, 50), ("c", GAMMA, 50)):
        stage.has(agent, plan, context=context)
        stage.converses(agent)
    running = [stage.asks("a"), stage.asks("b")]
    before = stage.picture()
    assert stage.registers("d", model("delta", weights=101), context=10).refusal.code is RefusalCode.CAP
    assert stage.picture() == before
    for turn in running:
        stage.finished(turn)


def test_weights_that_the_newcomer_needs_itself_are_not_cleared_for_it_though_a_turn_has_to_stand_still(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=460, live_contexts=2)
    stage.has("z", GAMMA, context=0, kind="best_effort")
    stage.converses("z", tokens=0)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    running = [stage.asks("a"), stage.asks("b")]
    stage.opened("a")
    stage.closed("z")
    stage.opened("b")
    assert all(turn.runs for turn in running)
    call = stage.registers("g", GAMMA, context=100, kind="guaranteed")
    assert sum(turn.pausing for turn in running) == 1
    assert actions.UnloadModel(GAMMA.id) not in stage.engine.todo
    stage.settle()
    assert not call.admission.model_loaded


def test_a_newcomer_is_not_told_to_come_back_if_all_it_needs_is_leaving_already(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    first = roomy.registers("c", model("gamma", weights=60), context=10)
    roomy.goes_away(first)
    assert [type(work) for work in roomy.engine.todo] == [actions.LeaveSeat]
    call = roomy.registers("d", model("delta", weights=60), context=10)
    roomy.settle()
    assert call.is_admitted


@pytest.mark.parametrize("who", ["a newcomer", "another task"])
def test_turns_leave_the_room_alone_that_is_freed_bit_by_bit_for_somebody(given: Callable[..., Stage], who: str) -> None:
    stage = given(cap=520, live_contexts=4)
    for agent, plan, context in (("a", ALPHA, 30), ("b", BETA, 30), ("c", GAMMA, 30), ("d", model("delta"), 50)):
        stage.has(agent, plan, context=context)
    for agent in "abc":
        stage.converses(agent)
    if who == "a newcomer":
        call = stage.registers("g", ALPHA, context=70, kind="guaranteed")
    else:
        call = stage.reserves("trainer", 70)
    turn = stage.asks("d")
    stage.closed("a")
    assert not [work for work in stage.engine.todo if isinstance(work, actions.OpenPool)], (
        "its 50 bytes are there, but not for it"
    )
    stage.settle()
    assert call.is_admitted or call.reservation
    assert turn.endings


def test_turns_leave_the_room_alone_that_is_being_cleared_for_a_newcomer(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    call = roomy.registers("c", model("gamma", weights=60), context=10)
    turn = roomy.asks("a")
    roomy.closed("a")
    assert turn.waits, "both contexts would fit but for the newcomer"
    roomy.settle()
    assert call.is_admitted
    assert turn.endings


# --- other tasks --------------------------------------------------------------------------------------------------------


def test_an_outsider_gets_the_room_of_what_is_idle_beyond_the_promise_as_soon_as_it_is_cleared(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    before = roomy.picture()
    assert roomy.reserves("trainer", 81).refusal.code is RefusalCode.CAP, "the promise is cleared for nobody"
    assert roomy.picture() == before
    call = roomy.reserves("trainer", 80)
    assert call.waits
    assert roomy.engine.todo == [actions.LeaveSeat(AgentId("a"), KvPlace.HOST)]
    roomy.settle()
    assert call.reservation
    assert roomy.booked == 350


def test_an_outsider_is_refused_at_once_if_a_turn_would_have_to_end_first(roomy: Stage) -> None:
    roomy.converses("a")
    running = roomy.asks("b")
    roomy.opened("b")
    before = roomy.picture()
    assert roomy.reserves("trainer", 81).refusal.code is RefusalCode.CAP
    assert roomy.picture() == before
    roomy.finished(running)


def test_two_outsiders_at_once_are_each_cleared_for(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    with roomy.at_once():
        calls = [roomy.reserves("trainer", 45), roomy.reserves("renderer", 35)]
    roomy.settle()
    assert all(call.reservation for call in calls)


def test_an_outsider_that_goes_away_while_room_is_made_for_it_leaves_nothing(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    call = roomy.reserves("trainer", 80)
    roomy.forgets_to_reserve(call)
    roomy.settle()
    assert call.answers == []
    assert not roomy.state.books.external


def test_an_outsider_that_dies_while_room_is_made_for_it_leaves_nothing(roomy: Stage) -> None:
    roomy.converses("a")
    roomy.converses("b")
    call = roomy.reserves("trainer", 80, owner="worker")
    roomy.dies("worker")
    assert call.refusal.requested_bytes == 80
    roomy.settle()
    assert roomy.booked <= 320


def test_where_llama_cpp_does_not_tell_what_a_context_took_its_price_stands(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=50)
    turn = stage.asks("a")
    stage.opened("a", tells=False)
    assert turn.runs
    assert stage.booked == 150
    stage.finished(turn)


def test_an_oversized_context_is_booked_where_there_is_room(given: Callable[..., Stage]) -> None:
    stage = given(cap=151)
    stage.has("a", ALPHA, context=50)
    turn = stage.asks("a")
    stage.opened("a", takes=51)
    assert turn.runs
    assert stage.booked == 151
    stage.finished(turn)

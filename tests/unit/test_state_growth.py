"""Windows that grow, as stories: booked before they are made, waited for if need be, refused with the session as it was.

See also: `test_state_shrinking.py`, for what is given back.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import AdmissionRefused, DecodeFailed, RefusalCode, TurnCancelled, TurnTimedOut, WindowRefused
from conductor.types import AgentId, FinishReason, KvPlace
from tests.support.calls import TurnCall
from tests.support.stories import ALPHA, BETA, Stage

A = AgentId("a")
LADDER = (20, 40)


@pytest.fixture
def free(given: Callable[..., Stage]) -> Stage:
    """Agent `a` may have windows of 20, 40 and 80; there is room for all of them."""
    stage = given(cap=1000)
    stage.has("a", ALPHA, context=80, ladder=LADDER, owner="worker of a")
    return stage


@pytest.fixture
def tight(given: Callable[..., Stage]) -> Stage:
    """The same agent after a first turn of 8 tokens; a trainer leaves it no byte beyond its first window."""
    stage = given(cap=200)
    stage.has("a", ALPHA, context=80, ladder=LADDER, owner="worker of a")
    stage.converses("a", tokens=8)
    stage.reserves("trainer", 80)
    return stage


def release_the_trainer(stage: Stage) -> None:
    (id,) = stage.state.books.external
    stage.releases(id)


def stopped_turn(stage: Stage, *, tokens: int = 20, desired: int | None = None) -> TurnCall:
    """A turn of `a` that fills its first window and wants to go on."""
    turn = stage.asks("a")
    stage.brings_on(turn)
    stage.outgrew(turn, tokens=tokens, desired=desired)
    return turn


def session_of_a(stage: Stage) -> tuple[int, int]:
    """Its tokens, and the window that it has the next time."""
    agent = stage.state.agents[A]
    return agent.tokens, agent.window_in_use


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_an_agent_costs_its_first_window_until_it_uses_more(given: Callable[..., Stage]) -> None:
    stage = given(cap=120)
    call = stage.registers("a", ALPHA, context=172_032, ladder=LADDER)
    stage.loaded(ALPHA)
    assert (call.admission.context_bytes, call.admission.charged_bytes) == (20, 120)
    turn = stage.asks("a")
    assert stage.engine.todo == [stage.opening("a", window=20)]
    stage.opened("a")
    assert turn.run is not None
    assert turn.run.room == 20
    stage.finished(turn)


def test_a_larger_window_is_booked_then_made_then_the_turn_goes_on(free: Stage) -> None:
    turn = stopped_turn(free)
    assert free.booked == 100 + 40, "before anything is closed"
    assert free.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    free.closed("a")
    assert free.engine.todo == [free.opening("a", window=40)]
    free.opened("a")
    assert turn.run is not None
    assert (turn.run.room, turn.run.growths) == (40, 1)
    assert turn.evidence == (None, False, 40 + 40), "bytes moved, but nobody was evicted and no session came back"
    free.finished(turn, tokens=33)
    assert session_of_a(free) == (33, 40)


def test_it_grows_as_often_as_it_must(free: Stage) -> None:
    turn = stopped_turn(free, tokens=20)
    free.closed("a")
    free.opened("a")
    free.outgrew(turn, tokens=40)
    free.closed("a")
    free.opened("a")
    assert turn.run is not None
    assert (turn.run.room, turn.run.growths) == (80, 2)
    free.finished(turn, tokens=80)
    assert session_of_a(free) == (80, 80)


@pytest.mark.parametrize(("desired", "room"), [(21, 40), (40, 40), (41, 80), (80, 80), (500, 80)])
def test_it_gets_the_smallest_window_that_the_turn_may_need_until_its_end(free: Stage, desired: int, room: int) -> None:
    turn = stopped_turn(free, desired=desired)
    free.closed("a")
    assert free.engine.todo == [free.opening("a", window=room)]
    free.settle()
    assert turn.endings


def test_where_the_desired_window_does_not_fit_it_goes_on_in_any_that_does(given: Callable[..., Stage]) -> None:
    stage = given(cap=179)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    turn = stopped_turn(stage, desired=80)
    stage.closed("a")
    stage.opened("a")
    assert turn.run is not None
    assert turn.run.room == 40
    stage.finished(turn, tokens=40)


def test_growth_makes_idle_contexts_of_others_leave(given: Callable[..., Stage]) -> None:
    stage = given(cap=279, live_contexts=2)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.has("b", BETA, context=40)
    stage.converses("b", tokens=10)
    turn = stopped_turn(stage)
    assert stage.engine.todo == [actions.LeaveSeat(AgentId("b"), KvPlace.HOST), actions.LeaveSeat(A, KvPlace.HOST)]
    stage.settle()
    assert turn.evidence[0] == "b"
    assert stage.booked == 240, "one turn of 40 bytes is promised, whoever's it is"


def test_the_promise_grows_by_what_the_larger_window_is_beyond_the_largest_turn(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.has("b", BETA, context=70)
    assert stage.booked == 270
    turn = stopped_turn(stage, desired=80)
    assert stage.booked == 280
    stage.settle()
    assert turn.endings


# --- no room ----------------------------------------------------------------------------------------------------------


def test_a_turn_whose_window_does_not_fit_waits_and_goes_on_when_somebody_leaves(tight: Stage) -> None:
    turn = stopped_turn(tight)
    assert turn.waits
    assert (tight.engine.todo, tight.booked) == ([], 200)
    release_the_trainer(tight)
    tight.settle()
    assert turn.endings
    assert session_of_a(tight)[0] == 10


def test_whose_time_is_up_is_refused_and_the_session_is_as_before_the_turn(tight: Stage) -> None:
    turn = stopped_turn(tight)
    tight.runs_out_of_time(turn)
    error = turn.failed_with(WindowRefused)
    assert (error.agent_id, error.window, error.needed_tokens) == ("a", 20, 21)
    assert (error.refusal.code, error.refusal.requested_bytes, error.refusal.free_bytes) == (RefusalCode.CAP, 20, 0)
    assert A not in tight.engine.suspended, "the engine took it back, too"
    assert session_of_a(tight) == (8, 20)
    assert tight.converses("a", tokens=12).evidence == (None, False, 0), "its context is live still"


def test_a_turn_that_grew_once_and_cannot_again_leaves_the_session_as_before_it_began(given: Callable[..., Stage]) -> None:
    stage = given(cap=200)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.converses("a", tokens=8)
    stage.reserves("trainer", 60)
    turn = stopped_turn(stage)
    stage.closed("a")
    stage.opened("a")
    stage.outgrew(turn, tokens=40)
    stage.runs_out_of_time(turn)
    assert turn.failed_with(WindowRefused).window == 40
    assert session_of_a(stage) == (8, 20)


def test_whoever_has_its_room_is_not_refused_any_more(tight: Stage) -> None:
    turn = stopped_turn(tight)
    release_the_trainer(tight)
    tight.runs_out_of_time(turn)
    assert turn.waits
    tight.settle()
    assert turn.endings


def test_whoever_has_its_room_waits_for_a_seat_as_long_as_a_turn_that_was_paused(given: Callable[..., Stage]) -> None:
    """What it made so far is not thrown away because others come first."""
    stage = given(cap=1000, min_turn_s=1.0)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.has("b", BETA, context=80, ladder=LADDER, priority=1)
    turn = stopped_turn(stage)
    other = stage.asks("b")
    stage.brings_on(other)
    stage.runs_out_of_time(turn)
    assert turn.waits
    stage.finished(other)
    stage.settle()
    assert turn.run is not None
    assert turn.run.growths == 1


def test_a_turn_whose_time_was_up_when_its_place_came_has_its_time_to_grow_all_the_same(given: Callable[..., Stage]) -> None:
    stage = given(cap=200)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    trainer = stage.reserves("trainer", 80).reservation
    turn = stage.asks("a")
    stage.runs_out_of_time(turn)
    stage.opened("a")
    stage.outgrew(turn, tokens=20)
    assert turn.waits
    stage.releases(trainer)
    stage.settle()
    assert turn.endings


def test_a_window_that_could_never_fit_is_refused_at_once(given: Callable[..., Stage]) -> None:
    stage = given(cap=139)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.converses("a", tokens=8)
    turn = stopped_turn(stage)
    assert turn.failed_with(WindowRefused).needed_tokens == 21
    assert session_of_a(stage) == (8, 20)


def test_while_it_waits_others_have_their_turns_in_its_place_and_it_comes_back_whole(given: Callable[..., Stage]) -> None:
    stage = given(cap=300)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.has("b", BETA, context=20)
    stage.reserves("trainer", 80)
    turn = stopped_turn(stage)
    assert stage.converses("b").evidence == ("a", False, 40)
    release_the_trainer(stage)
    stage.closed("b")
    assert stage.engine.todo == [stage.opening("a", window=40)]
    stage.opened("a")
    assert turn.evidence == ("b", False, 20 + 40)
    stage.finished(turn)


def test_later_turns_of_the_same_agent_wait_behind_it(tight: Stage) -> None:
    turn = stopped_turn(tight)
    later = tight.asks("a")
    assert later.waits
    assert tight.engine.todo == []
    tight.runs_out_of_time(turn)
    assert later.runs, "the one before is over"
    tight.finished(later)


def test_a_later_turn_that_gives_up_is_told_that_it_waited_for_the_earlier_one(tight: Stage) -> None:
    turn = stopped_turn(tight)
    later = tight.asks("a")
    tight.runs_out_of_time(later)
    assert later.failed_with(TurnTimedOut).reason == "an earlier turn of the same agent"
    tight.runs_out_of_time(turn)


def test_of_two_that_wait_to_grow_the_first_goes_first_and_neither_holds_up_the_other_for_ever(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=320, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=80, ladder=LADDER)
    trainer = stage.reserves("trainer", 81).reservation
    turns = [stage.asks("a"), stage.asks("b")]
    stage.opened("a")
    assert turns[1].waits, "39 bytes are left for turns"
    stage.outgrew(turns[0], tokens=20)
    stage.settle()
    assert turns[0].waits
    assert turns[1].endings
    stage.releases(trainer)
    stage.settle()
    assert turns[0].endings


# --- giving up and leaving --------------------------------------------------------------------------------------------


def run_to(stage: Stage, moment: str) -> TurnCall:
    """A stopped turn that waits for room, or has it and whose context closes, opens, or was evicted for another agent."""
    if moment != "waits":
        release_the_trainer(stage)
    turn = stopped_turn(stage)
    if moment == "opens":
        stage.closed("a")
    return turn


moments = pytest.mark.parametrize("moment", ["waits", "closes", "opens"])


@moments
def test_a_turn_given_up_before_it_goes_on_leaves_the_session_as_before(tight: Stage, moment: str) -> None:
    turn = run_to(tight, moment)
    tight.gives_up(turn)
    turn.failed_with(TurnCancelled)
    tight.settle()
    assert session_of_a(tight) == (8, 20)
    assert A not in tight.engine.suspended
    tight.converses("a", tokens=12)


@moments
@pytest.mark.parametrize("how", ["unregisters", "dies"])
def test_an_agent_that_leaves_meanwhile_takes_its_turn_along(tight: Stage, moment: str, how: str) -> None:
    turn = run_to(tight, moment)
    if how == "dies":
        tight.dies("worker of a")
    else:
        tight.unregisters("a")
    turn.failed_with(TurnCancelled)
    tight.settle()
    assert tight.agents == []
    assert not tight.engine.saved


def test_a_turn_that_was_asked_to_stop_and_outgrew_its_window_instead_is_over(free: Stage) -> None:
    free.converses("a", tokens=8)
    turn = free.asks("a")
    free.gives_up(turn)
    assert turn.stopped
    free.outgrew(turn, tokens=20)
    assert turn.ended_for is FinishReason.CANCELLED
    assert session_of_a(free) == (8, 20)
    assert free.engine.todo == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_larger_context_that_cannot_be_made_fails_the_turn_and_keeps_the_session(free: Stage) -> None:
    free.converses("a", tokens=8)
    turn = stopped_turn(free)
    free.closed("a")
    free.open_failed("a", DecodeFailed(A, "no memory"))
    turn.failed_with(DecodeFailed)
    assert session_of_a(free) == (8, 20)
    assert free.booked == 120
    free.converses("a", tokens=12)


def test_a_larger_context_that_takes_more_than_there_is_refuses_the_turn_and_keeps_the_session(
    given: Callable[..., Stage],
) -> None:
    stage = given(cap=140)
    stage.has("a", ALPHA, context=80, ladder=LADDER)
    stage.converses("a", tokens=8)
    turn = stopped_turn(stage)
    stage.closed("a")
    stage.opened("a", takes=41)
    assert turn.failed_with(AdmissionRefused).refusal.requested_bytes == 1
    stage.settle()
    assert session_of_a(stage) == (8, 20)
    stage.converses("a", tokens=12)


def test_a_window_measured_larger_has_that_price_from_then_on(free: Stage) -> None:
    turn = stopped_turn(free)
    free.closed("a")
    free.opened("a", takes=47)
    assert free.booked == 147
    free.finished(turn, tokens=33)
    assert [rung.context_bytes for rung in free.state.agents[A].ladder] == [20, 47, 80]


def test_kv_that_was_lost_on_the_way_costs_time_and_nothing_else(free: Stage) -> None:
    turn = stopped_turn(free)
    free.closed("a")
    free.opened("a", kv_lost=True)
    assert turn.runs
    free.finished(turn, tokens=33)
    assert session_of_a(free) == (33, 40)


def test_a_best_effort_agents_window_grows_beside_its_weights(given: Callable[..., Stage]) -> None:
    stage = given(cap=179)
    stage.has("a", ALPHA, context=80, ladder=LADDER, kind="best_effort")
    turn = stopped_turn(stage, desired=80)
    assert stage.booked == 140
    stage.settle()
    assert turn.endings
    stopped_turn(stage, tokens=40).failed_with(WindowRefused)  # 100 of weights and 80 do not fit 179

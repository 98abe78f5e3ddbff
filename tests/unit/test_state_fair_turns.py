"""Fair shares as stories: more agents than seats, turns that stand still and go on, and readers that do not keep up.

Whose account has fewer tokens goes first among equals. See also: `test_state_turns.py`, for priorities and the order of arrival.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.types import AgentId, KvPlace
from tests.support.calls import TurnCall
from tests.support.stories import ALPHA, BETA, Stage

A, B, C = (AgentId(name) for name in "abc")


@pytest.fixture
def pair(given: Callable[..., Stage]) -> Stage:
    """Three agents on one model that has two seats, no more; a turn that began goes on for 2 s."""
    stage = given(cap=1000, min_turn_s=2.0)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50, slots=2)
    return stage


@pytest.fixture
def chair(given: Callable[..., Stage]) -> Stage:
    """Two agents on one model that has one seat."""
    stage = given(cap=1000, ageing_s=60.0)
    for agent in "ab":
        stage.has(agent, ALPHA, context=50)
    return stage


def run(stage: Stage, *agents: str) -> list[TurnCall]:
    """They ask in this order, and the engine makes what they need until it has only turns to do."""
    turns = [stage.asks(agent) for agent in agents]
    make_ready(stage)
    return turns


def make_ready(stage: Stage) -> None:
    while work := next((it for it in stage.engine.todo if not isinstance(it, actions.RunTurn)), None):
        stage.does(work)


def served(stage: Stage, agent: str) -> int:
    return stage.state.agents[AgentId(agent)].served


# --- accounts ---------------------------------------------------------------------------------------------------------


def test_what_is_computed_for_an_agent_is_counted_once(chair: Stage) -> None:
    (turn,) = run(chair, "a")
    chair.progresses(a=30)
    chair.progresses(a=100)
    chair.progresses(a=100, b=7)
    assert (served(chair, "a"), served(chair, "b")) == (100, 0), "nothing runs for b"
    chair.finished(turn, computed=120)
    assert served(chair, "a") == 120
    chair.finished(*run(chair, "a"), computed=5)
    assert served(chair, "a") == 125


def test_a_turn_that_stands_still_is_not_counted_again_when_it_goes_on(chair: Stage) -> None:
    first, second = run(chair, "a", "b")
    chair.progresses(a=30)
    chair.paused(first, tokens=40)
    make_ready(chair)
    chair.finished(second, computed=100)
    make_ready(chair)
    assert served(chair, "a") == 40
    chair.finished(first, computed=70)
    assert served(chair, "a") == 70


def test_whoever_was_away_has_no_claim_to_what_it_did_not_use(pair: Stage) -> None:
    first, second = run(pair, "a", "b")
    pair.progresses(a=1000, b=400)
    pair.asks("c")
    assert served(pair, "c") == 400, "as much as the one that had least of those who are there"
    pair.finished(first)
    pair.finished(second)
    pair.settle()


def test_whoever_had_more_does_not_lose_it_by_going_away(pair: Stage) -> None:
    run(pair, "a")
    pair.progresses(a=100)
    pair.finished(*run(pair, "c"), computed=5000)
    pair.asks("c")
    assert served(pair, "c") == 5100
    pair.settle()


def test_whoever_comes_while_nobody_is_there_begins_where_those_were_who_were_there_last(pair: Stage) -> None:
    """Else an agent that has worked for hours would stand behind a newcomer that came between two of its turns, for hours."""
    pair.finished(*run(pair, "a"), computed=1000)
    run(pair, "b")
    assert served(pair, "b") == 1000
    pair.settle()


def test_shares_count_among_equals(pair: Stage) -> None:
    pair.has("z", ALPHA, context=50, slots=2, priority=1)
    pair.finished(*run(pair, "z"), computed=7000)
    run(pair, "a")
    pair.progresses(a=100)
    pair.has("y", ALPHA, context=50, slots=2, priority=1)
    pair.asks("y")
    assert served(pair, "y") == 7000, "of another one of its priority, not of who ranks lower anyway"
    pair.settle()


def test_who_was_held_up_by_its_reader_was_away_too(pair: Stage) -> None:
    first, _ = run(pair, "a", "b")
    pair.progresses(a=100)
    pair.holds(first)
    pair.progresses(a=100, b=5000)
    pair.asks("c")
    assert served(pair, "c") == 5000
    pair.holds(first, False)
    assert served(pair, "a") == 5000
    pair.settle()


# --- in turns ---------------------------------------------------------------------------------------------------------


def test_more_agents_than_seats_take_turns_by_what_each_had(pair: Stage) -> None:
    turns = run(pair, "a", "b", "c")
    assert [turn.runs for turn in turns] == [True, True, False]
    pair.progresses(a=30, b=50)
    assert not any(turn.pausing for turn in turns), "nobody ran its minimum"
    pair.passes(2.0)
    assert [turn.pausing for turn in turns] == [False, True, False]
    pair.paused(turns[1], tokens=50)
    assert pair.engine.todo[1:] == [actions.LeaveSeat(B, KvPlace.HOST)]
    make_ready(pair)
    assert [turn.runs for turn in turns] == [True, False, True]
    assert turns[2].evidence == ("b", False, 100)
    pair.passes(2.0)
    pair.progresses(a=90, c=40)
    assert [turn.pausing for turn in turns] == [True, False, False], "b had 50, a 90"
    pair.paused(turns[0], tokens=20)
    make_ready(pair)
    assert turns[1].run is not None
    assert (turns[1].run.pauses, turns[1].evidence) == (1, ("a", False, 40 + 100))
    pair.settle()


def test_nobody_stands_still_for_one_that_had_as_much_before_it_waited_for_a_priority(pair: Stage) -> None:
    turns = run(pair, "a", "b", "c")
    pair.passes(59.9)
    assert not any(turn.pausing for turn in turns)
    pair.passes(0.1)
    assert sum(turn.pausing for turn in turns) == 1
    pair.settle()


def test_nobody_stands_still_where_nobody_waits(pair: Stage) -> None:
    turns = run(pair, "a", "b")
    pair.passes(2.0)
    pair.progresses(a=100, b=1)
    pair.passes(100.0)
    assert not any(turn.pausing for turn in turns)
    pair.settle()


def test_of_those_who_wait_the_one_that_had_least_is_next(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in "abc":
        stage.has(agent, ALPHA, context=50)
    first, second, _, last = run(stage, "b", "a", "b", "c")
    stage.finished(first, computed=500)
    make_ready(stage)
    stage.finished(second, computed=10)
    make_ready(stage)
    assert last.runs, "b came before, and had more"
    stage.settle()


def test_two_models_take_turns_in_one_place_by_what_each_agent_had(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=1, min_turn_s=2.0)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    first, second = run(stage, "a", "b")
    stage.progresses(a=30)
    assert not first.pausing
    stage.passes(2.0)
    assert first.pausing
    stage.paused(first, tokens=30)
    make_ready(stage)
    assert second.evidence == ("a", False, 60)
    stage.progresses(b=31)
    stage.passes(1.9)
    assert not second.pausing
    stage.passes(0.1)
    assert second.pausing
    stage.settle()


@pytest.mark.parametrize("turn_s", [0.6, 1.5, 3.0])
@pytest.mark.parametrize("grows", [False, True])
def test_short_turns_that_come_and_go_keep_nobody_out(given: Callable[..., Stage], turn_s: float, grows: bool) -> None:
    """Of four seats one or another was always taken a moment ago: another model's turn, or one that needs a larger pool."""
    stage = given(cap=1000, min_turn_s=1.0)
    for agent in "abcd":
        stage.has(agent, ALPHA, context=200, ladder=(50,), slots=4)
    stage.has("z", BETA, context=50)
    turns = dict(zip("abcd", run(stage, "a", "b", "c", "d"), strict=True))
    ends = {agent: stage.at + turn_s * (n + 1) / 4 for n, agent in enumerate("abcd")}
    waits = turns.pop("a") if grows else stage.asks("z")
    if grows:
        stage.outgrew(waits, tokens=50, desired=120, has_made=True)
    began = stage.at
    while not waits.runs:
        assert stage.at < began + 2.0, "the minimum, and a moment"
        stage.at += 0.05
        for agent, turn in turns.items():
            if turn.pausing:
                stage.paused(turn)
            elif turn.runs and stage.at >= ends[agent]:
                stage.finished(turn, computed=100)
                turns[agent], ends[agent] = stage.asks(agent), stage.at + turn_s
        make_ready(stage)
        stage.progresses(**{agent: 100 for agent, turn in turns.items() if turn.runs})
    stage.settle()


# --- standing still ---------------------------------------------------------------------------------------------------


def stand_still(stage: Stage) -> tuple[TurnCall, TurnCall]:
    """The turn of `a` with 15 tokens stands still for that of `b`, which runs."""
    first, second = run(stage, "a", "b")
    stage.progresses(a=1)
    stage.paused(first, tokens=15)
    make_ready(stage)
    assert second.runs
    return first, second


def test_a_turn_that_stands_still_keeps_its_session_and_goes_on_as_the_same_turn(chair: Stage) -> None:
    first, second = stand_still(chair)
    agent = chair.state.agents[A]
    assert (agent.tokens, agent.place, agent.turns) == (15, KvPlace.HOST, 1)
    chair.finished(second, tokens=7)
    chair.seat_left("b")
    chair.seat_taken("a")
    assert first.run is not None
    assert (first.run.pauses, first.evidence) == (1, ("b", False, 14 + 30)), "it is no new turn, so nothing was restored for it"
    assert agent.turns == 1
    chair.finished(first, tokens=40)


def test_it_keeps_its_place_in_line_before_its_agents_later_turns(chair: Stage) -> None:
    first, second = stand_still(chair)
    later = chair.asks("a")
    chair.finished(second)
    make_ready(chair)
    assert first.runs
    assert later.waits
    chair.settle()


def test_a_turn_that_ends_while_it_is_asked_to_stand_still_has_ended(chair: Stage) -> None:
    first, second = run(chair, "a", "b")
    chair.progresses(a=1)
    assert first.pausing
    chair.finished(first)
    make_ready(chair)
    assert second.runs
    chair.settle()


def test_one_that_outgrows_its_seat_while_it_is_asked_to_stand_still_grows_when_it_goes_on(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    for agent in "ab":
        stage.has(agent, ALPHA, context=80, ladder=(20,))
    first, second = run(stage, "a", "b")
    stage.progresses(a=1)
    stage.outgrew(first, tokens=20)
    make_ready(stage)
    assert second.runs
    stage.finished(second)
    make_ready(stage)
    assert first.run is not None
    assert (first.run.room, first.run.growths, first.run.pauses) == (80, 1, 0)
    stage.settle()


def test_one_that_stands_still_for_somebody_who_gave_up_goes_on_at_once(chair: Stage) -> None:
    first, second = run(chair, "a", "b")
    chair.progresses(a=1)
    chair.gives_up(second)
    chair.paused(first, tokens=15)
    assert first.runs
    assert chair.engine.todo == [first.run]
    chair.settle()


def test_it_rises_in_line_from_when_it_stood_still_not_from_when_it_came(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, ageing_s=60.0)
    stage.has("a", ALPHA, context=50, priority=0)
    stage.has("b", ALPHA, context=50, priority=1)
    (first,) = run(stage, "a")
    stage.passes(600.0)
    urgent = stage.asks("b")
    stage.paused(first, tokens=15)
    make_ready(stage)
    stage.progresses(b=500)
    stage.passes(59.9)
    assert not urgent.pausing, "the ten minutes that it ran give it no priority"
    stage.passes(0.1)
    assert urgent.pausing
    stage.settle()


# --- readers that do not keep up --------------------------------------------------------------------------------------


def test_a_held_turn_gives_way_at_once_whatever_its_rank(pair: Stage) -> None:
    pair.has("z", ALPHA, context=50, slots=2, priority=-5)
    turns = run(pair, "a", "b", "z")
    pair.holds(turns[0])
    assert turns[0].pausing, "before its minimum, and for a lower priority"
    pair.paused(turns[0], tokens=12)
    make_ready(pair)
    assert turns[2].runs
    pair.holds(turns[0], False)
    pair.settle()


def test_where_nobody_waits_it_keeps_its_seat(pair: Stage) -> None:
    (turn,) = run(pair, "a")
    pair.holds(turn)
    pair.passes(100.0)
    assert not turn.pausing
    pair.finished(turn)


def test_it_does_not_go_on_while_it_is_held_and_holds_up_nobody(chair: Stage) -> None:
    first, second = run(chair, "a", "b")
    chair.holds(first)
    chair.paused(first, tokens=15)
    make_ready(chair)
    later = chair.asks("a")
    chair.finished(second)
    make_ready(chair)
    assert chair.engine.todo == []
    assert first.waits
    assert later.waits, "its agent's next turn is behind it"
    chair.converses("b")
    chair.holds(first, False)
    make_ready(chair)
    assert first.runs
    chair.settle()
    assert later.endings


def test_its_place_is_another_models_as_soon_as_the_pool_has_been_there_for_the_minimum(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=1, min_turn_s=50.0)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=50)
    first, second = run(stage, "a", "b")
    stage.holds(first)
    stage.passes(49.9)
    assert not first.pausing
    stage.passes(0.1)
    assert first.pausing, "though it had no more than the other"
    stage.paused(first, tokens=12)
    make_ready(stage)
    assert second.runs
    stage.holds(first, False)
    stage.settle()


def test_a_turn_that_has_not_begun_has_no_reader_to_wait_for(chair: Stage) -> None:
    first, second = run(chair, "a", "b")
    chair.holds(second)
    chair.finished(first)
    make_ready(chair)
    assert second.runs
    chair.settle()

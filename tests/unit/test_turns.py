"""Whose turn is next: the seven numbered cases as stories, then what must hold of every plan."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conductor.core.events import TurnId
from conductor.core.sessions import Phase
from conductor.core.turns import Close, Occupant, Open, Start, Step, WaitingTurn, plan_turns
from conductor.types import AgentId, ModelId


def turn(id: int, agent: str, model: str) -> WaitingTurn:
    return WaitingTurn(TurnId(id), AgentId(agent), ModelId(model))


def live(agent: str, model: str, phase: Phase = Phase.READY, *, last_turn: int = 0) -> Occupant:
    return Occupant(AgentId(agent), ModelId(model), phase, last_turn)


def start(id: int, agent: str) -> Start:
    return Start(TurnId(id), AgentId(agent))


def open_(id: int, agent: str) -> Open:
    return Open(TurnId(id), AgentId(agent))


def close(agent: str, *, for_turn: int) -> Close:
    return Close(AgentId(agent), TurnId(for_turn))


def plan(waiting: list[WaitingTurn], places: list[Occupant], *, live_contexts: int = 1) -> list[Step]:
    return plan_turns(waiting, places, live_contexts=live_contexts)


# --- the seven cases --------------------------------------------------------------------------------------------------


def test_nobody_waits_and_nothing_is_done() -> None:
    assert plan([], [live("a", "m")]) == []


def test_1_an_agent_whose_context_is_ready_starts_at_once() -> None:
    assert plan([turn(1, "a", "m")], [live("a", "m")]) == [start(1, "a")]


def test_1_of_two_turns_of_one_agent_only_the_first_starts() -> None:
    assert plan([turn(1, "a", "m"), turn(2, "a", "m")], [live("a", "m")]) == [start(1, "a")]


def test_2_an_agent_whose_context_is_on_its_way_waits_for_it() -> None:
    for phase in (Phase.OPENING, Phase.CLOSING, Phase.BUSY):
        assert plan([turn(1, "a", "m")], [live("a", "m", phase)], live_contexts=2) == []


def test_3_a_ready_context_of_the_same_model_closes_first_even_with_places_free() -> None:
    assert plan([turn(1, "b", "m")], [live("a", "m")], live_contexts=3) == [close("a", for_turn=1)]


def test_3_a_busy_context_of_the_same_model_is_waited_for_and_nobody_else_is_evicted() -> None:
    places = [live("a", "m", Phase.BUSY), live("x", "n")]
    assert plan([turn(1, "b", "m")], places, live_contexts=2) == []


def test_3_two_who_want_the_same_models_place_get_one_close() -> None:
    assert plan([turn(1, "b", "m"), turn(2, "c", "m")], [live("a", "m")], live_contexts=2) == [close("a", for_turn=1)]


def test_4_a_free_place_is_opened() -> None:
    assert plan([turn(1, "a", "m")], []) == [open_(1, "a")]


def test_4_each_free_place_is_given_once_in_order() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "n"), turn(3, "c", "o")]
    assert plan(waiting, [], live_contexts=2) == [open_(1, "a"), open_(2, "b")]


def test_4_two_agents_of_one_model_never_open_together() -> None:
    waiting = [turn(1, "a", "m"), turn(2, "b", "m"), turn(3, "c", "n")]
    assert plan(waiting, [], live_contexts=3) == [open_(1, "a"), open_(3, "c")]


def test_5_a_place_that_is_becoming_free_is_waited_for() -> None:
    places = [live("a", "m", Phase.CLOSING), live("b", "n")]
    assert plan([turn(1, "c", "o")], places, live_contexts=2) == []


def test_5_a_place_that_is_becoming_free_is_waited_for_by_one_only() -> None:
    places = [live("a", "m", Phase.CLOSING), live("b", "n")]
    assert plan([turn(1, "c", "o"), turn(2, "d", "p")], places, live_contexts=2) == [close("b", for_turn=2)]


def test_5_two_agents_of_a_closing_contexts_model_wait_for_one_place_not_for_two() -> None:
    places = [live("a", "m", Phase.CLOSING), live("x", "n", Phase.CLOSING), live("y", "o")]
    waiting = [turn(1, "b", "m"), turn(2, "c", "m"), turn(3, "d", "p")]
    assert plan(waiting, places, live_contexts=3) == [], "x's place is becoming free for d: y may stay"


def test_5_a_place_that_an_agent_of_its_model_waits_for_is_no_other_models() -> None:
    places = [live("a", "m", Phase.CLOSING), live("y", "n")]
    waiting = [turn(1, "b", "m"), turn(2, "d", "p")]
    assert plan(waiting, places, live_contexts=2) == [close("y", for_turn=2)]


def test_6_the_context_used_longest_ago_is_closed() -> None:
    places = [live("a", "m", last_turn=2), live("b", "n", last_turn=1), live("c", "o", last_turn=3)]
    assert plan([turn(1, "d", "p")], places, live_contexts=3) == [close("b", for_turn=1)]


def test_6_busy_contexts_are_left_alone_however_long_ago_they_began() -> None:
    places = [live("a", "m", Phase.BUSY, last_turn=1), live("b", "n", last_turn=2)]
    assert plan([turn(1, "c", "o")], places, live_contexts=2) == [close("b", for_turn=1)]


def test_6_a_ready_agent_that_is_first_in_line_itself_is_not_evicted() -> None:
    places = [live("a", "m", last_turn=1), live("b", "n", last_turn=2)]
    waiting = [turn(1, "a", "m"), turn(2, "c", "o")]
    assert plan(waiting, places, live_contexts=2) == [start(1, "a"), close("b", for_turn=2)]


def test_6_whoever_is_further_back_in_line_gives_way() -> None:
    assert plan([turn(1, "b", "n"), turn(2, "a", "m")], [live("a", "m")]) == [close("a", for_turn=1)]


def test_7_otherwise_one_waits() -> None:
    assert plan([turn(1, "b", "n")], [live("a", "m", Phase.BUSY)]) == []
    assert plan([turn(1, "b", "n")], [live("a", "m", Phase.OPENING)]) == []


def test_6_a_second_agent_of_the_same_model_evicts_nobody_it_has_to_wait_for_the_first_anyway() -> None:
    places = [live("x", "n", last_turn=1), live("y", "o", last_turn=2)]
    waiting = [turn(1, "b", "m"), turn(2, "c", "m")]
    assert plan(waiting, places, live_contexts=2) == [close("x", for_turn=1)]


# --- every plan -------------------------------------------------------------------------------------------------------

MODELS = "mnopq"
AGENTS = [f"{model}{i}" for model in MODELS for i in range(3)]


@st.composite
def moments(draw: st.DrawFn) -> tuple[list[WaitingTurn], list[Occupant], int]:
    """A legal picture: at most one live context a model, at most `live_contexts`."""
    live_contexts = draw(st.integers(1, 4))
    models = draw(st.lists(st.sampled_from(MODELS), unique=True, max_size=live_contexts))
    places = [
        live(f"{model}{draw(st.integers(0, 2))}", model, draw(st.sampled_from(Phase)), last_turn=draw(st.integers(0, 9)))
        for model in models
    ]
    waiting = [turn(id, agent, agent[0]) for id, agent in enumerate(draw(st.lists(st.sampled_from(AGENTS), max_size=8)))]
    return waiting, places, live_contexts


@given(moments())
def test_places_and_models_are_never_taken_twice(moment: tuple[list[WaitingTurn], list[Occupant], int]) -> None:
    waiting, places, live_contexts = moment
    steps = plan(waiting, places, live_contexts=live_contexts)
    model_of = {turn.agent_id: turn.model_id for turn in waiting}
    opened = [model_of[step.agent_id] for step in steps if isinstance(step, Open)]
    taken = [*(place.model_id for place in places), *opened]
    assert len(taken) <= live_contexts
    assert len(set(taken)) == len(taken)


@given(moments())
def test_no_agent_gets_two_steps_and_each_is_one_it_can_take(moment: tuple[list[WaitingTurn], list[Occupant], int]) -> None:
    waiting, places, live_contexts = moment
    steps = plan(waiting, places, live_contexts=live_contexts)
    assert len({step.agent_id for step in steps}) == len(steps)
    phases = {place.agent_id: place.phase for place in places}
    for step in steps:
        assert phases.get(step.agent_id) is (None if isinstance(step, Open) else Phase.READY)


@given(moments())
def test_each_step_is_for_the_first_waiting_turn_of_its_agent(moment: tuple[list[WaitingTurn], list[Occupant], int]) -> None:
    waiting, places, live_contexts = moment
    first: dict[AgentId, TurnId] = {}
    for waiter in waiting:
        first.setdefault(waiter.agent_id, waiter.id)
    for step in plan(waiting, places, live_contexts=live_contexts):
        if isinstance(step, Close):
            assert step.for_turn in first.values()
        else:
            assert step.turn_id == first[step.agent_id]


@given(moments())
def test_the_first_in_line_gets_a_step_unless_what_it_needs_is_on_its_way(
    moment: tuple[list[WaitingTurn], list[Occupant], int],
) -> None:
    waiting, places, live_contexts = moment
    if not waiting:
        return
    steps, first = plan(waiting, places, live_contexts=live_contexts), waiting[0]
    served = any((step.for_turn if isinstance(step, Close) else step.turn_id) == first.id for step in steps)
    on_its_way = [place for place in places if place.model_id == first.model_id and place.phase is not Phase.READY]
    becoming_free = [place for place in places if place.phase is Phase.CLOSING]
    all_taken = len(places) == live_contexts and not any(place.phase is Phase.READY for place in places)
    assert served or on_its_way or becoming_free or all_taken
    if any(place.phase is Phase.READY for place in places):
        assert served or on_its_way or becoming_free


@given(moments())
def test_at_most_one_context_is_closed_for_each_model_that_wants_in(
    moment: tuple[list[WaitingTurn], list[Occupant], int],
) -> None:
    waiting, places, live_contexts = moment
    model_of = {turn.id: turn.model_id for turn in waiting}
    steps = plan(waiting, places, live_contexts=live_contexts)
    closed_for = [model_of[step.for_turn] for step in steps if isinstance(step, Close)]
    assert len(set(closed_for)) == len(closed_for)


@given(moments())
def test_contexts_of_other_models_are_closed_only_when_no_place_is_free_or_becoming_free(
    moment: tuple[list[WaitingTurn], list[Occupant], int],
) -> None:
    waiting, places, live_contexts = moment
    steps = plan(waiting, places, live_contexts=live_contexts)
    model_of = {turn.id: turn.model_id for turn in waiting}
    live_models = {place.model_id for place in places}
    evictions = [step for step in steps if isinstance(step, Close) and model_of[step.for_turn] not in live_models]
    if evictions:
        earlier = {turn.model_id for turn in waiting if turn.id < evictions[-1].for_turn}
        assert len(places) + sum(isinstance(step, Open) for step in steps) == live_contexts
        assert sum(place.phase is Phase.CLOSING for place in places) <= len(earlier)

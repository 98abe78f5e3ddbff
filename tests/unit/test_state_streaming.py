"""Models larger than the device, and weights that park, as stories: what is booked, brought, sent home and brought again.

See also: `test_state_lent_layers.py`, what is taken back and lent again; `test_turns_placing.py`, the plan of one moment;
`support/streamed.py` says what the models are.
"""

from __future__ import annotations

import pytest

from conductor.core import actions
from conductor.errors import ModelLoadFailed, RefusalCode
from conductor.types import Kind, ModelState
from tests.support.calls import TurnCall
from tests.support.stories import ALPHA, BETA, Stage
from tests.support.streamed import LARGE, OTHER, SLOW, WHOLE, Given, at_home, lines, part, placed, record


def kinds_of_work(stage: Stage, turn: TurnCall) -> list[str]:
    """What the engine does until the turn runs."""
    done: list[str] = []
    while turn.waits:
        done.append(type(stage.engine.todo[0]).__name__)
        stage.does(stage.engine.todo[0])
    return done


@pytest.fixture
def small(given: Given) -> Stage:
    """90 bytes, and a best-effort agent of a model of 100."""
    stage = given(cap=90, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    return stage


# --- a model larger than the device -------------------------------------------------------------------------------------


def test_it_is_admitted_for_the_least_part_and_has_its_home_at_once(given: Given) -> None:
    stage = given(cap=70, **SLOW)
    told = stage.registers("a", LARGE, context=40, kind="best_effort").admission
    assert (told.charged_bytes, told.context_bytes, told.model_loaded) == (30 + 40, 40, False)
    assert (stage.booked, at_home(stage), stage.engine.todo) == (70, 100, [])


def test_where_not_even_the_least_part_fits_it_is_refused_for_good(given: Given) -> None:
    stage = given(cap=69, **SLOW)
    assert stage.registers("a", LARGE, context=40, kind="best_effort").refusal.code is RefusalCode.NEVER
    assert at_home(stage) == 0


@pytest.mark.parametrize("kind", ["shared", "guaranteed"])
def test_whoever_wants_its_weights_to_stay_needs_room_for_all_of_them(small: Stage, kind: str) -> None:
    before = small.picture()
    assert small.registers("c", LARGE, context=10, kind=kind).refusal.code is RefusalCode.NEVER
    assert small.picture() == before


def test_its_turn_brings_a_part_and_a_ring_and_every_byte_is_a_line(small: Stage) -> None:
    turn = small.asks("a")
    assert small.engine.todo == [actions.LoadModel(LARGE, part(2))]
    small.loaded(LARGE)
    small.opened("a")
    assert turn.runs
    assert lines(small) == {Kind.WEIGHTS: 30, Kind.RING: 20, Kind.CONTEXT: 40}
    small.finished(turn)
    assert small.asks("a").runs, "and the next one finds it there"
    small.settle()


def test_many_of_one_model_cost_the_least_part_once(given: Given) -> None:
    stage = given(cap=100, **SLOW)
    for n in range(9):
        stage.has(f"agent-{n}", LARGE, context=20 + n, kind="best_effort")
    assert (stage.booked, at_home(stage)) == (58, 100)


# --- parked, and back ---------------------------------------------------------------------------------------------------


def test_parked_weights_stay_at_home_and_are_placed_again_as_there_is_room_then(small: Stage) -> None:
    small.converses("a")
    trainer = small.reserves("trainer", 10)
    assert kinds_of_work_of(small) == ["LeaveSeat", "ClosePool"], "the pool is enough"
    assert trainer.reservation
    turn = small.asks("a")
    assert small.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=True)], "beside its pool there is no room for so much"
    small.unloaded(LARGE.id)
    assert small.engine.todo == [actions.LoadModel(LARGE, part(1))]
    assert at_home(small) == 100
    small.settle()
    assert turn.evidence[1], "its KV came back"


def kinds_of_work_of(stage: Stage) -> list[str]:
    """All that the engine is asked for, done."""
    done: list[str] = []
    while stage.engine.todo:
        done.append(type(stage.engine.todo[0]).__name__)
        stage.does(stage.engine.todo[0])
    return done


def test_two_models_that_do_not_fit_together_take_turns_by_parking(given: Given) -> None:
    stage = given(cap=140, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("b", OTHER, context=40, kind="best_effort")
    assert (stage.booked, at_home(stage)) == (70, 200)
    stage.converses("a", tokens=10)
    for agent, plan, other in [("b", OTHER, LARGE), ("a", LARGE, OTHER)] * 3:
        turn = stage.asks(agent)
        work = kinds_of_work(stage, turn)
        assert work == ["LeaveSeat", "ClosePool", "UnloadModel", "LoadModel", "OpenPool", "TakeSeat"]
        assert (placed(stage, plan), record(stage, other).state) == (WHOLE, ModelState.PARKED)
        stage.finished(turn)
    assert stage.engine.homes == {LARGE.id, OTHER.id}
    assert stage.converses("a").evidence == (None, False, 0)


def test_with_room_for_a_part_beside_it_a_second_model_runs_too_and_neither_is_moved_for_more(given: Given) -> None:
    stage = given(cap=230, live_contexts=2, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("b", OTHER, context=40, kind="best_effort")
    turns = [stage.asks("a"), stage.asks("b")]
    for turn in turns:
        stage.brings_on(turn)
    assert [turn.runs for turn in turns] == [True, True]
    assert (placed(stage), placed(stage, OTHER), stage.booked) == (WHOLE, part(2), 230)
    stage.settle()
    for agent in "abba":
        assert stage.asks(agent).runs
        stage.settle()


def test_the_last_agents_leaving_frees_the_home(small: Stage) -> None:
    small.converses("a")
    leaving = small.unregisters("a")
    small.closed("a")
    assert small.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=False)]
    assert leaving.waits
    small.unloaded(LARGE.id)
    assert leaving.is_done
    assert (at_home(small), small.state.models) == (0, {})


def test_so_does_the_leaving_of_the_last_agent_of_a_model_that_is_parked(given: Given) -> None:
    stage = given(cap=140, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("b", OTHER, context=40, kind="best_effort")
    stage.converses("a")
    stage.converses("b")
    leaving = stage.unregisters("a")
    assert stage.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=False)]
    back = stage.registers("a2", LARGE, context=40, kind="best_effort")
    assert (leaving.waits, back.waits) == (True, True), "whoever comes meanwhile is taken up when it is gone"
    stage.settle()
    assert (leaving.is_done, back.is_admitted, at_home(stage)) == (True, True, 200)
    assert stage.converses("a2").run


def test_one_that_was_never_loaded_is_gone_at_once_with_what_was_booked_for_its_home(small: Stage) -> None:
    assert small.unregisters("a").is_done
    assert (at_home(small), small.booked) == (0, 0)


def test_a_model_parked_while_its_last_agent_leaves_loses_its_home_too(given: Given) -> None:
    stage = given(cap=140, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("b", OTHER, context=40, kind="best_effort")
    stage.converses("a")
    turn = stage.asks("b")
    stage.closed("a")
    assert stage.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=True)]
    leaving = stage.unregisters("a")
    stage.unloaded(LARGE.id)
    assert stage.engine.is_asked(actions.UnloadModel, LARGE.id)
    stage.settle()
    assert (leaving.is_done, bool(turn.endings), at_home(stage)) == (True, True, 100)


# --- a home is not to be had --------------------------------------------------------------------------------------------


def test_without_room_for_a_home_it_is_loaded_from_its_file_as_ever(given: Given) -> None:
    stage = given(cap=150, home_bytes=199, link_bytes_per_s=10.0)
    stage.has("a", LARGE, context=40, kind="best_effort")
    assert stage.registers("b", OTHER, context=50, kind="best_effort").admission.charged_bytes == 80, "150 in all"
    stage.converses("a")
    turn = stage.asks("b")
    stage.closed("a")
    stage.unloaded(LARGE.id)
    assert stage.engine.todo == [actions.LoadModel(OTHER)]
    stage.settle()
    assert turn.endings
    assert (placed(stage, OTHER), stage.engine.homes) == (None, {LARGE.id})
    stage.converses("a")
    assert at_home(stage) == 100


def test_without_one_a_model_larger_than_the_device_is_refused_for_good(given: Given) -> None:
    stage = given(cap=90, home_bytes=99, link_bytes_per_s=10.0)
    assert stage.registers("a", LARGE, context=40, kind="best_effort").refusal.code is RefusalCode.NEVER


# --- it turns out otherwise ---------------------------------------------------------------------------------------------


def test_weights_that_turn_out_not_to_move_stay_whole_where_there_is_room_for_all_of_them(given: Given) -> None:
    stage = given(cap=140, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("b", ALPHA, context=40, kind="best_effort")
    turn = stage.asks("a")
    stage.stays_whole(LARGE)
    stage.settle()
    assert turn.endings
    assert (at_home(stage), placed(stage), stage.booked) == (0, None, 140)
    stage.converses("b")
    assert record(stage).state is ModelState.PARKED
    again = stage.asks("a")
    stage.closed("b")
    stage.unloaded(ALPHA.id)
    assert stage.engine.todo == [actions.LoadModel(LARGE)], "from its file"
    stage.settle()
    assert again.endings


def test_where_there_is_no_room_for_all_of_them_their_turns_are_refused_and_the_others_keep_theirs(given: Given) -> None:
    stage = given(cap=190, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.has("c", BETA, context=60)
    turn = stage.asks("a")
    assert stage.engine.todo == [actions.LoadModel(LARGE, part(2))]
    stage.stays_whole(LARGE)
    assert "cannot stream" in str(turn.failed_with(ModelLoadFailed))
    assert (stage.engine.todo, record(stage).state) == ([], ModelState.PARKED)
    assert stage.converses("c").run
    assert stage.agents == ["a", "c"]


def test_what_turned_out_not_to_move_is_not_promised_to_move_again(given: Given) -> None:
    stage = given(cap=200, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.asks("a")
    stage.stays_whole(LARGE)
    stage.settle()
    stage.has("b", LARGE, context=40, kind="best_effort")
    assert (at_home(stage), record(stage).offers) == (0, ())


def test_a_load_that_fails_before_there_was_a_home_is_tried_again_with_the_next_turn(small: Stage) -> None:
    turn = small.asks("a")
    small.load_failed(LARGE)
    assert turn.failed_with(ModelLoadFailed).problem == "it is broken"
    assert (small.engine.todo, lines(small)) == ([], {Kind.HEADROOM: 70})
    assert small.converses("a").run
    assert at_home(small) == 100


def test_a_load_that_fails_with_the_weights_at_home_leaves_them_there(small: Stage) -> None:
    small.converses("a")
    small.reads_device(strangers=41)
    small.settle()
    assert record(small).state is ModelState.PARKED
    small.reads_device()
    turn = small.asks("a")
    tried = []
    while small.engine.is_asked(actions.LoadModel, LARGE.id):
        tried.append(small.state.books.prices.held_bytes(record(small)))
        small.load_failed(LARGE)
    assert tried == sorted(set(tried), reverse=True), "where the device has no room for a part, a smaller one is tried"
    turn.failed_with(ModelLoadFailed)
    assert (lines(small), at_home(small), record(small).at_home) == ({Kind.HEADROOM: 70}, 100, True)
    assert small.unregisters("a").waits, "its home is to be freed"
    assert small.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=False)]
    small.settle()
    assert at_home(small) == 0

"""Layers on the device are lent, as stories: others take the memory back, and what becomes free brings more of them.

See also: `test_state_streaming.py`; `support/streamed.py` says what the models are.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given as for_any
from hypothesis import strategies as st

from conductor.core import actions, events
from conductor.errors import RefusalCode
from conductor.types import Kind, ModelState
from tests.support.stories import Stage, model, stages
from tests.support.streamed import LARGE, LEAST, SLOW, WHOLE, Given, at_home, lines, part, placed, record

# --- somebody whose weights must stay -----------------------------------------------------------------------------------


@pytest.fixture
def streamed(given: Given) -> Stage:
    """150 bytes, in which a model streams because 60 of them are somebody else's."""
    stage = given(cap=150, **SLOW)
    stage.reserves("trainer", 60)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.converses("a", tokens=10)
    assert placed(stage) == part(2)
    return stage


def the_trainer_leaves(stage: Stage) -> None:
    for reservation in list(stage.state.books.external):
        stage.releases(reservation)


@pytest.mark.parametrize("kind", ["shared", "guaranteed"])
@pytest.mark.parametrize("busy", [False, True])
def test_a_model_that_streams_goes_home_and_comes_whole_before_somebody_whose_weights_stay_is_in(
    streamed: Stage, kind: str, busy: bool
) -> None:
    turn = streamed.asks("a") if busy else None
    the_trainer_leaves(streamed)
    call = streamed.registers("c", LARGE, context=10, kind=kind)
    assert call.waits
    if turn:
        streamed.paused(turn)
    streamed.closed("a")
    assert streamed.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=True)]
    streamed.unloaded(LARGE.id)
    assert streamed.engine.todo == [actions.LoadModel(LARGE, WHOLE)]
    streamed.settle()
    assert call.is_admitted
    assert (record(streamed).firm, placed(streamed), lines(streamed)[Kind.WEIGHTS]) == (True, WHOLE, 100)
    assert turn is None or turn.endings, "and whoever stood still went on"
    assert streamed.converses("a").run
    assert at_home(streamed) == 100


def test_if_all_of_it_does_not_fit_the_newcomer_is_refused_and_nothing_moves(streamed: Stage) -> None:
    before = streamed.picture()
    assert streamed.registers("c", LARGE, context=10).refusal.code is RefusalCode.CAP
    assert streamed.picture() == before
    assert streamed.registers("d", LARGE, context=51).refusal.code is RefusalCode.NEVER


def test_when_the_last_whose_weights_stay_leaves_they_may_go_home_again(streamed: Stage) -> None:
    the_trainer_leaves(streamed)
    streamed.has("c", LARGE, context=10)
    assert streamed.unregisters("c").is_done
    assert (record(streamed).firm, placed(streamed)) == (False, WHOLE)
    streamed.reserves("trainer", 80)
    streamed.settle()
    assert streamed.converses("a").run
    assert placed(streamed) == LEAST


def test_weights_loaded_for_somebody_who_left_get_a_home_when_only_best_effort_agents_are_left(given: Given) -> None:
    stage = given(cap=150, **SLOW)
    stage.has("c", LARGE, context=10)
    stage.has("a", LARGE, context=40, kind="best_effort")
    assert at_home(stage) == 0
    stage.unregisters("c")
    assert (at_home(stage), stage.engine.homes) == (100, set()), "booked: they go there when they are placed"
    trainer = stage.reserves("trainer", 70)
    assert stage.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=False)]
    stage.settle()
    assert trainer.reservation
    assert stage.converses("a").run
    assert (placed(stage), stage.engine.homes) == (part(1), {LARGE.id})


# --- lent memory, taken back and lent again -----------------------------------------------------------------------------


@pytest.fixture
def roomy(given: Given) -> Stage:
    """140 bytes, all of them lent to one model and its pool."""
    stage = given(cap=140, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    stage.converses("a")
    assert (placed(stage), stage.booked) == (WHOLE, 140)
    return stage


def test_another_task_takes_lent_memory_back_and_the_next_turn_makes_do_with_less(roomy: Stage) -> None:
    call = roomy.reserves("trainer", 50)
    roomy.settle()
    assert call.reservation
    turn = roomy.asks("a")
    roomy.brings_on(turn)
    assert placed(roomy) == part(2)
    assert lines(roomy) == {Kind.EXTERNAL: 50, Kind.WEIGHTS: 30, Kind.RING: 20, Kind.CONTEXT: 40}
    roomy.finished(turn)
    roomy.releases(call.reservation)
    roomy.converses("a")
    assert placed(roomy) == WHOLE, "and of what becomes free again, more comes"


def test_a_running_turn_stands_still_while_its_model_is_made_smaller_for_another_task(roomy: Stage) -> None:
    turn = roomy.asks("a")
    call = roomy.reserves("trainer", 50)
    assert turn.pausing
    roomy.settle()
    assert (bool(call.reservation), bool(turn.endings), placed(roomy)) == (True, True, part(2))


def test_so_does_one_for_a_guaranteed_newcomer(given: Given) -> None:
    stage = given(cap=200, **SLOW)
    stage.has("a", LARGE, context=40, kind="best_effort")
    turn = stage.asks("a")
    stage.brings_on(turn)
    assert placed(stage) == WHOLE
    tiny = model("tiny", weights=20)
    call = stage.registers("g", tiny, context=80, kind="guaranteed")
    assert turn.pausing
    stage.settle()
    assert call.is_admitted
    assert (bool(turn.endings), placed(stage), stage.booked) == (True, part(3), 200)


def test_what_is_lent_can_be_taken_back_down_to_the_promise_and_not_a_byte_further(roomy: Stage) -> None:
    assert roomy.reserves("trainer", 71).refusal.code is RefusalCode.CAP
    call = roomy.reserves("trainer", 70)
    roomy.settle()
    assert call.reservation
    assert roomy.converses("a").run
    assert placed(roomy) == LEAST


def test_where_strangers_come_idle_weights_go_home_and_come_back_as_much_as_fits(roomy: Stage) -> None:
    roomy.reads_device(strangers=1)
    assert [type(work).__name__ for work in roomy.engine.todo] == ["LeaveSeat"]
    roomy.settle()
    assert record(roomy).state is ModelState.RESIDENT
    roomy.reads_device(strangers=41)
    assert roomy.engine.todo == [actions.UnloadModel(LARGE.id, keep_home=True)]
    roomy.settle()
    assert roomy.converses("a").run
    assert placed(roomy) == part(2)
    roomy.reads_device()
    assert roomy.converses("a").run
    assert placed(roomy) == WHOLE


def test_many_who_join_bring_slots_in_place_of_layers(given: Given) -> None:
    stage = given(cap=100, **SLOW)
    stage.has("a", LARGE, context=20, slots=3, kind="best_effort")
    stage.converses("a")
    assert (placed(stage), lines(stage)[Kind.CONTEXT]) == (part(5), 20)
    for agent in "bc":
        stage.has(agent, LARGE, context=20, slots=3, kind="best_effort")
    with stage.at_once():
        turns = [stage.asks(agent) for agent in "abc"]
    for turn in turns:
        stage.brings_on(turn)
    assert all(turn.runs for turn in turns)
    assert (placed(stage), lines(stage)[Kind.CONTEXT]) == (part(1), 60)
    stage.settle()
    assert stage.converses("a").run
    assert placed(stage) == part(5), "and one who is alone with it has more layers again"


def test_a_step_that_was_measured_to_take_long_needs_fewer_layers(roomy: Stage) -> None:
    trainer = roomy.reserves("trainer", 50)
    roomy.settle()
    roomy.converses("a")
    assert placed(roomy) == part(2)
    roomy.releases(trainer.reservation)
    turn = roomy.asks("a")
    roomy.closed("a")
    roomy.unloaded(LARGE.id, step_s=5.5)
    assert roomy.engine.todo == [actions.LoadModel(LARGE, part(4))], "of 5.5 s of computation, the link needs 5"
    roomy.settle()
    assert turn.endings
    assert roomy.converses("a").evidence == (None, False, 0)


# --- a law --------------------------------------------------------------------------------------------------------------


@for_any(
    st.integers(60, 400), st.sampled_from([0, 3, 9]), st.integers(1, 4), st.sampled_from([1.0, 10.0, 1e9]),
    st.sampled_from([None, 0.01, 3.0, 30.0]),
)  # fmt: skip
def test_who_asks_again_where_nothing_changed_finds_all_as_it_was(
    cap: int, layers: int, slots: int, link: float, step_s: float | None
) -> None:
    """With several agents it may move: when few of them are left to decode, layers are worth more than slots."""
    with stages() as given:
        stage = given(cap=cap, home_bytes=1000, link_bytes_per_s=link)
        if stage.registers("a", model("some", layers=layers), context=20, slots=slots, kind="best_effort").is_refused:
            return
        stage.converses("a")
        for _ in range(2):
            assert stage.asks("a").runs
            stage.settle()
        stage.reserves("trainer", 30)
        stage.settle()
        turn = stage.asks("a")
        while turn.waits:
            work = stage.engine.todo[0]
            if isinstance(work, actions.UnloadModel):
                stage.unloaded(work.model_id, step_s=step_s)
            else:
                stage.does(work)
        stage.settle()
        assert stage.asks("a").runs
        stage.settle()


class Company:
    """Best-effort agents of a few models, and an engine whose answers come in random order. All randomness is `chance`'s."""

    def __init__(self, given: Given, chance: random.Random) -> None:
        self.random = pick = chance
        models = [
            model(f"m{n}", weights=pick.choice([100, 200]), layers=pick.choice([3, 9, 9, 0]))
            for n in range(pick.choice([1, 2, 2, 3]))
        ]
        self.stage = given(
            cap=pick.choice([120, 150, 250, 400, 600]), live_contexts=pick.choice([1, 2, None]), home_bytes=10000,
            link_bytes_per_s=pick.choice([1.0, 10.0, 1e9]), min_turn_s=pick.choice([0.0, 1.0]),
        )  # fmt: skip
        for n in range(pick.randint(1, 6)):
            self.stage.registers(
                f"agent-{n}", pick.choice(models), context=pick.choice([10, 20, 40]), slots=pick.choice([1, 2, 4]),
                ladder=pick.choice([(), (5,)]), kind="best_effort", kv_type=pick.choice(["f16", "f16", "q8_0"]),
            )  # fmt: skip
        self.step_s = pick.choice([None, 0.01, 3.0, 30.0])

    def all_ask(self) -> int:
        """Returns how often weights came before all had their turns."""
        stage, before, steps = self.stage, len(self.stage.history), 0
        turns = [stage.asks(agent) for agent in stage.agents]
        while stage.engine.todo:
            steps += 1
            assert steps < 500, "the engine goes round in circles"
            work = stage.engine.todo[0] if self.random.random() < 0.7 else self.random.choice(stage.engine.todo)
            if isinstance(work, actions.UnloadModel):
                stage.unloaded(work.model_id, step_s=self.step_s)
            else:
                stage.does(work)
            stage.at += self.random.choice([0.0, 0.3])
        assert all(turn.endings for turn in turns)
        return sum(isinstance(event, events.ModelLoaded) for event in stage.history[before:])


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_whatever_they_share_all_have_their_turns_and_weights_do_not_go_back_and_forth(first: int) -> None:
    for seed in range(first, first + 20):
        with stages() as given:
            company = Company(given, random.Random(seed))
            pools = {agent.pool for agent in company.stage.state.agents.values()}
            for _ in range(3):
                assert company.all_ask() <= 3 * len(pools), f"seed {seed}"

"""What holds of every plan, whatever the moment: hypothesis draws it. See also: `test_turns.py`, the rules one by one."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from conductor.core.events import TurnId
from conductor.core.sessions import Phase
from conductor.core.turns import Close, Load, Occupant, Open, Park, Start, Step, WaitingTurn, Weights
from conductor.types import AgentId, ModelId, ModelState
from tests.support.moments import all_models, firm, live, loose, plan, turn

MODELS = "mnopq"
BYTES = st.sampled_from([0, 10, 30, 60, 100])
AT_REST = (ModelState.PARKED, ModelState.RESIDENT)


@dataclass(frozen=True)
class Moment:
    waiting: list[WaitingTurn]
    places: list[Occupant]
    models: list[Weights]
    live_contexts: int
    room: int

    @property
    def steps(self) -> list[Step]:
        return plan(self.waiting, self.places, self.models, live_contexts=self.live_contexts, room=self.room)

    @property
    def turning(self) -> list[Occupant]:
        return [place for place in self.places if not place.guaranteed]

    @property
    def first(self) -> dict[AgentId, WaitingTurn]:
        """The turns that the plan decides about: of each agent the first, unless it waits for something else."""
        first: dict[AgentId, WaitingTurn] = {}
        for waiter in self.waiting:
            first.setdefault(waiter.agent_id, waiter)
        return {agent: waiter for agent, waiter in first.items() if not waiter.blocked}

    def weights(self, model: ModelId) -> Weights:
        return all_models(self.waiting, self.places, self.models)[model]

    def in_use(self) -> int:
        weights = [it.bytes for it in self.models if not it.firm and it.state is not ModelState.PARKED]
        return sum(place.bytes for place in self.turning) + sum(weights)


@st.composite
def moments(draw: st.DrawFn, *, at_rest: bool = False) -> Moment:
    """A legal moment: at most one context a model besides those of guaranteed agents, and none without its weights.

    `at_rest`: nothing is on its way, and nobody is busy.
    """
    live_contexts, room = draw(st.integers(1, 4)), draw(st.integers(0, 400))
    occupied = draw(st.lists(st.sampled_from(MODELS), unique=True, max_size=live_contexts))
    phases = st.just(Phase.READY) if at_rest else st.sampled_from(Phase)
    places = [
        live(
            f"{model}{draw(st.integers(0, 2))}",
            model,
            draw(phases),
            last_turn=draw(st.integers(0, 9)),
            bytes=draw(BYTES),
            window=draw(BYTES),
            best_effort=draw(st.booleans()),
        )
        for model in occupied
    ]
    guaranteed = draw(st.lists(st.sampled_from(MODELS), unique=True, max_size=2))
    ready_or_busy = st.just(Phase.READY) if at_rest else st.sampled_from([Phase.READY, Phase.BUSY])
    places += [live(f"{model}g", model, draw(ready_or_busy), bytes=draw(BYTES), guaranteed=True) for model in guaranteed]
    models = [
        firm(model)
        if model in guaranteed or draw(st.booleans())
        else loose(
            model,
            ModelState.RESIDENT if model in occupied else draw(st.sampled_from(AT_REST if at_rest else list(ModelState))),
            bytes=draw(BYTES),
            last_turn=draw(st.integers(0, 9)),
        )
        for model in MODELS
    ]
    agents = [f"{model}{i}" for model in MODELS for i in range(3)] + [f"{model}g" for model in guaranteed]
    waiting = [
        turn(id, agent, agent[0], bytes=draw(BYTES), window=draw(BYTES), blocked=draw(st.integers(0, 9)) == 0)
        for id, agent in enumerate(draw(st.lists(st.sampled_from(agents), max_size=8)))
    ]
    return Moment(waiting, places, models, live_contexts, room)


@given(moments())
def test_places_and_models_are_never_taken_twice(moment: Moment) -> None:
    opened = [moment.first[step.agent_id].model_id for step in moment.steps if isinstance(step, Open)]
    taken = [*(place.model_id for place in moment.turning), *opened]
    assert len(taken) <= moment.live_contexts
    assert len(set(taken)) == len(taken)


@given(moments())
def test_no_byte_is_given_twice(moment: Moment) -> None:
    steps = moment.steps
    taken = sum(moment.first[step.agent_id].context_bytes for step in steps if isinstance(step, Open))
    taken += sum(moment.weights(step.model_id).bytes for step in steps if isinstance(step, Load))
    assert not taken or moment.in_use() + taken <= moment.room


@given(moments())
def test_no_agent_and_no_model_gets_two_steps_and_each_is_one_it_can_take(moment: Moment) -> None:
    steps = moment.steps
    subjects = [step.model_id if isinstance(step, (Load, Park)) else step.agent_id for step in steps]
    assert len(set(subjects)) == len(subjects)
    phases = {place.agent_id: place.phase for place in moment.places}
    for step in steps:
        match step:
            case Start(_, agent):
                assert phases[agent] is Phase.READY
            case Close(agent):
                assert phases[agent] is Phase.READY
                assert agent in {place.agent_id for place in moment.turning}, "a guaranteed agent's"
            case Open(_, agent):
                assert agent not in phases
                assert moment.weights(moment.first[agent].model_id).state is ModelState.RESIDENT
            case Load(model):
                assert moment.weights(model).state is ModelState.PARKED
            case Park(model):
                assert moment.weights(model).state is ModelState.RESIDENT
                assert not moment.weights(model).firm
                assert model not in {place.model_id for place in moment.turning}
                assert model not in {moment.first[it.agent_id].model_id for it in steps if isinstance(it, Open)}


@given(moments())
def test_each_step_is_for_the_first_waiting_turn_of_its_agent(moment: Moment) -> None:
    turns = {waiter.id for waiter in moment.first.values()}
    for step in moment.steps:
        if isinstance(step, Close):
            assert step.for_turn in turns
        elif isinstance(step, (Start, Open)):
            assert step.turn_id == moment.first[step.agent_id].id


@given(moments())
def test_a_turn_starts_only_in_a_window_that_it_can_go_on_in(moment: Moment) -> None:
    windows = {place.agent_id: place.window for place in moment.turning}
    for step in moment.steps:
        if isinstance(step, Start) and step.agent_id in windows:
            assert windows[step.agent_id] >= moment.first[step.agent_id].window


@given(moments())
def test_a_guaranteed_agents_turn_starts_if_its_context_is_ready_whatever_else_there_is(moment: Moment) -> None:
    ready = {place.agent_id for place in moment.places if place.guaranteed and place.phase is Phase.READY}
    started = {step.agent_id for step in moment.steps if isinstance(step, Start)}
    assert ready & moment.first.keys() <= started


@given(moments(at_rest=True))
def test_where_nothing_is_on_its_way_and_somebody_fits_something_is_done(moment: Moment) -> None:
    """Nobody waits for an engine that has nothing to do."""

    def fits(waiter: WaitingTurn) -> bool:
        weights = moment.weights(waiter.model_id)
        return waiter.context_bytes + (0 if weights.firm else weights.bytes) <= moment.room

    assert moment.steps or not any(fits(waiter) for waiter in moment.first.values())


@given(moments())
def test_with_places_and_bytes_for_all_only_its_own_model_makes_a_context_close(moment: Moment) -> None:
    roomy = Moment(moment.waiting, moment.places, moment.models, live_contexts=99, room=10**9)
    model_of = {waiter.id: waiter.model_id for waiter in moment.waiting}
    for step in roomy.steps:
        assert not isinstance(step, Park)
        if isinstance(step, Close):
            assert step.for_turn is not None
            (place,) = (place for place in moment.turning if place.agent_id == step.agent_id)
            assert place.model_id == model_of[step.for_turn]


@given(moments())
def test_of_what_is_idle_the_best_effort_part_goes_first(moment: Moment) -> None:
    """A shared agent's context closes for another model's turn only if no best-effort agent's that is idle could stay."""
    steps = moment.steps
    places = {place.agent_id: place for place in moment.turning}
    touched = {step.agent_id for step in steps if not isinstance(step, (Load, Park))}
    model_of = {waiter.id: waiter.model_id for waiter in moment.waiting}

    def is_eviction(step: Step) -> bool:
        return isinstance(step, Close) and places[step.agent_id].model_id != model_of[_turn(step)]

    if any(is_eviction(step) and not places[step.agent_id].best_effort for step in steps if isinstance(step, Close)):
        spared = [p for p in moment.turning if p.best_effort and p.phase is Phase.READY and p.agent_id not in touched]
        assert not spared


def _turn(step: Close) -> TurnId:
    assert step.for_turn is not None
    return step.for_turn

"""What holds of every plan, whatever the moment: hypothesis draws it.

See also: `test_turns.py` and `test_turns_pools.py`, the rules one by one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from conductor.core.events import TurnId
from conductor.core.moment import (
    Drain,
    Leave,
    LivePool,
    Load,
    Open,
    Park,
    Pause,
    Prospect,
    Sitter,
    Start,
    Step,
    Take,
    WaitingTurn,
    Weights,
)  # fmt: skip
from conductor.core.pools import PoolPhase
from conductor.core.sessions import Phase
from conductor.types import AgentId, ModelId, ModelState, PoolId
from tests.support.moments import Place, firm, loose, picture, plan, pool, runs, shapes, sits, turn

MODELS = "mnop"
#: an agent's name is its pool's and a digit, a pool's its model's and perhaps a dash
POOLS = ["m", "m'", "n", "n'", "o", "p"]
WINDOWS = st.sampled_from([10, 30, 60, 100])
SLOTS = st.integers(1, 3)
AT_REST = (ModelState.PARKED, ModelState.RESIDENT)


@dataclass(frozen=True)
class Moment:
    waiting: list[WaitingTurn]
    places: list[Place]
    models: list[Weights]
    live_contexts: int
    room: int
    prospects: dict[str, Prospect]

    @property
    def steps(self) -> list[Step]:
        return plan(
            self.waiting, self.places, self.models,
            live_contexts=self.live_contexts, room=self.room, prospects=self.prospects,
        )  # fmt: skip

    @property
    def turning(self) -> dict[PoolId, LivePool]:
        return {place.pool.id: place.pool for place in self.places if not place.pool.guaranteed}

    @property
    def sitters(self) -> dict[AgentId, Sitter]:
        return {sitter.agent_id: sitter for place in self.places for sitter in place.sitters}

    @property
    def running(self) -> dict[TurnId, Sitter]:
        return {sitter.turn_id: sitter for sitter in self.sitters.values() if sitter.turn_id is not None}

    @property
    def first(self) -> dict[AgentId, WaitingTurn]:
        """The turns that the plan decides about: of each agent the first, unless it waits for something else."""
        first: dict[AgentId, WaitingTurn] = {}
        for waiter in self.waiting:
            first.setdefault(waiter.agent_id, waiter)
        return {agent: waiter for agent, waiter in first.items() if not waiter.blocked}

    @property
    def turns(self) -> dict[TurnId, WaitingTurn]:
        return {waiter.id: waiter for waiter in self.first.values()}

    def sitters_of(self, pool: PoolId) -> list[Sitter]:
        return [sitter for sitter in self.sitters.values() if sitter.pool == pool]

    def weights(self, model: ModelId) -> Weights:
        return picture(self.waiting, self.places, self.models).models[model]

    def in_use(self) -> int:
        weights = [it.bytes for it in self.models if not it.firm and it.state is not ModelState.PARKED]
        return sum(pool.bytes for pool in self.turning.values()) + sum(weights)


# --- how moments are drawn ----------------------------------------------------------------------------------------------


@st.composite
def places_of(draw: st.DrawFn, name: str, ids: itertools.count[int], *, at_rest: bool) -> Place:
    """A legal pool: nobody sits in it before it is there, and whoever still sits in it while it is emptied is on its way out."""
    phase = PoolPhase.READY if at_rest else draw(st.sampled_from(PoolPhase))
    slots, agents = draw(SLOTS), [f"{name}{i}" for i in range(3)]
    there = phase in (PoolPhase.READY, PoolPhase.DRAINING)
    names = draw(st.lists(st.sampled_from(agents), unique=True, max_size=slots)) if there else []
    sitters = [draw(sitters_of(name, ids, phase=phase, at_rest=at_rest)) for name in names]
    return pool(
        name[0], *sitters, name=name, phase=phase, bytes=draw(WINDOWS), window=draw(WINDOWS), slots=slots, up_to=draw(SLOTS),
        settled=at_rest or draw(st.booleans()),
    )  # fmt: skip


@st.composite
def sitters_of(draw: st.DrawFn, name: str, ids: itertools.count[int], *, phase: PoolPhase, at_rest: bool) -> Sitter:
    leaving = phase is PoolPhase.DRAINING
    how = Phase.READY if at_rest else draw(st.sampled_from([Phase.BUSY, Phase.LEAVING] if leaving else Phase))
    last_turn, best_effort = draw(st.integers(0, 9)), draw(st.booleans())
    if how is not Phase.BUSY:
        return sits(name, how, last_turn=last_turn, best_effort=best_effort)
    return runs(
        next(ids), name, priority=draw(st.integers(0, 2)), served=draw(st.integers(0, 2)),
        may_pause=draw(st.booleans()), pausing=leaving or draw(st.booleans()), last_turn=last_turn, best_effort=best_effort,
    )  # fmt: skip


@st.composite
def moments(draw: st.DrawFn, *, at_rest: bool = False) -> Moment:
    """`at_rest`: nothing is on its way, and nobody is busy."""
    ids = itertools.count(100)
    live_contexts, room = draw(st.integers(1, 4)), draw(st.integers(0, 500))
    occupied = draw(st.lists(st.sampled_from(POOLS), unique=True, max_size=live_contexts))
    under = {name[0] for name in occupied}
    places = [draw(places_of(name, ids, at_rest=at_rest)) for name in occupied]
    guaranteed = draw(st.lists(st.sampled_from(MODELS), unique=True, max_size=2))
    for model in guaranteed:
        busy = not at_rest and draw(st.booleans())
        sitter = runs(next(ids), f"{model}g") if busy else sits(f"{model}g")
        places.append(pool(model, sitter, bytes=draw(WINDOWS), window=draw(WINDOWS), guaranteed=True))
    models = [
        firm(model)
        if model in guaranteed or draw(st.booleans())
        else loose(
            model,
            ModelState.RESIDENT if model in under else draw(st.sampled_from(AT_REST if at_rest else list(ModelState))),
            bytes=draw(WINDOWS),
            last_turn=draw(st.integers(0, 9)),
        )
        for model in MODELS
    ]
    agents = [f"{name}{i}" for name in POOLS for i in range(3)] + [f"{model}g" for model in guaranteed]
    waiting = draw(st.lists(st.sampled_from(agents), max_size=8).flatmap(lambda names: lines(tuple(names))))
    prospects = {name: Prospect(draw(st.integers(1, 4)), draw(WINDOWS)) for name in POOLS}
    return Moment(waiting, places, models, live_contexts, room, prospects)


@st.composite
def lines(draw: st.DrawFn, agents: tuple[str, ...]) -> list[WaitingTurn]:
    """In order of precedence; a window's bytes are its tokens."""
    rank = {agent: (draw(st.integers(0, 2)), draw(st.integers(0, 2))) for agent in agents}
    found = []
    for id, agent in enumerate(agents):
        window, (priority, served) = draw(WINDOWS), rank[agent]
        tokens, slots, blocked = draw(st.integers(0, window)), draw(SLOTS), draw(st.integers(0, 9)) == 0
        found.append(
            turn(
                id, agent, agent[0], bytes=window, slots=slots, window=window, tokens=tokens, priority=priority, served=served,
                blocked=blocked, pool=agent[:-1],
            )
        )  # fmt: skip
    return sorted(found, key=lambda waiter: waiter.rank)


# --- nothing is given twice ---------------------------------------------------------------------------------------------


@given(moments())
def test_no_place_and_no_pool_is_given_twice(moment: Moment) -> None:
    opened = [moment.turns[step.turn_id].pool for step in moment.steps if isinstance(step, Open)]
    taken = [*moment.turning, *opened]
    assert len(taken) <= moment.live_contexts
    assert len(set(taken)) == len(taken)


@given(moments())
def test_no_slot_is_given_twice(moment: Moment) -> None:
    taken = Counter(moment.first[step.agent_id].pool for step in moment.steps if isinstance(step, Take))
    for id, count in taken.items():
        assert len(moment.sitters_of(id)) + count <= moment.turning[id].slots


@given(moments())
def test_no_byte_is_given_twice(moment: Moment) -> None:
    steps = moment.steps
    taken = sum(dict(step.shapes)[step.slots] for step in steps if isinstance(step, Open))
    taken += sum(moment.weights(step.model_id).bytes for step in steps if isinstance(step, Load))
    assert not taken or moment.in_use() + taken <= moment.room


@given(moments())
def test_nobody_and_nothing_gets_two_steps(moment: Moment) -> None:
    subjects = [
        (step.model_id,) if isinstance(step, (Load, Park))
        else ("pool", step.pool) if isinstance(step, Drain)
        else ("turn", step.turn_id) if isinstance(step, Pause)
        else ("agent", step.agent_id)
        for step in moment.steps
    ]  # fmt: skip
    assert len(set(subjects)) == len(subjects)


# --- each step is one that its subject can take -------------------------------------------------------------------------


@given(moments())
def test_each_step_is_one_that_its_subject_can_take(moment: Moment) -> None:
    steps, sitters, pools = moment.steps, moment.sitters, moment.turning
    drained = {step.pool for step in steps if isinstance(step, Drain)}
    opened = {moment.turns[step.turn_id].model_id for step in steps if isinstance(step, Open)}
    for step in steps:
        match step:
            case Start(_, agent):
                assert sitters[agent].phase is Phase.READY
                assert sitters[agent].pool not in drained
            case Take(_, agent):
                assert agent not in sitters
                assert pools[moment.first[agent].pool].phase is PoolPhase.READY
                assert moment.first[agent].pool not in drained
            case Leave(agent):
                assert sitters[agent].phase is Phase.READY
                assert pools[sitters[agent].pool].phase is PoolPhase.READY
            case Pause(turn_id):
                assert moment.running[turn_id].may_pause
                assert not moment.running[turn_id].pausing
            case Drain(pool):
                assert pools[pool].phase is PoolPhase.READY
            case Open(turn_id, _, window, slots, offered):
                assert moment.weights(moment.turns[turn_id].model_id).state is ModelState.RESIDENT
                assert window >= moment.turns[turn_id].tokens
                assert slots in dict(offered)
            case Load(model):
                assert moment.weights(model).state is ModelState.PARKED
            case Park(model):
                assert moment.weights(model).state is ModelState.RESIDENT
                assert not moment.weights(model).firm
                assert model not in {pool.model_id for pool in pools.values()} | opened


@given(moments())
def test_each_step_is_for_the_first_waiting_turn_of_its_agent(moment: Moment) -> None:
    for step in moment.steps:
        if isinstance(step, (Leave, Drain)):
            assert step.for_turn in moment.turns
        elif isinstance(step, (Start, Take, Open)):
            assert step.turn_id == moment.first[step.agent_id].id


@given(moments())
def test_a_turn_starts_and_its_agent_sits_down_only_in_a_window_that_it_can_go_on_in(moment: Moment) -> None:
    for step in moment.steps:
        if isinstance(step, (Start, Take)) and (there := moment.turning.get(moment.first[step.agent_id].pool)):
            guaranteed = step.agent_id.endswith("g")
            assert guaranteed or there.window >= moment.first[step.agent_id].tokens


# --- everybody gets what there is ---------------------------------------------------------------------------------------


@given(moments())
def test_a_guaranteed_agents_turn_starts_if_its_seat_is_ready_whatever_else_there_is(moment: Moment) -> None:
    ready = {id for id, sitter in moment.sitters.items() if id.endswith("g") and sitter.phase is Phase.READY}
    started = {step.agent_id for step in moment.steps if isinstance(step, Start)}
    assert ready & moment.first.keys() <= started


@given(moments())
def test_no_seat_stays_free_while_somebody_waits_for_one(moment: Moment) -> None:
    steps = moment.steps
    drained = {step.pool for step in steps if isinstance(step, Drain)}
    for id, there in moment.turning.items():
        if there.phase is PoolPhase.READY and id not in drained:
            free = there.slots - len(moment.sitters_of(id))
            standing = [it for it in moment.first.values() if it.pool == id and it.agent_id not in moment.sitters]
            suited = [it for it in standing if it.tokens <= there.window and not it.agent_id.endswith("g")]
            took = [step for step in steps if isinstance(step, Take) and moment.first[step.agent_id].pool == id]
            assert len(took) == min(free, len(suited))


@given(moments(at_rest=True))
def test_where_nothing_is_on_its_way_and_somebody_fits_something_is_done(moment: Moment) -> None:
    """Nobody waits for an engine that has nothing to do."""

    def fits(waiter: WaitingTurn) -> bool:
        weights = moment.weights(waiter.model_id)
        return waiter.shapes[0][1] + (0 if weights.firm else weights.bytes) <= moment.room

    assert moment.steps or not any(fits(waiter) for waiter in moment.first.values())


# --- nobody makes way in vain -------------------------------------------------------------------------------------------


@given(moments())
def test_with_places_and_bytes_for_all_a_pool_goes_only_to_be_made_anew(moment: Moment) -> None:
    for step in replace(moment, live_contexts=99, room=10**9).steps:
        assert not isinstance(step, Park)
        if isinstance(step, Drain):
            assert step.for_turn is not None
            assert moment.turns[step.for_turn].pool == step.pool


@given(moments())
def test_of_what_is_idle_the_best_effort_part_goes_first(moment: Moment) -> None:
    """A pool with a shared agent goes for another model's turn only if no idle one without could stay."""
    steps = moment.steps
    touched = {step.pool for step in steps if isinstance(step, Drain)}
    touched |= {moment.sitters[step.agent_id].pool for step in steps if isinstance(step, (Start, Leave))}
    touched |= {moment.first[step.agent_id].pool for step in steps if isinstance(step, Take)}

    def is_best_effort(pool: PoolId) -> bool:
        return all(sitter.best_effort for sitter in moment.sitters_of(pool))

    if any(not is_best_effort(step.pool) and _is_for_another(moment, step) for step in steps if isinstance(step, Drain)):
        for id, there in moment.turning.items():
            idle = all(sitter.phase is Phase.READY for sitter in moment.sitters_of(id))
            spared = there.phase is PoolPhase.READY and there.settled and idle and id not in touched
            assert not (spared and is_best_effort(id))


@given(moments())
def test_no_turn_stands_still_for_one_that_does_not_rank_higher(moment: Moment) -> None:
    for step in moment.steps:
        if isinstance(step, Pause):
            sitter = moment.running[step.turn_id]
            assert any(it.pool == sitter.pool and it.rank < sitter.rank for it in moment.first.values())


@given(moments())
def test_no_pool_goes_for_a_turn_that_ranks_lower_than_those_in_it_unless_they_all_go_on_in_the_new_one(moment: Moment) -> None:
    for step in moment.steps:
        if isinstance(step, Drain) and step.for_turn is not None:
            pool, turn = moment.turning[step.pool], moment.turns[step.for_turn]
            inside = [sitter for sitter in moment.sitters_of(step.pool) if sitter.phase is Phase.BUSY]
            assert all(sitter.may_pause or sitter.pausing for sitter in inside)
            for_all = [bytes for slots, bytes in (*turn.shapes, *pool.shapes) if slots >= pool.slots]
            goes_on = turn.pool == pool.id and any(bytes <= moment.room for bytes in for_all)
            assert goes_on or all(sitter.rank > turn.rank for sitter in inside)


@given(moments())
def test_no_pool_goes_for_a_turn_that_ranks_lower_than_one_that_waits_for_a_seat_in_it(moment: Moment) -> None:
    """Somebody is on its way to it: the seat has been cleared."""
    for step in moment.steps:
        if isinstance(step, Drain) and _is_for_another(moment, step):
            assert step.for_turn is not None
            line = list(moment.turns.values())
            before = line[: line.index(moment.turns[step.for_turn])]
            assert not any(
                isinstance(other, (Leave, Pause))
                and any(it.pool == step.pool and _is_for(other, it, moment) for it in before)
                for other in moment.steps
            )  # fmt: skip


def _is_for(step: Leave | Pause, turn: WaitingTurn, moment: Moment) -> bool:
    if isinstance(step, Leave):
        return step.for_turn == turn.id
    return moment.running[step.turn_id].pool == turn.pool


def _is_for_another(moment: Moment, step: Drain) -> bool:
    return step.for_turn is not None and moment.turns[step.for_turn].pool != step.pool


def test_a_moments_shapes_cost_a_windows_bytes_for_each_slot() -> None:
    assert shapes(30, 3) == ((1, 30), (2, 60), (3, 90))

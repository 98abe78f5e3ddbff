"""What leaves the device when somebody needs its room: in which order, and how much of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conductor.core.sessions import Phase
from conductor.core.turns import Close, Occupant, Park, Step, Weights, plan_eviction
from conductor.types import AgentId, ModelState
from tests.support.moments import all_models, close, live, loose, park


def evict(bytes: int, places: list[Occupant], models: list[Weights] | None = None, *, last: tuple[str, ...] = ()) -> list[Step]:
    idle = frozenset(AgentId(agent) for agent in last)
    return plan_eviction(places, all_models((), places, models or []), bytes=bytes, last=idle)


def closed(agent: str) -> Close:
    return close(agent, for_turn=None)


def test_nothing_leaves_for_nothing() -> None:
    assert evict(0, [live("a", "m", bytes=10)]) == []
    assert evict(-5, [live("a", "m", bytes=10)]) == []


def test_as_much_leaves_as_brings_the_bytes_and_no_more() -> None:
    places = [live(name, name, bytes=30, last_turn=i) for i, name in enumerate("abc")]
    assert evict(30, places) == [closed("a")]
    assert evict(31, places) == [closed("a"), closed("b")]
    assert evict(1000, places) == [closed("a"), closed("b"), closed("c")]


def test_what_was_used_longest_ago_leaves_first() -> None:
    places = [live("a", "m", bytes=10, last_turn=3), live("b", "n", bytes=10, last_turn=1), live("c", "o", bytes=10, last_turn=2)]
    assert evict(15, places) == [closed("b"), closed("c")]


def test_best_effort_agents_contexts_and_weights_leave_before_shared_agents_contexts() -> None:
    places = [
        live("shared", "m", bytes=10, last_turn=1),
        live("best", "n", bytes=10, last_turn=8, best_effort=True),
    ]
    assert evict(25, places, [loose("o", bytes=10, last_turn=9)]) == [closed("best"), park("o"), closed("shared")]


def test_whoever_has_a_turn_in_line_keeps_its_context_if_others_suffice() -> None:
    places = [
        live("wanted", "m", bytes=10, last_turn=1, best_effort=True),
        live("idle", "n", bytes=10, last_turn=2),
    ]
    assert evict(10, places, last=("wanted",)) == [closed("idle")]
    assert evict(11, places, last=("wanted",)) == [closed("idle"), closed("wanted")]


def test_what_is_leaving_already_counts() -> None:
    places = [live("a", "m", Phase.CLOSING, bytes=30), live("b", "n", bytes=30)]
    models = [loose("o", ModelState.UNLOADING, bytes=20)]
    assert evict(50, places, models) == []
    assert evict(51, places, models) == [closed("b")]


def test_what_is_busy_or_on_its_way_in_stays() -> None:
    places = [live("a", "m", Phase.BUSY, bytes=30), live("b", "n", Phase.OPENING, bytes=30)]
    assert evict(10, places, [loose("o", ModelState.LOADING)]) == []


def test_weights_under_a_context_stay_until_it_is_gone() -> None:
    models = [loose("m", bytes=60)]
    assert evict(100, [live("a", "m", bytes=30, best_effort=True)], models) == [closed("a")]
    assert evict(30, [live("a", "m", Phase.CLOSING, bytes=30)], models) == []
    assert evict(60, [], models) == [park("m")]


def test_weights_that_will_be_idle_once_their_context_is_gone_leave_before_a_shared_agents_context() -> None:
    places = [live("best", "m", bytes=10, last_turn=1, best_effort=True), live("shared", "n", bytes=50, last_turn=2)]
    assert evict(50, places, [loose("m", bytes=60)]) == [closed("best")]


def test_what_is_guaranteed_or_firm_stays() -> None:
    assert evict(10, [live("g", "m", bytes=100, guaranteed=True)]) == []


sizes = st.integers(0, 50)


@given(
    need=st.integers(0, 300),
    places=st.lists(st.tuples(st.sampled_from(Phase), sizes, st.integers(0, 9), st.booleans(), st.booleans()), max_size=6),
    weights=st.lists(st.tuples(st.sampled_from(ModelState), sizes, st.integers(0, 9)), max_size=4),
)
def test_enough_leaves_if_there_is_enough_and_each_that_leaves_is_needed(
    need: int,
    places: list[tuple[Phase, int, int, bool, bool]],
    weights: list[tuple[ModelState, int, int]],
) -> None:
    occupants = [
        live(f"a{i}", f"m{i}", phase, bytes=size, last_turn=last_turn, best_effort=best_effort)
        for i, (phase, size, last_turn, best_effort, _) in enumerate(places)
    ]
    models = [loose(f"w{i}", state, bytes=size, last_turn=last_turn) for i, (state, size, last_turn) in enumerate(weights)]
    last = tuple(f"a{i}" for i, place in enumerate(places) if place[-1])
    size_of: dict[str, int] = {it.agent_id: it.bytes for it in occupants}
    size_of |= {it.model_id: it.bytes for it in models}
    coming = sum(it.bytes for it in occupants if it.phase is Phase.CLOSING)
    coming += sum(it.bytes for it in models if it.state is ModelState.UNLOADING)
    idle = [it.bytes for it in occupants if it.phase is Phase.READY]
    idle += [it.bytes for it in models if it.state is ModelState.RESIDENT]

    steps = evict(need, occupants, models, last=last)
    brings = [size_of[_subject(step)] for step in steps]
    assert coming + sum(brings) >= min(need, coming + sum(idle))
    assert all(coming + sum(brings[:i]) < need for i in range(len(brings))), "the last one was not needed"
    if any(_subject(step) in last for step in steps):
        others = {it.agent_id for it in occupants if it.phase is Phase.READY and it.agent_id not in last}
        assert others <= {_subject(step) for step in steps}


def _subject(step: Step) -> str:
    assert isinstance(step, (Close, Park)), step
    return step.agent_id if isinstance(step, Close) else step.model_id

"""The promise kept at admission: what it is made of, and that whoever was admitted can always have its turn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.core.admission import Outcome, Promise, Room, Tenant, decide, promise
from conductor.core.events import TurnFinished
from conductor.types import ModelId, ServiceClass
from tests.support.stories import Stage, model

GUARANTEED, SHARED, BEST_EFFORT = ServiceClass.GUARANTEED, ServiceClass.SHARED, ServiceClass.BEST_EFFORT
WEIGHTS = {"a": 100, "b": 70, "c": 0, "d": 333}


def tenant(kind: ServiceClass, model: str, context: int) -> Tenant:
    return Tenant(kind, ModelId(model), WEIGHTS[model], context)


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_nobody_is_promised_nothing() -> None:
    assert promise([]) == Promise()
    assert (Promise().firm_bytes, Promise().turn_bytes, Promise().total_bytes) == (0, 0, 0)


def test_weights_that_a_guaranteed_or_shared_agent_uses_stay_and_count_once() -> None:
    fleet = [tenant(SHARED, "a", 10), tenant(SHARED, "a", 10), tenant(GUARANTEED, "b", 0), tenant(BEST_EFFORT, "d", 0)]
    assert promise(fleet).weights == {"a": 100, "b": 70}


def test_every_guaranteed_window_stays() -> None:
    assert promise([tenant(GUARANTEED, "a", 30), tenant(GUARANTEED, "a", 50)]).firm_bytes == 100 + 80


def test_of_all_shared_contexts_one_the_largest_counts() -> None:
    fleet = [tenant(SHARED, "a", 30), tenant(SHARED, "a", 20), tenant(SHARED, "b", 50)]
    assert promise(fleet).total_bytes == 170 + 50


def test_a_guaranteed_window_is_no_turn_of_anybody_else() -> None:
    assert promise([tenant(GUARANTEED, "a", 500), tenant(SHARED, "a", 30)]).turn_bytes == 30


def test_a_best_effort_turn_is_its_context_with_the_weights_that_nothing_else_keeps() -> None:
    alone = promise([tenant(BEST_EFFORT, "a", 30)])
    assert (alone.firm_bytes, alone.turn_bytes, alone.shared_turn_bytes) == (0, 130, 0)
    beside_shared = promise([tenant(BEST_EFFORT, "a", 30), tenant(SHARED, "a", 10)])
    assert (beside_shared.firm_bytes, beside_shared.turn_bytes, beside_shared.shared_turn_bytes) == (100, 30, 10)


def test_a_best_effort_agent_and_its_model_count_as_one_turn_of_many() -> None:
    fleet = [tenant(BEST_EFFORT, "a", 30), tenant(BEST_EFFORT, "b", 40), tenant(SHARED, "d", 120)]
    assert promise(fleet).total_bytes == 333 + max(130, 110, 120)


# --- laws -------------------------------------------------------------------------------------------------------------

kinds = st.sampled_from(ServiceClass)
tenants = st.builds(tenant, kinds, st.sampled_from(sorted(WEIGHTS)), st.integers(0, 400))
fleets = st.lists(tenants, max_size=7)


@given(fleets)
def test_it_is_the_worst_case_over_all_single_turns(fleet: list[Tenant]) -> None:
    """Counted from the other end: what is on the device while one agent's turn runs, and that of no other is there."""

    def present(turning: Tenant | None) -> int:
        firm = [it for it in fleet if it.service_class is not BEST_EFFORT]
        models = {it.model_id for it in firm} | ({turning.model_id} if turning else set())
        contexts = [it.context_bytes for it in fleet if it.service_class is GUARANTEED]
        own = turning.context_bytes if turning and turning.service_class is not GUARANTEED else 0
        return sum(WEIGHTS[id] for id in models) + sum(contexts) + own

    assert promise(fleet).total_bytes == max(present(it) for it in (None, *fleet))


@given(fleets, tenants)
def test_it_can_be_kept_up_to_date_one_newcomer_at_a_time(fleet: list[Tenant], newcomer: Tenant) -> None:
    assert promise(fleet).plus(newcomer) == promise([*fleet, newcomer])


@given(fleets, tenants)
def test_a_newcomer_never_lowers_it(fleet: list[Tenant], newcomer: Tenant) -> None:
    before, after = promise(fleet), promise([*fleet, newcomer])
    assert after.total_bytes >= before.total_bytes
    assert after.firm_bytes >= before.firm_bytes
    assert after.shared_turn_bytes >= before.shared_turn_bytes


@given(fleets, tenants, st.randoms(use_true_random=False))
def test_whoever_leaves_gives_back_what_it_added_whoever_came_in_between(
    fleet: list[Tenant], passer_by: Tenant, chance: Random
) -> None:
    stays = [*fleet]
    fleet.insert(chance.randint(0, len(fleet)), passer_by)
    chance.shuffle(fleet)
    fleet.remove(passer_by)
    assert promise(fleet) == promise(stays)


@given(fleets, tenants)
def test_a_stronger_class_never_costs_less(fleet: list[Tenant], newcomer: Tenant) -> None:
    classes = (BEST_EFFORT, SHARED, GUARANTEED)
    asked = [promise([*fleet, replace(newcomer, service_class=kind)]).total_bytes for kind in classes]
    assert asked == sorted(asked)


# --- whoever was admitted can have its turn ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """Tenants admitted by `decide` under a cap, some of whom left."""

    cap: int
    fixed: int
    admitted: list[Tenant]

    @property
    def firm(self) -> int:
        return self.fixed + promise(self.admitted).firm_bytes


@st.composite
def admitted_fleets(draw: st.DrawFn) -> Fleet:
    cap, fixed = draw(st.integers(0, 1200)), draw(st.integers(0, 100))
    fleet = Fleet(cap, fixed, [])
    for newcomer in draw(st.lists(tenants, max_size=12)):
        if fleet.admitted and draw(st.integers(0, 3)) == 0:
            fleet.admitted.pop(draw(st.integers(0, len(fleet.admitted) - 1)))
        before, after = promise(fleet.admitted), promise([*fleet.admitted, newcomer])
        in_use = draw(st.integers(0, before.turn_bytes))
        room = Room(cap, cap, fixed, fleet.firm, before.turn_bytes, in_use)
        decided = decide(room, before=before, after=after, alone=promise([newcomer]))
        fits = fixed + after.total_bytes <= cap
        assert (decided.outcome >= Outcome.EVICT) == fits, "no more and no less than what can be kept is promised"
        if fits:
            fleet.admitted.append(newcomer)
    return fleet


@given(admitted_fleets())
def test_of_an_admitted_fleet_any_single_turn_fits_beside_what_is_firm(fleet: Fleet) -> None:
    for it in fleet.admitted:
        stays = promise(fleet.admitted).weights
        context = 0 if it.service_class is GUARANTEED else it.context_bytes
        weights = 0 if it.model_id in stays else it.weights_bytes
        assert fleet.firm + context + weights <= fleet.cap or not context + weights


PLANS = {name: model(name, weights=weights) for name, weights in WEIGHTS.items()}
newcomers = st.tuples(kinds, st.sampled_from(sorted(WEIGHTS)), st.integers(0, 400))


@settings(max_examples=60, deadline=None)
@given(
    cap=st.integers(200, 1500),
    live_contexts=st.integers(1, 3),
    fleet=st.lists(newcomers, min_size=1, max_size=8),
    line=st.lists(st.integers(0, 7), min_size=1, max_size=12),
    chance=st.randoms(use_true_random=False),
)
def test_whoever_was_admitted_has_all_its_turns_whatever_the_order(
    cap: int, live_contexts: int, fleet: list[tuple[ServiceClass, str, int]], line: list[int], chance: Random
) -> None:
    """Never a deadlock, never a refused turn, and guaranteed agents wait for nobody: `Stage` looks at that at every event."""
    stage = Stage(cap=cap, live_contexts=live_contexts)
    for i, (kind, name, context) in enumerate(fleet):
        stage.registers(f"agent-{i}", PLANS[name], context=context, kind=kind.value)
        if chance.random() < 0.5:
            stage.settle()
    stage.settle()
    turns = [stage.asks(f"agent-{i}") for i in line if f"agent-{i}" in stage.agents]
    while stage.engine.todo:
        stage.does(chance.choice(stage.engine.todo))
    assert all([type(ending) for ending in turn.endings] == [TurnFinished] for turn in turns)
    stage.wind_up()

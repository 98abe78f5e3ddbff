"""What things cost: contexts and weights as booked, else as measured where one like it ever was, else as estimated."""

from __future__ import annotations

import dataclasses

import pytest

from conductor.core.estimate import ModelPlan
from conductor.core.events import AgentSpec, RequestId, Rung
from conductor.core.homes import Homes
from conductor.core.ledger import Ledger
from conductor.core.prices import Prices
from conductor.core.residency import Model
from conductor.core.sessions import Agent
from conductor.core.streaming import Placement
from conductor.types import AgentId, ContextSpec, Kind, ModelId, ServiceClass
from tests.support.stories import model

LARGE, FIXED = model("large", layers=9), model("fixed")
LADDER = (Rung(50, 50, ((2, 100),)), Rung(80, 80, ((2, 160),)))


def spec(name: str = "a", *, on: ModelPlan = LARGE, kind: str = "best_effort", kv_type: str = "f16") -> AgentSpec:
    return AgentSpec(AgentId(name), on, ContextSpec(window=80, kv_type=kv_type), LADDER, ServiceClass(kind))


class Shop:
    """Prices, and what they are made of."""

    def __init__(self, *, home_bytes: int = 1000) -> None:
        self.ledger, self.models = Ledger(1000), dict[ModelId, Model]()
        self.homes = Homes(home_bytes, link_bytes_per_s=10)
        self.prices = Prices(self.ledger, self.models, self.homes)

    def knows(self, plan: ModelPlan, *, bytes: int | None = None, at_home: bool = False) -> Model:
        """`bytes`: booked for it."""
        known = self.models[plan.id] = Model(plan)
        known.reservation = None if bytes is None else self.ledger.reserve(plan.key, Kind.WEIGHTS, bytes)
        if at_home:
            assert self.homes.settle(known)
        return known

    def enters(self, spec: AgentSpec) -> Agent:
        return Agent(spec, RequestId(1), 0, self.prices.ladder(spec), False)


@pytest.fixture
def shop() -> Shop:
    return Shop()


# --- weights ------------------------------------------------------------------------------------------------------------


def test_weights_cost_what_is_estimated_then_what_was_measured_then_what_is_booked(shop: Shop) -> None:
    assert shop.prices.weights_bytes(FIXED) == 100
    known = shop.knows(FIXED)
    assert shop.prices.weights_bytes(FIXED) == 100
    known.measured_bytes = 90
    assert shop.prices.weights_bytes(FIXED) == 90
    known.reservation = shop.ledger.reserve("fixed", Kind.WEIGHTS, 95)
    assert shop.prices.weights_bytes(FIXED) == 95


def test_all_of_weights_that_stream_cost_no_less_for_it(shop: Shop) -> None:
    known = shop.knows(LARGE, bytes=30, at_home=True)
    known.placement, known.ring = Placement(2, 2), shop.ledger.reserve("large", Kind.RING, 20)
    assert shop.prices.weights_bytes(LARGE) == 100
    assert shop.prices.held_bytes(known) == 50
    known.measured_bytes = 104
    assert shop.prices.weights_bytes(LARGE) == 104


def test_what_is_not_on_the_device_holds_nothing(shop: Shop) -> None:
    assert shop.prices.held_bytes(shop.knows(LARGE, at_home=True)) == 0


def test_a_turn_cannot_do_without_the_least_part_of_weights_that_have_a_home_or_will_have_one(shop: Shop) -> None:
    assert shop.prices.least_bytes(LARGE) == 30, "of a newcomer, if it came now"
    shop.knows(LARGE, at_home=True)
    assert shop.prices.least_bytes(LARGE) == 30
    assert shop.prices.least_bytes(FIXED) == 100


def test_and_without_all_of_those_that_have_none() -> None:
    assert Shop(home_bytes=99).prices.least_bytes(LARGE) == 100
    shop = Shop()
    shop.knows(LARGE, bytes=101)
    assert shop.prices.least_bytes(LARGE) == 101, "it is known, stays on the device, and has no home"


# --- agents -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weights", "context"), [("best_effort", 30, 50), ("shared", 100, 50), ("guaranteed", 100, 80)])
def test_a_newcomer_costs_by_its_class(shop: Shop, kind: str, weights: int, context: int) -> None:
    newcomer = shop.prices.newcomer(spec(kind=kind))
    assert (newcomer.service_class, newcomer.model_id) == (ServiceClass(kind), LARGE.id)
    assert (newcomer.weights_bytes, newcomer.context_bytes) == (weights, context)


def test_an_agent_costs_the_window_that_it_has_use_for(shop: Shop) -> None:
    shop.knows(LARGE, at_home=True)
    agent = shop.enters(spec())
    assert shop.prices.tenant(agent).context_bytes == 50
    agent.rung = 1
    assert (shop.prices.tenant(agent).weights_bytes, shop.prices.tenant(agent).context_bytes) == (30, 80)


def test_a_context_that_was_measured_is_priced_so_for_everybody_with_its_like(shop: Shop) -> None:
    mine, its_like, other_kv, other_model = (
        shop.enters(it) for it in (spec(), spec("b"), spec("c", kv_type="q8_0"), spec("d", on=FIXED))
    )
    agents = [mine, its_like, other_kv, other_model]
    shop.prices.reprice((LARGE.id, dataclasses.replace(mine.spec.context, window=50, slots=2)), 93, agents)
    assert mine.ladder == its_like.ladder == [Rung(50, 50, ((2, 93),)), LADDER[1]]
    assert other_kv.ladder == other_model.ladder == [*LADDER]
    assert shop.enters(spec("e")).ladder == mine.ladder, "and for those who come later"


def test_what_is_guaranteed_keeps_its_price(shop: Shop) -> None:
    agent = shop.enters(spec(kind="guaranteed"))
    agent.guarantee = shop.ledger.reserve("a", Kind.HEADROOM, 80)
    shop.prices.reprice((LARGE.id, agent.spec.context), 70, [agent])
    assert agent.ladder == [*LADDER]
    assert shop.prices.newcomer(spec("b", kind="guaranteed")).context_bytes == 70, "of the next one it is known better"

"""Homes in host memory: who has one, what the device may have of it, and how long a step is thought to take."""

from __future__ import annotations

import dataclasses

import pytest

from conductor.core.estimate import ModelPlan
from conductor.core.homes import MEMORY_OVER_LINK, Homes
from conductor.core.pool import GRANULE_BYTES
from conductor.core.residency import Model
from conductor.core.streaming import Blocks, Placement, placements
from conductor.errors import InternalError
from conductor.types import DeviceKind, Kind
from tests.support.stories import model

LARGE, OTHER, FIXED = model("large", layers=9), model("other", layers=9), model("fixed")


def on_cuda(blocks: Blocks) -> ModelPlan:
    return dataclasses.replace(LARGE, device=DeviceKind.CUDA, blocks=blocks)


def test_every_placement_is_offered_the_least_first_and_the_whole_last() -> None:
    assert LARGE.blocks
    found = Homes(100, link_bytes_per_s=10).offers(LARGE)
    assert [offer.placement for offer in found] == [it for it in placements(LARGE.blocks) if it.slots in (0, 2)]
    assert (found[0].bytes, found[0].link_s, found[-1].bytes, found[-1].link_s) == (30, 9.0, 100, 0.0)
    assert [offer.bytes for offer in found] == sorted(offer.bytes for offer in found)


def test_on_a_gpu_they_are_offered_in_what_its_driver_hands_out() -> None:
    plan = on_cuda(Blocks(1, (GRANULE_BYTES,) * 3, home_only_bytes=5))
    found = Homes(1 << 40, link_bytes_per_s=1e9).offers(plan)
    assert found[-1].bytes == 4 * GRANULE_BYTES
    assert all(offer.bytes % GRANULE_BYTES == 0 for offer in found)


def test_nothing_is_offered_of_weights_that_cannot_move() -> None:
    homes, fixed = Homes(1000, link_bytes_per_s=10), Model(FIXED)
    assert homes.offers(FIXED) == ()
    assert not homes.settle(fixed)
    assert (fixed.home, fixed.offers, homes.ledger.allocated_bytes) == (None, (), 0)


@pytest.mark.parametrize(("budget", "settles"), [(104, False), (105, True)])
def test_its_home_has_room_for_what_never_goes_to_the_device_too(budget: int, settles: bool) -> None:
    plan, homes = on_cuda(Blocks(10, (30, 30, 30), home_only_bytes=5)), Homes(budget, link_bytes_per_s=10)
    assert bool(homes.offers(plan)) == settles
    assert homes.settle(Model(plan)) == settles
    assert homes.ledger.allocated_bytes == (105 if settles else 0)


def test_homes_are_given_to_those_who_come_first_once_and_given_back() -> None:
    homes = Homes(150, link_bytes_per_s=10)
    large, other = Model(LARGE), Model(OTHER)
    assert homes.settle(large)
    assert not homes.settle(large), "it has one"
    assert not homes.settle(other)
    homes.check([large, other])
    [booked] = [entry for entry in homes.ledger.snapshot() if entry.bytes]
    assert (booked.holder, booked.kind, booked.bytes) == ("large", Kind.WEIGHTS, 100)
    homes.leave(large)
    homes.leave(large)
    assert (large.home, large.offers) == (None, ())
    assert homes.settle(other)
    homes.check([large, other])


def test_a_home_that_nobody_lives_in_is_found() -> None:
    homes, large = Homes(150, link_bytes_per_s=10), Model(LARGE)
    homes.settle(large)
    with pytest.raises(InternalError):
        homes.check([])


def test_a_step_takes_as_long_as_was_measured_else_as_the_devices_own_memory_is_thought_to_take() -> None:
    homes, large = Homes(100, link_bytes_per_s=10), Model(LARGE)
    assert homes.step_s(large) == 0.0, "of weights without a home nobody asks"
    homes.settle(large)
    assert homes.step_s(large) == pytest.approx(100 / (10 * MEMORY_OVER_LINK))
    large.step_s = 3.5
    assert homes.step_s(large) == 3.5
    homes.leave(large)
    assert homes.step_s(large) == 3.5, "it is known still when it comes back"


def test_without_a_link_nothing_streams_and_nothing_is_divided_by_it() -> None:
    """Where `home_budget` is 0 the link is not measured."""
    homes = Homes(0, link_bytes_per_s=0.0)
    assert homes.offers(LARGE) == ()
    assert homes.step_s(Model(LARGE)) == 0.0
    assert not homes.settle(Model(LARGE))
    assert Placement(9, 0) in [offer.placement for offer in Homes(100, link_bytes_per_s=1).offers(LARGE)]

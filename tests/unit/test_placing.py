"""Layers that stay, or seats for more agents: which part of a model goes to the device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.placing import UNMEASURED_STEP_S, Choice, Offer, choose, offers, speed_of
from conductor.core.streaming import LEAST_SLOTS, Blocks, Placement, placement_bytes, placements, streamed_bytes, whole

MIB = 1 << 20
#: an 8B: 32 layers of 125 MiB and a head of 200, over a link of 50 GB/s
LARGE = Blocks(200 * MIB, (125 * MIB,) * 32)
LINK = 50e9
#: a pool, by its slots: 64 MiB of KV for each, and what its computation takes
SHAPES = tuple((slots, 100 * MIB + slots * 64 * MIB) for slots in (1, 2, 4, 8, 16, 32))
#: what a step takes once its layers are there
STEP_S = 0.004

OFFERS = offers(LARGE, link_bytes_per_s=LINK)


def choice(budget_mib: int, *, agents: int, step_s: float = STEP_S) -> Choice:
    found = choose(OFFERS, SHAPES, budget_bytes=budget_mib * MIB, agents=agents, step_s=step_s)
    assert found is not None
    return found


# --- stories ------------------------------------------------------------------------------------------------------------


def test_one_agent_gets_layers_for_every_byte_that_is_left() -> None:
    found = choice(2048, agents=1)
    ring = found.offer.placement.slots * 125
    assert found.slots == 1
    assert found.offer.placement.resident == (2048 - 164 - 200 - ring) // 125


def test_many_agents_get_seats_first_and_layers_for_what_is_left() -> None:
    alone, many = choice(2048, agents=1), choice(2048, agents=16)
    assert many.slots == 16
    assert many.offer.placement.resident < alone.offer.placement.resident
    assert many.tokens_per_s > 8 * alone.tokens_per_s


def test_a_seat_that_nobody_has_use_for_is_worth_nothing() -> None:
    assert [choice(16_000, agents=agents).slots for agents in (0, 1, 2, 8, 1000)] == [1, 1, 2, 8, 32]


def test_with_room_for_all_of_it_all_of_it_stays() -> None:
    assert choice(16_000, agents=8).offer.placement == whole(LARGE)


def test_no_layer_stays_that_the_link_would_bring_in_time_anyway() -> None:
    """A step of 50 ms hides 2.5 GB: the layers beyond stay, and the memory that those would take remains idle."""
    found = choice(16_000, agents=1, step_s=0.05)
    assert found.offer.link_s <= 0.05
    slimmer = [it for it in OFFERS if it.bytes < found.offer.bytes]
    assert slimmer
    assert all(it.link_s > 0.05 for it in slimmer)


def test_where_not_even_the_least_part_fits_beside_the_least_pool_there_is_no_choice() -> None:
    least = OFFERS[0].bytes + SHAPES[0][1]
    assert choose(OFFERS, SHAPES, budget_bytes=least - 1, agents=1, step_s=STEP_S) is None
    found = choose(OFFERS, SHAPES, budget_bytes=least, agents=1, step_s=STEP_S)
    assert found is not None
    assert (found.offer, found.slots) == (OFFERS[0], 1)
    assert choose((), SHAPES, budget_bytes=1 << 60, agents=1, step_s=STEP_S) is None
    assert choose(OFFERS, (), budget_bytes=1 << 60, agents=1, step_s=STEP_S) is None


def test_among_equals_the_one_with_fewer_bytes_wins_in_whatever_order_they_come() -> None:
    placement = Placement(1, 2)
    few, more = Offer(placement, 100, 0.01), Offer(placement, 101, 0.01)
    for offered in ((few, more), (more, few)):
        for shapes in (((1, 10), (1, 11)), ((1, 11), (1, 10))):
            found = choose(offered, shapes, budget_bytes=1000, agents=1, step_s=0.0)
            assert found == Choice(few, 1, 100.0)
            assert choose(offered, shapes[:1], budget_bytes=1000, agents=1, step_s=0.02) == Choice(few, 1, 50.0)


def test_before_a_step_was_measured_a_model_can_be_placed_whole() -> None:
    found = choice(16_000, agents=8, step_s=0)
    assert (found.offer.placement, found.slots) == (whole(LARGE), 8)
    assert found.tokens_per_s == speed_of(found.offer, slots=8, agents=8, step_s=0) == 8 / UNMEASURED_STEP_S


# --- offers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granule", [1, 2 * MIB])
def test_offers_are_the_placements_in_whole_granules_with_the_time_on_the_link(granule: int) -> None:
    blocks = Blocks(100, (2 * MIB - 1, 3 * MIB, 5, 2 * MIB))
    found = offers(blocks, link_bytes_per_s=1e9, booked=granule)
    every = [it for it in placements(blocks) if it.slots in (0, LEAST_SLOTS)]
    assert [it.placement for it in found] == every, "more slots and as much to stream bring nothing"
    assert found[-1].placement == whole(blocks)
    for offer in found:
        assert offer.bytes % granule == 0
        assert 0 <= offer.bytes - placement_bytes(blocks, offer.placement) < granule
        assert offer.link_s == streamed_bytes(blocks, offer.placement) / 1e9


# --- against brute force ------------------------------------------------------------------------------------------------

some_blocks = st.builds(Blocks, st.integers(0, 50), st.lists(st.integers(1, 60), min_size=1, max_size=9).map(tuple))
some_shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 200)), min_size=1, max_size=5)


@given(some_blocks, some_shapes, st.integers(0, 800), st.integers(0, 12), st.sampled_from([0.0, 0.001, 0.05, 0.5]))
def test_nothing_that_fits_is_faster_or_as_fast_and_smaller(
    blocks: Blocks, shapes: list[tuple[int, int]], budget: int, agents: int, step_s: float
) -> None:
    offered = offers(blocks, link_bytes_per_s=1000)
    found = choose(offered, shapes, budget_bytes=budget, agents=agents, step_s=step_s)
    fitting = [
        (min(slots, agents or 1) / max(offer.link_s, step_s or UNMEASURED_STEP_S), -(offer.bytes + size))
        for offer in offered
        for slots, size in shapes
        if offer.bytes + size <= budget
    ]
    if not fitting:
        assert found is None
        return
    assert found is not None
    takes = found.offer.bytes + min(size for slots, size in shapes if slots == found.slots)
    assert takes <= budget
    assert (found.tokens_per_s, -takes) == max(fitting)

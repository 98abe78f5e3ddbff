"""What moves together, what a placement takes, which layers stream: sums, held against a byte-by-byte count."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.streaming import (
    ALIGNMENT_BYTES,
    LEAST_SLOTS,
    USUAL_SLOTS,
    Blocks,
    Placement,
    aligned,
    placement_bytes,
    placements,
    ring_bytes,
    slot_bytes,
    streamed_bytes,
    streamed_layers,
    whole,
)

sizes = st.integers(0, 1 << 34)
layers = st.lists(st.integers(1, 1 << 30), min_size=1, max_size=80).map(tuple)
models = st.builds(Blocks, sizes, layers, sizes)
counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))


def uniform(n_layers: int, *, head: int = 1000, layer: int = 100) -> Blocks:
    return Blocks(head, (layer,) * n_layers)


# --- which layers stream ------------------------------------------------------------------------------------------------


@given(counts)
def test_all_but_the_resident_layers_stream_in_their_order(count: tuple[int, int]) -> None:
    n, resident = count
    streamed = streamed_layers(n, resident)
    assert len(streamed) == n - resident
    assert list(streamed) == sorted({*streamed} & {*range(n)})


@given(counts)
def test_they_are_spread_evenly(count: tuple[int, int]) -> None:
    """Of any stretch of layers as many stream as of any other of that length, give or take one."""
    n, resident = count
    streamed = {*streamed_layers(n, resident)}
    streams = [layer in streamed for layer in range(n)]
    for length in {1, 2, 3, n // 2, n - 1} & {*range(1, n)}:
        in_each = [sum(streams[start : start + length]) for start in range(n - length + 1)]
        assert max(in_each) - min(in_each) <= 1


def test_half_of_them_is_every_other_one() -> None:
    assert streamed_layers(8, 4) == (1, 3, 5, 7)
    assert streamed_layers(7, 0) == (0, 1, 2, 3, 4, 5, 6)
    assert streamed_layers(7, 7) == ()


# --- what a placement takes ---------------------------------------------------------------------------------------------


@given(models, st.data())
def test_a_placement_takes_its_head_its_layers_and_its_slots(blocks: Blocks, data: st.DataObject) -> None:
    n = len(blocks.layer_bytes)
    resident = data.draw(st.integers(0, n - 1))
    placement = Placement(resident, data.draw(st.integers(1, 6)))
    streamed = streamed_layers(n, resident)
    stay = [size for layer, size in enumerate(blocks.layer_bytes) if layer not in streamed]
    largest = max(blocks.layer_bytes[layer] for layer in streamed)
    assert slot_bytes(blocks, placement) == largest
    assert ring_bytes(blocks, placement) == placement.slots * largest
    assert placement_bytes(blocks, placement) == blocks.head_bytes + sum(stay) + placement.slots * largest
    assert streamed_bytes(blocks, placement) + sum(stay) + blocks.head_bytes == blocks.whole_bytes


@given(models)
def test_the_whole_takes_no_ring_and_brings_nothing_over_the_link(blocks: Blocks) -> None:
    everything = whole(blocks)
    assert not everything.streams
    assert placement_bytes(blocks, everything) == blocks.whole_bytes == blocks.home_bytes - blocks.home_only_bytes
    assert slot_bytes(blocks, everything) == ring_bytes(blocks, everything) == streamed_bytes(blocks, everything) == 0


def test_a_slot_holds_the_largest_of_those_that_stream_not_of_those_that_stay() -> None:
    blocks = Blocks(0, (900, 10, 900, 20))
    assert streamed_layers(4, 2) == (1, 3)
    assert slot_bytes(blocks, Placement(2, 2)) == 20
    assert slot_bytes(blocks, Placement(0, 2)) == 900


@given(st.integers(3, 100), st.integers(1, 6))
def test_of_equal_layers_each_one_more_takes_its_bytes_and_spares_the_link_as_many(n_layers: int, slots: int) -> None:
    blocks = uniform(n_layers)
    takes = [placement_bytes(blocks, Placement(resident, slots)) for resident in range(n_layers)]
    brings = [streamed_bytes(blocks, Placement(resident, slots)) for resident in range(n_layers)]
    assert {after - before for before, after in pairwise(takes)} == {100}
    assert {before - after for before, after in pairwise(brings)} == {100}


# --- those worth having -------------------------------------------------------------------------------------------------


@given(models)
def test_those_worth_having_are_smaller_than_the_whole_the_least_first_and_the_whole_is_the_last(blocks: Blocks) -> None:
    found = placements(blocks)
    takes = [placement_bytes(blocks, it) for it in found]
    assert found[-1] == whole(blocks)
    assert takes == sorted(takes)
    assert all(size < blocks.whole_bytes for size in takes[:-1])
    assert len({*found}) == len(found)


@given(models)
def test_none_is_left_out_whose_ring_is_smaller_than_what_passes_through_it(blocks: Blocks) -> None:
    n = len(blocks.layer_bytes)
    possible = {Placement(resident, slots) for resident in range(n) for slots in (LEAST_SLOTS, USUAL_SLOTS)}
    sparing = {it for it in possible if ring_bytes(blocks, it) < streamed_bytes(blocks, it)}
    assert {*placements(blocks)[:-1]} == sparing


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_model_of_as_many_layers_as_a_ring_has_slots_is_placed_whole_or_not_at_all(n_layers: int) -> None:
    assert placements(uniform(n_layers)) == [Placement(n_layers, 0)]


def test_a_ring_as_large_as_what_passes_through_it_is_not_worth_having() -> None:
    assert placements(Blocks(10, (2, 1, 1))) == [Placement(3, 0)]


def test_the_least_has_no_layer_that_stays() -> None:
    assert placements(uniform(7)) == [
        Placement(0, 2), Placement(1, 2), Placement(0, 4), Placement(2, 2), Placement(1, 4), Placement(3, 2), Placement(2, 4),
        Placement(4, 2), Placement(7, 0),
    ]  # fmt: skip


# --- where blocks begin -------------------------------------------------------------------------------------------------


@given(sizes)
def test_sizes_are_rounded_up_to_where_the_next_block_may_begin(size: int) -> None:
    assert aligned(size) % ALIGNMENT_BYTES == 0
    assert size <= aligned(size) < size + ALIGNMENT_BYTES
    assert aligned(aligned(size)) == aligned(size)

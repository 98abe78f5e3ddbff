"""The arithmetic of the streaming experiment: what both loops took, the least they could have taken, where they balance."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.layers.spec import COLUMNS, DEFAULTS, SUMS, Compute, LayerStreamSpec
from actors.layers.times import Interval, LayerSweep, Timeline, balance_iters, ideal, iters_around, result
from conductor.errors import InvalidRequest
from conductor.types import DeviceKind
from conductor.units import MIB

STEPS = st.lists(st.tuples(*[st.floats(0.01, 100)] * 2), min_size=1, max_size=12)


def run(*layers: tuple[float, float, float, float]) -> Timeline:
    """Of layers with (copy begins, ends, compute begins, ends)."""
    return Timeline(tuple(Interval(a, b) for a, b, _, _ in layers), tuple(Interval(c, d) for _, _, c, d in layers))


# --- the ideal ----------------------------------------------------------------------------------------------------------


@given(STEPS)
def test_with_two_buffers_it_is_one_fill_the_longer_of_each_pair_and_the_last_compute(steps: list[tuple[float, float]]) -> None:
    copies, computes = zip(*steps, strict=True)
    by_hand = copies[0] + sum(map(max, zip(computes[:-1], copies[1:], strict=True))) + computes[-1]
    assert math.isclose(ideal(copies, computes, buffers=2).elapsed_ms, by_hand)


@given(STEPS, st.integers(2, 5))
def test_no_order_beats_the_ideal_and_it_beats_the_serial_loop(steps: list[tuple[float, float]], buffers: int) -> None:
    copies, computes = zip(*steps, strict=True)
    least = ideal(copies, computes, buffers=buffers).elapsed_ms
    assert least >= max(sum(copies) + computes[-1], copies[0] + sum(computes)) - 1e-9
    assert least <= sum(copies) + sum(computes) + 1e-9
    assert ideal(copies, computes, buffers=buffers + 1).elapsed_ms <= least + 1e-9


@given(STEPS, st.integers(2, 5))
def test_in_the_ideal_no_buffer_is_filled_while_it_is_read(steps: list[tuple[float, float]], buffers: int) -> None:
    best = ideal(*zip(*steps, strict=True), buffers=buffers)
    for layer, compute in enumerate(best.computes):
        assert compute.begin_ms >= best.copies[layer].end_ms
        if layer + buffers < len(steps):
            assert best.copies[layer + buffers].begin_ms >= compute.end_ms


def test_where_copy_and_compute_take_the_same_nearly_half_is_saved() -> None:
    assert ideal([2.0] * 8, [2.0] * 8, buffers=2).elapsed_ms == 18  # of 32


# --- what was measured --------------------------------------------------------------------------------------------------


def test_a_timeline_knows_how_long_each_copy_had_a_compute_beside_it() -> None:
    seen = run((5, 7, 7, 10), (7, 9, 10, 12), (9.5, 13, 13, 14))
    assert seen.elapsed_ms == 9
    assert seen.hidden_ms() == (0, 2, 2.5)
    assert seen.from_zero().copies[0] == Interval(0, 2)
    assert seen.from_zero().hidden_ms() == seen.hidden_ms()


def test_a_result_is_made_of_medians() -> None:
    spec = LayerStreamSpec(n_layers=2, repeats=3)
    serial = [run((0, 1 + late, 1 + late, 4 + late), (4 + late, 5 + late, 5 + late, 8 + late)) for late in (0, 0.5, 9)]
    beside = [run((1, 2, 2, 5), (2, 3, 5, 7 + late)) for late in (0, 1, 5)]
    found = result(spec, serial, beside, device="paper", kind=DeviceKind.HOST, largest_error=0.25)
    assert (found.serial_ms, found.overlapped_ms) == (8.5, 7)
    assert (found.copy_ms, found.compute_ms) == ((1.5, 1), (3, 3))
    assert found.ideal_ms == 1.5 + 3 + 3
    assert math.isclose(found.savings, 1.5 / 8.5)
    assert math.isclose(found.ideal_savings, 1 / 8.5)
    assert math.isclose(found.speedup, 8.5 / 7)
    assert math.isclose(found.above_ideal, 7 / 7.5 - 1)
    assert (found.serial, found.overlapped) == (serial[1].from_zero(), beside[1].from_zero())
    assert found.correct
    assert json.loads(json.dumps(found.to_json()))["overlapped"]["copies"][0] == {"begin_ms": 0, "end_ms": 1}
    assert pickle.loads(pickle.dumps(found)) == found
    assert not result(spec, serial, beside, device="paper", kind=DeviceKind.HOST, largest_error=1.01).correct


# --- sweeps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "balance"),
    [
        ([(1, 4, 1), (4, 4, 2), (16, 4, 8)], 8),
        ([(16, 4, 8), (1, 4, 1), (4, 4, 2)], 8),
        ([(1, 4, 1), (4, 4, 4), (16, 4, 9)], 4),
        ([(1, 4, 4)], 1),
        ([(1, 4, 5), (4, 4, 9)], None),
        ([(1, 4, 1), (4, 4, 2)], None),
        ([], None),
    ],
    ids=["between", "in any order", "at a point", "at the first", "always longer", "never as long", "nothing measured"],
)
def test_the_balance_is_where_computing_takes_as_long_as_copying(
    points: list[tuple[int, float, float]], balance: int | None
) -> None:
    assert balance_iters(points) == balance


def test_a_sweep_measures_at_the_balance_and_on_both_sides_of_it() -> None:
    assert iters_around(1600, at_most=1 << 20) == (100, 200, 400, 800, 1131, 1600, 2263, 3200, 6400)
    assert iters_around(1600, at_most=2000) == (100, 200, 400, 800, 1131, 1600, 2000)
    assert iters_around(2, at_most=99) == (1, 2, 3, 4, 8)
    assert iters_around(None, at_most=9) == (1, 2, 4, 8)


def test_a_sweep_knows_its_point_at_the_balance_and_its_best() -> None:
    one = run((0, 1, 1, 4))
    points = [
        replace(
            result(LayerStreamSpec(1, compute_iters=iters), [one], [one], device="", kind=DeviceKind.HOST, largest_error=0),
            savings=savings,
        )
        for iters, savings in ((1, 0.1), (2, 0.3), (4, 0.2))
    ]
    assert LayerSweep(tuple(points), 4).at_balance is points[2]
    assert LayerSweep(tuple(points), None).at_balance is None
    assert LayerSweep(tuple(points), 4).best is points[1]


# --- what is asked for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"n_layers": 0}, "n_layers"),
        ({"buffers": 1}, "buffers"),
        ({"compute_iters": 0}, "compute_iters"),
        ({"compute_iters": 8193, "compute": Compute.MATMUL}, "compute_iters"),
        ({"repeats": 0}, "repeats"),
        ({"bytes_per_layer": 0}, "bytes_per_layer"),
        ({"bytes_per_layer": MIB + 4}, "bytes_per_layer"),
    ],
)
def test_what_cannot_be_streamed_is_named(asked: dict[str, int], named: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        LayerStreamSpec(**asked)  # type: ignore[arg-type]
    assert refused.value.argument == named


def test_every_byte_on_the_device_is_counted() -> None:
    assert DEFAULTS[DeviceKind.CUDA].device_bytes() == 2 * 64 * MIB + 8 * SUMS * 4
    product = LayerStreamSpec(n_layers=3, bytes_per_layer=2 * MIB, compute_iters=5, buffers=4, compute=Compute.MATMUL)
    rows = 2 * MIB // 4 // COLUMNS
    assert product.device_bytes() == 4 * 2 * MIB + 4 * (3 * rows + (COLUMNS + rows + 1) * 5)
    assert product.device_bytes(most_iters=6) - product.device_bytes() == 4 * (COLUMNS + rows + 1)

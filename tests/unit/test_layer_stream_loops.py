"""The two loops on lanes that keep time on paper, and on the host's own two threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from actors.layers.host_lanes import HostLanes
from actors.layers.loops import Progress, find_balance, measure, overlapped, serial, sweep
from actors.layers.spec import COLUMNS, SUMS, Compute, LayerStreamSpec
from actors.layers.times import LayerStreamResult, LayerSweep, ideal
from actors.layers.work import Factors, Reference, activations, fill
from conductor.types import DeviceKind
from conductor.units import MIB
from tests.support.paper_lanes import PaperLanes

SMALL = LayerStreamSpec(n_layers=5, bytes_per_layer=MIB, compute_iters=3, repeats=2)
PRODUCT = LayerStreamSpec(n_layers=5, bytes_per_layer=MIB, compute_iters=3, compute=Compute.MATMUL, repeats=2)

Open = Callable[[LayerStreamSpec], HostLanes]


@pytest.fixture
def host() -> Iterator[Open]:
    """`host(spec)`: the host's lanes with weights; they are closed at the end."""
    opened: list[HostLanes] = []

    def open_(spec: LayerStreamSpec) -> HostLanes:
        opened.append(HostLanes(spec))
        fill(opened[-1].weights)
        return opened[-1]

    yield open_
    for lanes in opened:
        lanes.close()


def reference(lanes: PaperLanes | HostLanes, spec: LayerStreamSpec) -> Reference:
    return Reference(spec, lanes.weights)


# --- the order of things ------------------------------------------------------------------------------------------------


def test_in_the_serial_loop_nothing_is_beside_anything() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 1 + layer, compute_ms=lambda layer, iters: 2)
    seen = serial(lanes, SMALL)
    assert seen.hidden_ms() == (0, 0, 0, 0, 0)
    assert seen.elapsed_ms == sum(range(1, 6)) + 5 * 2


def test_in_the_overlapped_loop_the_next_copy_begins_before_the_compute_ends() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 1, compute_ms=lambda layer, iters: 2)
    seen = overlapped(lanes, SMALL)
    for copy, compute in zip(seen.copies[1:], seen.computes, strict=False):
        assert copy.begin_ms < compute.end_ms
    assert seen.elapsed_ms == 1 + 5 * 2


@pytest.mark.parametrize("buffers", [2, 3, 4])
def test_the_overlapped_loop_takes_what_the_ideal_says(buffers: int) -> None:
    spec = LayerStreamSpec(n_layers=9, bytes_per_layer=MIB, buffers=buffers)
    copies, computes = [1.0, 5, 1, 1, 2, 9, 1, 1, 3], [2.0, 2, 7, 1, 1, 1, 4, 1, 2]
    lanes = PaperLanes(spec, copy_ms=copies.__getitem__, compute_ms=lambda layer, iters: computes[layer])
    assert overlapped(lanes, spec) == ideal(copies, computes, buffers=buffers)


@pytest.mark.parametrize("loop", [serial, overlapped])
def test_each_layer_is_computed_as_it_is(loop: Callable[..., object]) -> None:
    lanes = PaperLanes(SMALL, compute_ms=lambda layer, iters: 3)
    loop(lanes, SMALL)
    assert reference(lanes, SMALL).error(lanes.results(), iters=3) <= 1


def test_lanes_that_do_not_wait_for_one_another_give_wrong_results() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 2, compute_ms=lambda layer, iters: 3, heeds=False)
    [*_, found] = measure(lanes, SMALL, reference(lanes, SMALL), DeviceKind.HOST)
    assert isinstance(found, LayerStreamResult)
    assert not found.correct


# --- measuring ----------------------------------------------------------------------------------------------------------


def test_a_measurement_tells_how_far_it_is_and_ends_with_its_result() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 2, compute_ms=lambda layer, iters: 2)
    *progress, found = measure(lanes, SMALL, reference(lanes, SMALL), DeviceKind.HOST)
    assert [(item.done, item.of) for item in progress if isinstance(item, Progress)] == [(0, 3), (1, 3), (2, 3)]
    assert isinstance(found, LayerStreamResult)
    assert (found.serial_ms, found.overlapped_ms, found.ideal_ms, found.correct) == (20, 12, 12, True)
    assert (found.savings, found.above_ideal, found.device) == (0.4, 0, "paper")


def test_a_sweep_finds_the_balance_and_saves_most_there() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 100, compute_ms=lambda layer, iters: 4 + iters)
    *_, found = sweep(lanes, SMALL, reference(lanes, SMALL), DeviceKind.HOST)
    assert isinstance(found, LayerSweep)
    assert found.balance_iters == 96
    assert found.at_balance is found.best
    assert found.best.ideal_savings == 0.4
    assert [point.spec.compute_iters for point in found.points] == [6, 12, 24, 48, 68, 96, 136, 192, 384]
    assert all(point.correct and point.above_ideal == 0 for point in found.points)


def test_where_computing_is_slow_from_the_start_there_is_no_balance() -> None:
    lanes = PaperLanes(SMALL, copy_ms=lambda layer: 1, compute_ms=lambda layer, iters: 1 + iters)
    assert find_balance(lanes, SMALL) is None


# --- the host's lanes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [serial, overlapped])
@pytest.mark.parametrize("spec", [SMALL, PRODUCT], ids=lambda spec: spec.compute.value)
def test_both_loops_compute_on_the_host_what_numpy_says(host: Open, spec: LayerStreamSpec, loop: Callable[..., object]) -> None:
    lanes = host(spec)
    for iters in (spec.compute_iters, 1, 17):
        lanes.prepare(iters)
        loop(lanes, spec)
        assert reference(lanes, spec).error(lanes.results(), iters=iters) <= 1


def test_results_of_an_earlier_loop_do_not_count(host: Open) -> None:
    lanes = host(SMALL)
    serial(lanes, SMALL)
    lanes.begin()
    assert reference(lanes, SMALL).error(lanes.results(), iters=3) == float("inf")


def test_an_error_in_a_lane_reaches_whoever_waits(host: Open) -> None:
    lanes = host(SMALL)
    with pytest.raises(IndexError):
        lanes.compute(0, buffer=0, after=lanes.copy(99, buffer=0)).wait()


def test_steps_on_the_host_wait_for_those_they_come_after(host: Open) -> None:
    lanes = host(SMALL)
    seen = overlapped(lanes, SMALL)
    for layer, (copy, compute) in enumerate(zip(seen.copies, seen.computes, strict=True)):
        assert compute.begin_ms >= copy.end_ms
        if layer >= SMALL.buffers:
            assert copy.begin_ms >= seen.computes[layer - SMALL.buffers].end_ms


# --- what must come out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iters", [1, 2, 64, 500])
def test_a_sweep_in_closed_form_is_the_sweep_step_by_step(iters: int) -> None:
    weights = np.empty((1, SUMS), np.float32)
    fill(weights)
    x, of = weights.copy(), Factors.of(iters)
    for _ in range(iters):
        x = x * of.a + of.b
    spec = LayerStreamSpec(n_layers=1, bytes_per_layer=MIB, compute_iters=iters)
    assert x.dtype == np.float32
    assert Reference(spec, weights).error(x, iters=iters) <= 1
    assert np.max(np.abs((x - 0.5) - (weights - 0.5) / 2)) < 1e-4, "every element keeps half of what it was"
    one_step_too_many = x * of.a + of.b
    assert Reference(spec, weights).error(one_step_too_many, iters=iters) > 1


@pytest.mark.parametrize("spec", [SMALL, PRODUCT], ids=lambda spec: spec.compute.value)
def test_one_wrong_element_of_a_layer_shows(host: Open, spec: LayerStreamSpec) -> None:
    lanes = host(spec)
    right = reference(lanes, spec)
    assert right.error(_computed(lanes, spec), iters=spec.compute_iters) <= 1
    lanes.weights[3, 77] = 1 - lanes.weights[3, 77] + 0.1
    assert right.error(_computed(lanes, spec), iters=spec.compute_iters) > 1


def test_a_product_is_checked_by_the_columns_it_was_made_of() -> None:
    columns, signs = activations(7)
    assert (columns.shape, signs.shape) == ((COLUMNS, 7), (7,))
    assert set(np.abs(signs)) == {1}
    assert (columns.min() < -0.9, columns.max() > 0.9) == (True, True)


def _computed(lanes: HostLanes, spec: LayerStreamSpec) -> np.ndarray:
    serial(lanes, spec)
    return lanes.results()

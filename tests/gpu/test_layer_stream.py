"""The streaming experiment on a real GPU: right results, a real overlap, and no byte more than what is booked."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from actors.layer_stream import PROCESS_BYTES
from actors.layers.loops import find_balance, measure, overlapped, serial
from actors.layers.spec import Compute, LayerStreamSpec
from actors.layers.times import LayerStreamResult
from actors.layers.work import Reference, fill
from conductor.backend.device import open_device
from conductor.config import DeviceConfig
from conductor.types import DeviceKind
from conductor.units import MIB
from tests.conftest import ROOT

if TYPE_CHECKING:
    from actors.layers.cuda_lanes import CudaLanes


def _cupy_sees_a_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _cupy_sees_a_gpu(), reason="needs CuPy and a GPU")]

SWEEP = LayerStreamSpec(n_layers=6, bytes_per_layer=16 * MIB, compute_iters=64)
PRODUCT = LayerStreamSpec(n_layers=6, bytes_per_layer=16 * MIB, compute_iters=64, compute=Compute.MATMUL)
MOST_ITERS = 4096

Open = Callable[[LayerStreamSpec], "CudaLanes"]

#: A process with the lanes open, after both loops, until it is told to go.
HOLD = """
import sys
from actors.layers.cuda_lanes import CudaLanes
from actors.layers.loops import overlapped, serial
from actors.layers.spec import Compute, LayerStreamSpec
from actors.layers.work import fill
layers, size, iters, compute = sys.argv[1:]
spec = LayerStreamSpec(int(layers), int(size), int(iters), compute=Compute(compute))
lanes = CudaLanes(spec)
fill(lanes.weights)
serial(lanes, spec)
overlapped(lanes, spec)
lanes.results()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def gpu() -> Iterator[Open]:
    """`gpu(spec)`: lanes on the GPU with weights; they are closed at the end."""
    from actors.layers.cuda_lanes import CudaLanes

    opened: list[CudaLanes] = []

    def open_(spec: LayerStreamSpec) -> CudaLanes:
        opened.append(CudaLanes(spec, most_iters=MOST_ITERS))
        fill(opened[-1].weights)
        return opened[-1]

    yield open_
    for lanes in opened:
        lanes.close()


@pytest.mark.parametrize("loop", [serial, overlapped])
@pytest.mark.parametrize("spec", [SWEEP, PRODUCT], ids=lambda spec: spec.compute.value)
@pytest.mark.parametrize("buffers", [2, 3])
def test_both_loops_compute_what_numpy_says(gpu: Open, spec: LayerStreamSpec, loop: Callable[..., object], buffers: int) -> None:
    spec = LayerStreamSpec(spec.n_layers, spec.bytes_per_layer, spec.compute_iters, buffers, spec.compute)
    lanes = gpu(spec)
    reference = Reference(spec, lanes.weights)
    for iters in (spec.compute_iters, 1, 37, MOST_ITERS):
        lanes.prepare(iters)
        loop(lanes, spec)
        assert reference.error(lanes.results(), iters=iters) <= 1, iters


@pytest.mark.parametrize("spec", [SWEEP, PRODUCT], ids=lambda spec: spec.compute.value)
def test_one_wrong_element_of_a_layer_shows(gpu: Open, spec: LayerStreamSpec) -> None:
    lanes = gpu(spec)
    reference = Reference(spec, lanes.weights)
    serial(lanes, spec)
    assert reference.error(lanes.results(), iters=spec.compute_iters) <= 1
    lanes.weights[3, 77] = 1 - lanes.weights[3, 77] + 0.1
    serial(lanes, spec)
    assert reference.error(lanes.results(), iters=spec.compute_iters) > 1


def test_results_of_an_earlier_loop_do_not_count(gpu: Open) -> None:
    lanes = gpu(SWEEP)
    reference = Reference(SWEEP, lanes.weights)
    serial(lanes, SWEEP)
    lanes.begin()
    assert reference.error(lanes.results(), iters=SWEEP.compute_iters) == float("inf")


def test_copies_and_kernels_run_side_by_side_in_the_overlapped_loop_only(gpu: Open) -> None:
    lanes = gpu(SWEEP)
    lanes.prepare(MOST_ITERS)  # the kernels are long enough for the next copy to begin beside them
    overlapped(lanes, SWEEP)
    beside, apart = overlapped(lanes, SWEEP), serial(lanes, SWEEP)
    assert sum(apart.hidden_ms()) == 0
    for layer, (copy, compute) in enumerate(zip(beside.copies, beside.computes, strict=True)):
        assert compute.begin_ms >= copy.end_ms - 0.001
        if layer + 1 < SWEEP.n_layers:
            assert beside.copies[layer + 1].begin_ms < compute.end_ms, "the next copy began before this kernel ended"
        if layer >= SWEEP.buffers:
            assert copy.begin_ms >= beside.computes[layer - SWEEP.buffers].end_ms - 0.001, "its buffer had been read"


def test_at_the_balance_point_time_is_saved(gpu: Open) -> None:
    lanes = gpu(SWEEP)
    balance = find_balance(lanes, SWEEP)
    assert balance is not None
    spec = LayerStreamSpec(SWEEP.n_layers, SWEEP.bytes_per_layer, balance)
    *_, found = measure(lanes, spec, Reference(spec, lanes.weights), DeviceKind.CUDA)
    assert isinstance(found, LayerStreamResult)
    assert found.correct
    assert found.savings > 0.2


@pytest.mark.parametrize("spec", [SWEEP, PRODUCT], ids=lambda spec: spec.compute.value)
def test_a_process_takes_no_more_of_the_gpu_than_it_books(spec: LayerStreamSpec) -> None:
    device = open_device(DeviceConfig(kind="cuda"), llama_supports_gpu=True, used_bytes=lambda: 0)
    before = device.read().free_bytes
    arguments = map(str, (spec.n_layers, spec.bytes_per_layer, spec.compute_iters, spec.compute.value))
    command, pipe = [sys.executable, "-c", HOLD, *arguments], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        taken = before - device.read().free_bytes
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert spec.device_bytes() <= taken <= spec.device_bytes() + PROCESS_BYTES, f"{taken / MIB:.0f} MiB"

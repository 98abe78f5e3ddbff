"""The streaming experiment as a tenant: it books before it takes, and gives back however it ends."""

from __future__ import annotations

import contextlib
import importlib.util

import psutil
import pytest

from actors.layer_stream import HOLDER, Item, Opening, Place, place_alone, place_beside, stream_layers
from actors.layers.loops import Progress
from actors.layers.spec import Compute, LayerStreamSpec
from actors.layers.times import LayerStreamResult, LayerSweep
from conductor.config import parse_config
from conductor.errors import AdmissionRefused, InvalidRequest, RefusalCode, ServiceFailed
from conductor.types import DeviceKind, Kind
from conductor.units import MIB
from tests.conftest import ROOT
from tests.support.conducting import WITHIN_S, Conduct, Conductor
from tests.support.eventually import eventually

SPEC = LayerStreamSpec(n_layers=3, bytes_per_layer=MIB, compute_iters=2, repeats=2)
ENDLESS = LayerStreamSpec(n_layers=3, bytes_per_layer=MIB, compute_iters=200, repeats=1000)
HERE = Place(DeviceKind.HOST, "for a test")


def held(conductor: Conductor) -> list[tuple[str, Kind, int]]:
    return [(r.holder, r.kind, r.bytes) for r in conductor.status().ledger.reservations if r.bytes]


def test_it_books_what_it_takes_and_gives_it_back(conduct: Conduct) -> None:
    conductor = conduct()
    place = place_beside(conductor.status(), conductor.config)
    assert (place.kind, place.num_gpus) == (DeviceKind.HOST, 0)
    booked: list[list[tuple[str, Kind, int]]] = []
    items: list[Item] = []
    for item in stream_layers(SPEC, place, conductor=conductor.handle):
        items.append(item)
        booked += [held(conductor)] if isinstance(item, Opening) else []
    opening, found = items[0], items[-1]
    assert isinstance(opening, Opening)
    assert opening.reservation is not None
    assert booked in ([[(HOLDER, Kind.EXTERNAL, SPEC.device_bytes())]], [[]]), "it may be done before we look"
    assert any(isinstance(item, Progress) for item in items)
    assert isinstance(found, LayerStreamResult)
    assert (found.correct, found.spec, found.device) == (True, SPEC, "host (NumPy, 2 threads)")
    assert held(conductor) == []


def test_without_a_conductor_nothing_is_booked(ray_session: None) -> None:
    *_, found = items = list(stream_layers(SPEC, HERE))
    assert isinstance(items[0], Opening)
    assert items[0].reservation is None
    assert isinstance(found, LayerStreamResult)
    assert found.correct


def test_a_sweep_ends_with_its_points(ray_session: None) -> None:
    *_, found = stream_layers(LayerStreamSpec(2, MIB, compute=Compute.MATMUL, repeats=1), HERE, sweeping=True)
    assert isinstance(found, LayerSweep)
    assert len(found.points) >= 4
    assert all(point.correct for point in found.points)


def test_it_is_refused_with_the_numbers_if_it_does_not_fit(conduct: Conduct) -> None:
    conductor = conduct()
    large = LayerStreamSpec(n_layers=2, bytes_per_layer=40 * MIB)
    with pytest.raises(AdmissionRefused) as refused:
        list(stream_layers(large, HERE, conductor=conductor.handle))
    assert (refused.value.code, refused.value.refusal.requested_bytes) == (RefusalCode.NEVER, large.device_bytes())
    assert held(conductor) == []


@pytest.mark.slow
def test_beside_others_it_is_refused_for_now(conduct: Conduct) -> None:
    conductor = conduct()
    conductor.call("reserve", "somebody", 55 * MIB)
    with pytest.raises(AdmissionRefused) as refused:
        list(stream_layers(SPEC, HERE, conductor=conductor.handle))
    assert refused.value.code is RefusalCode.CAP
    assert [holder.holder for holder in refused.value.refusal.holders if holder.bytes] == ["somebody"]


@pytest.mark.slow
def test_layers_that_host_memory_cannot_hold_are_refused_before_anything_is_booked(conduct: Conduct) -> None:
    conductor = conduct()
    too_much = psutil.virtual_memory().total // (64 * MIB) + 1
    with pytest.raises(InvalidRequest, match="of host memory"):
        list(stream_layers(LayerStreamSpec(min(too_much, 1024), 1024 * MIB), HERE, conductor=conductor.handle))
    assert held(conductor) == []


@pytest.mark.slow
def test_whoever_stops_reading_ends_the_task_and_its_booking(conduct: Conduct) -> None:
    conductor = conduct()
    with contextlib.closing(stream_layers(ENDLESS, HERE, conductor=conductor.handle)) as items:
        next(items)
        assert held(conductor) == [(HOLDER, Kind.EXTERNAL, ENDLESS.device_bytes())]
    eventually(lambda: held(conductor) == [], WITHIN_S)


def test_what_a_killed_task_had_booked_comes_back(conduct: Conduct) -> None:
    conductor = conduct()
    items = stream_layers(ENDLESS, HERE, conductor=conductor.handle)
    next(items)
    [worker] = [process for process in psutil.process_iter(["cmdline"]) if _is_our_task(process)]
    worker.kill()
    with pytest.raises(ServiceFailed, match="ended before its result"):
        list(items)
    eventually(lambda: held(conductor) == [], WITHIN_S)


def _is_our_task(process: psutil.Process) -> bool:
    """Ray gives a worker its task's name; of those that other people run, none is a descendant of our Ray's."""
    name = " ".join(process.info["cmdline"] or ())
    return f"vram:{HOLDER}" in name and psutil.Process() in process.parents()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is installed")
def test_without_cupy_it_says_what_to_install_and_leaves_nothing_booked(conduct: Conduct) -> None:
    conductor = conduct(device={"kind": "host", "host_bytes": "1GiB"})
    with pytest.raises(ServiceFailed, match=r"vram-conductor\[cuda13\]"):
        list(stream_layers(SPEC, Place(DeviceKind.CUDA, "for a test"), conductor=conductor.handle))
    assert held(conductor) == []


def test_alone_it_takes_the_device_that_the_configuration_allows(ray_session: None) -> None:
    def configured(kind: str) -> Place:
        return place_alone(parse_config({"device": {"kind": kind}}, source="test", directory=ROOT))

    assert configured("host") == Place(DeviceKind.HOST, "forced by device.kind")
    if importlib.util.find_spec("cupy") is None:
        assert configured("auto") == Place(DeviceKind.HOST, "CuPy is not installed")
        with pytest.raises(ServiceFailed, match=r"device\.kind is cuda, but CuPy is not installed"):
            configured("cuda")
    else:
        assert configured("auto") == Place(DeviceKind.CUDA, "CuPy is installed and Ray sees a GPU", num_gpus=1)

"""The streaming experiment as a Ray task: does bringing layers to the device hide behind computing on them?

A tenant like any other: where a conductor runs, it books what it will take of the device before it takes it, is refused with the
numbers if that does not fit, and gives it back when it ends, however it ends. `layers` has what it does.
Does not cover llama.cpp's weights, and finds the GPU by `device.index` alone: on a node with several it may be another than the
one that Ray gave the conductor.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.connection import own
from actors.deaths import Owner
from actors.layers.host_lanes import HostLanes
from actors.layers.lanes import Lanes
from actors.layers.loops import Progress, measure, sweep
from actors.layers.spec import MOST_ITERS, LayerStreamSpec
from actors.layers.times import LayerStreamResult, LayerSweep
from actors.layers.work import Reference, fill
from conductor.config import Config
from conductor.errors import ConductorError, InvalidRequest, ServiceFailed, UnknownReservation
from conductor.types import DeviceKind, Record, ReservationId, Status
from conductor.units import MIB, format_bytes

#: In the ledger.
HOLDER = "layer-stream"
#: What a process takes of a GPU beside its arrays: CUDA's context, CuPy and cuBLAS took 591 MiB on an H200.
PROCESS_BYTES = 640 * MIB
#: All layers lie in host memory at once; the rest is for everybody else.
_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True, slots=True)
class Opening(Record):
    """What the task has opened, told before it begins to measure."""

    device: str
    kind: DeviceKind
    chosen: str
    taken_bytes: int  #: of the device
    reservation: ReservationId | None  #: under which they are booked; None where there is no conductor


Item = Opening | Progress | LayerStreamResult | LayerSweep


@dataclass(frozen=True, slots=True)
class Place:
    """Where the task computes."""

    kind: DeviceKind
    chosen: str  #: why there
    index: int = 0  #: of the GPU, as CUDA counts those that the task sees
    num_gpus: int = 0  #: that Ray is asked for


def place_beside(status: Status, config: Config) -> Place:
    """On the conductor's own device: Ray has given the GPU to the conductor, whose ledger shares it out."""
    return Place(status.device.kind, "the conductor's device", config.device.index)


def place_alone(config: Config) -> Place:
    """On a GPU if this Ray has one that may be used and CuPy is installed, else in host memory."""
    if config.device.kind == "host":
        return Place(DeviceKind.HOST, "forced by device.kind")
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1  # type: ignore[no-untyped-call]
    if not has_gpu:
        why = "Ray sees no GPU"
    elif importlib.util.find_spec("cupy") is None:
        why = "CuPy is not installed"
    else:
        asked = int(config.device.index == 0)  # Ray would hide one that is named
        return Place(DeviceKind.CUDA, "CuPy is installed and Ray sees a GPU", config.device.index, asked)
    if config.device.kind == "cuda":
        raise ServiceFailed(f"device.kind is cuda, but {why}")
    return Place(DeviceKind.HOST, why)


def stream_layers(
    spec: LayerStreamSpec, place: Place, *, conductor: Any = None, sweeping: bool = False
) -> Generator[Item, None, None]:
    """Run the experiment: its Opening, its progress, and the LayerStreamResult last, or the LayerSweep.

    `conductor`: to book with; without one nothing is booked. Whoever stops reading ends the task.
    Raises AdmissionRefused, InvalidRequest, ServiceFailed.
    """
    task = _Task.options(num_gpus=place.num_gpus, name=f"vram:{HOLDER}").remote(spec, place, conductor, sweeping)
    try:
        for reference in task:
            yield ray.get(reference)
    except RayTaskError as error:
        raise own(error) from None
    except RayError as error:
        raise ServiceFailed(f"the task ended before its result: {str(error).partition(chr(10))[0]}") from error
    finally:
        ray.cancel(task)


def _stream_layers(spec: LayerStreamSpec, place: Place, conductor: Any, sweeping: bool) -> Iterator[Item]:
    """The task itself, in a process of its own."""
    _refuse_too_much_host_memory(spec)
    most_iters = MOST_ITERS[spec.compute] if sweeping else spec.compute_iters
    taken = spec.device_bytes(most_iters=most_iters) + (PROCESS_BYTES if place.kind is DeviceKind.CUDA else 0)
    try:
        with _booked(conductor, taken) as reservation, _opened(spec, place, most_iters) as lanes:
            yield Opening(lanes.device, place.kind, place.chosen, taken, reservation)
            yield Progress("making weights", 0, 1)
            fill(lanes.weights)
            reference = Reference(spec, lanes.weights)
            yield from (sweep if sweeping else measure)(lanes, spec, reference, place.kind)
    except (ConductorError, GeneratorExit):
        raise
    except Exception as error:  # CuPy's errors do not survive the way to a process without CuPy
        raise ServiceFailed(f"the experiment failed: {type(error).__name__}: {error}") from error


#: A process of its own for each run, which ends with it: a CUDA context stays for as long as its process. It sees the GPU though
#: Ray lends it none, and NumPy's products take one thread, the compute lane's.
_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_retries": 0,
    "max_calls": 1,
    "runtime_env": {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}},
}
_Task: Any = ray.remote(**_OPTIONS)(_stream_layers)


def _refuse_too_much_host_memory(spec: LayerStreamSpec) -> None:
    available = int(psutil.virtual_memory().available * _SHARE_OF_MEMORY)
    if spec.arena_bytes > available:
        wanted, there = format_bytes(spec.arena_bytes), format_bytes(available)
        raise InvalidRequest("n_layers", f"{spec.n_layers:,} layers are {wanted} of host memory, {there} may be taken")


@contextlib.contextmanager
def _booked(conductor: Any, size: int) -> Iterator[ReservationId | None]:
    """If this process dies meanwhile, its bytes come back without us."""
    if conductor is None:
        yield None
        return
    try:
        id: ReservationId = ray.get(conductor.reserve.remote(HOLDER, size, owner=Owner.current()))
    except RayTaskError as error:
        raise own(error) from None
    try:
        yield id
    finally:
        with contextlib.suppress(UnknownReservation, RayActorError):  # a conductor that was restarted has forgotten it
            ray.get(conductor.release.remote(id))


@contextlib.contextmanager
def _opened(spec: LayerStreamSpec, place: Place, most_iters: int) -> Iterator[Lanes]:
    lanes: Lanes = _cuda_lanes(spec, place.index, most_iters) if place.kind is DeviceKind.CUDA else HostLanes(spec)
    with contextlib.closing(lanes):
        yield lanes


def _cuda_lanes(spec: LayerStreamSpec, index: int, most_iters: int) -> Lanes:
    try:
        from actors.layers.cuda_lanes import CudaLanes

        return CudaLanes(spec, index=index, most_iters=most_iters)
    except ImportError as error:
        extras = "pip install 'vram-conductor[cuda13]', or cuda12 for that CUDA"
        raise ServiceFailed(f"the experiment needs CuPy on a GPU: {extras} ({error})") from error

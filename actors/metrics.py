"""What Prometheus hears of the conductor, through Ray. docs/metrics.md lists it, and a test holds the two together.

Covers the names, what each is made of, and when Ray is told: once a second, in the background. A call only adds to a few sums
here, so it is neither slowed nor made to fail. Does not cover how Ray hands the figures on (docs/metrics.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter as Sums
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from ray.util.metrics import Counter, Gauge

from conductor.errors import AdmissionRefused, ConductorError, WindowRefused
from conductor.types import Admission, DecodeResult, Kind, KvPlace, ServiceClass, Status

_log = logging.getLogger(__name__)

_PREFIX = "vram_conductor_"

#: a metric's name, and the value of each of its labels
Figure: TypeAlias = "tuple[str, tuple[str, ...]]"


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels`: its own, besides `conductor`, the actor's name, which all have."""

    tells: str
    labels: tuple[str, ...] = ()


GAUGES = {
    "cap_bytes": Metric("What may be booked of the device now"),
    "booked_bytes": Metric("What is booked, by what it is for", ("kind",)),
    "device_total_bytes": Metric("The device's size"),
    "device_free_bytes": Metric("What nobody holds of the device"),
    "device_others_bytes": Metric("What the driver and strangers hold of the device"),
    "drift_bytes": Metric("What is booked beyond the cap, because strangers took it"),
    "estimate_error_ratio": Metric("Measured / estimated - 1 of a model's weights at their last load", ("model",)),
    "agents": Metric("Agents, by what they were promised and where their KV is", ("service_class", "kv")),
    "waiting": Metric("Registrations that wait for room and turns that wait for their seat", ("call",)),
    "pools": Metric("Live contexts", ("model",)),
    "slots": Metric("Slots of the pools: with a turn running, with an agent's KV at rest, and free", ("model", "state")),
    "kv_bytes": Metric("Saved KV caches", ("place",)),
    "kv_budget_bytes": Metric("What saved KV caches may take", ("place",)),
}
#: Ray adds _total to these.
COUNTERS = {
    "admissions": Metric("Agents admitted", ("service_class",)),
    "refusals": Metric("Calls refused for want of room", ("call", "code")),
    "errors": Metric("Calls that ended with an error, refusals included", ("call", "error")),
    "turns": Metric("Turns that ended with a result", ("finish_reason",)),
    "tokens": Metric("Tokens of these turns: of the prompt, decoded, reused or copied from others, and generated", ("kind",)),
    "recomputed_tokens": Metric("Tokens that these turns decoded again because their KV was nowhere"),
    "swap_bytes": Metric("KV moved for these turns, both ways"),
    "window_growths": Metric("Windows that these turns outgrew"),
    "pauses": Metric("How often these turns stood still for others"),
    "kv_moved_to_disk": Metric("KV caches that went from host memory to disk"),
    "kv_dropped": Metric("KV caches that found no place or were not worth one"),
    "kv_damaged": Metric("KV caches that failed their check"),
}


class Sink(Protocol):
    """Where the figures go: to Ray, or to a test."""

    def set(self, figure: Figure, value: float) -> None: ...

    def add(self, figure: Figure, more: int) -> None: ...


class Metrics:
    """Belongs to the conductor's event loop.

    `period_s`: a gauge that is not set again vanishes after two of Ray's reports, and there may be one each second.
    """

    def __init__(self, sink: Sink, period_s: float = 1.0) -> None:
        self._sink, self._period_s = sink, period_s
        self._totals: Sums[Figure] = Sums()  #: since the start
        self._told: Sums[Figure] = Sums()  #: of these, what Ray knows
        self._complaints: set[type[Exception]] = set()

    async def run(self, read: Callable[[], Awaitable[Status]]) -> None:
        """Tell Ray what `read` returns and what was counted, again and again, until cancelled."""
        while True:
            with self._harmless():
                self._tell(await read())
            await asyncio.sleep(self._period_s)

    def _tell(self, status: Status) -> None:
        memory = status.host_memory
        fates = {"kv_moved_to_disk": memory.moved_to_disk, "kv_dropped": memory.dropped, "kv_damaged": memory.damaged}
        for name, total in fates.items():
            self._totals[name, ()] = total
        for figure, value in gauges_of(status).items():
            self._sink.set(figure, value)
        for figure, total in self._totals.items():
            if more := total - self._told[figure]:
                self._sink.add(figure, more)
                self._told[figure] = total

    # --- what calls count -------------------------------------------------------------------------------------------

    def admitted(self, admission: Admission) -> None:
        with self._harmless():
            self._totals["admissions", (admission.service_class.value,)] += 1

    def ended(self, turn: DecodeResult) -> None:
        with self._harmless():
            self._totals["turns", (turn.finish_reason.value,)] += 1
            self._totals["tokens", ("prompt",)] += turn.prompt_tokens
            self._totals["tokens", ("reused",)] += turn.prompt_tokens_reused
            self._totals["tokens", ("prefix",)] += turn.prefix_tokens_reused
            self._totals["tokens", ("generated",)] += turn.generated_tokens
            self._totals["recomputed_tokens", ()] += turn.recomputed_tokens
            self._totals["swap_bytes", ()] += turn.swap_bytes
            self._totals["window_growths", ()] += turn.window_growths
            self._totals["pauses", ()] += turn.pauses

    @contextlib.contextmanager
    def errors_of(self, call: str) -> Iterator[None]:
        """Count the error that the call ends with, if it does; it goes on to the caller."""
        try:
            yield
        except ConductorError as error:
            with self._harmless():
                self._totals["errors", (call, type(error).__name__)] += 1
                if isinstance(error, (AdmissionRefused, WindowRefused)):
                    self._totals["refusals", (call, error.refusal.code.value)] += 1
            raise

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What goes wrong with figures is logged, once for each kind of error, and hurts nobody."""
        try:
            yield
        except Exception as error:
            if type(error) not in self._complaints:
                self._complaints.add(type(error))
                _log.warning("metrics are not complete", exc_info=True)


def gauges_of(status: Status) -> dict[Figure, float]:
    """The gauges' values. What nobody has at this moment is told as zero, so that it does not vanish."""
    device, memory = status.device, status.host_memory
    figures: Sums[Figure] = Sums()
    figures.update({("booked_bytes", (kind.value,)): 0 for kind in Kind if kind is not Kind.KV})
    figures.update({("agents", (promised.value, place.value)): 0 for promised in ServiceClass for place in KvPlace})
    figures.update({("waiting", (call,)): 0 for call in ("register", "turn")})
    for model in status.models:
        figures["pools", (model.key,)] = 0
        figures.update({("slots", (model.key, state)): 0 for state in ("busy", "idle", "free")})
    for pool in status.pools:
        figures["pools", (pool.model,)] += 1
        figures["slots", (pool.model, "busy")] += pool.running
        figures["slots", (pool.model, "idle")] += pool.seated - pool.running
        figures["slots", (pool.model, "free")] += pool.slots - pool.seated
    for reserved in status.ledger.reservations:
        figures["booked_bytes", (reserved.kind.value,)] += reserved.bytes
    for agent in status.agents:
        figures["agents", (agent.service_class.value, agent.kv.value)] += 1
    for waiting in status.waiting:
        figures["waiting", (waiting.what,)] += 1
    errors = {model.key: model.estimate_error for model in status.models if model.estimate_error is not None}
    return {
        **figures,
        **{("estimate_error_ratio", (key,)): error for key, error in errors.items()},
        ("cap_bytes", ()): status.ledger.max_bytes,
        ("device_total_bytes", ()): device.total_bytes,
        ("device_free_bytes", ()): device.free_bytes,
        ("device_others_bytes", ()): device.others_bytes,
        ("drift_bytes", ()): device.drift_bytes,
        ("kv_bytes", ("host",)): memory.used_bytes,
        ("kv_bytes", ("disk",)): memory.disk_used_bytes,
        ("kv_budget_bytes", ("host",)): memory.budget_bytes,
        ("kv_budget_bytes", ("disk",)): memory.disk_budget_bytes,
    }


class RayMetrics:
    """Ray's own objects for them. The label `conductor` tells the conductors of a cluster apart."""

    def __init__(self, conductor: str) -> None:
        self._conductor = conductor
        self._gauges = {name: Gauge(_PREFIX + name, it.tells, ("conductor", *it.labels)) for name, it in GAUGES.items()}
        self._counters = {name: Counter(_PREFIX + name, it.tells, ("conductor", *it.labels)) for name, it in COUNTERS.items()}

    def set(self, figure: Figure, value: float) -> None:
        name, values = figure
        self._gauges[name].set(value, self._tags(GAUGES[name], values))

    def add(self, figure: Figure, more: int) -> None:
        name, values = figure
        self._counters[name].inc(more, self._tags(COUNTERS[name], values))

    def _tags(self, metric: Metric, values: tuple[str, ...]) -> dict[str, str]:
        return {"conductor": self._conductor, **dict(zip(metric.labels, values, strict=True))}

"""The metrics' names, labels and, of histograms, limits: what docs/metrics.md lists, and a test holds the two together.

Units are in the names. Does not cover what each is made of (`metrics`) or how Ray is told (`ray_metrics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import TypeAlias

from conductor.errors import RefusalCode
from conductor.types import FinishReason, ServiceClass

#: a metric's name, and the value of each of its labels
Figure: TypeAlias = "tuple[str, tuple[str, ...]]"

#: before all of them; Ray puts `ray_` before that
PREFIX = "vram_conductor_"

#: a swap of a tiny model's KV takes a tenth of a millisecond, a load from a slow disk minutes
_SECONDS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0,
)  # fmt: skip
_PARTS = (0.0001, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels`: its own, besides `conductor`, the actor's name, which all have. `limits`: of a histogram's buckets, above 0."""

    tells: str
    labels: tuple[str, ...] = ()
    limits: tuple[float, ...] = ()


GAUGES = {
    "cap_bytes": Metric("What may be booked of the device now"),
    "booked_bytes": Metric("What is booked, by what it is for", ("kind",)),
    "device_total_bytes": Metric("The device's size"),
    "device_used_bytes": Metric("What is held of the device, by whomever"),
    "device_free_bytes": Metric("What nobody holds of the device"),
    "device_others_bytes": Metric("What the driver and strangers hold of the device"),
    "drift_bytes": Metric("What is booked beyond the cap, because strangers took it"),
    "mirror_state": Metric("1 for how Ray's books compare with the ledger, 0 for the others", ("state",)),
    "mirror_booked_bytes": Metric("What Ray has booked of the device"),
    "mirror_difference_bytes": Metric("What Ray has booked of the device, less what the ledger has"),
    "models": Metric("Models in use, by where their weights are", ("state",)),
    "estimate_error_ratio": Metric("Measured / estimated - 1 of a model's weights at their last load", ("model",)),
    "home_bytes": Metric("Host memory for weights that may leave the device", ("model",)),
    "link_share": Metric("Of what the link gives, what layers took of it while their model decoded", ("model",)),
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
    "window_growths": Metric("Windows that these turns outgrew"),
    "pauses": Metric("How often these turns stood still for others"),
    "swaps": Metric("KV caches that moved: out of a slot, into one, and on from host memory to disk", ("direction",)),
    "swap_bytes": Metric("Their bytes", ("direction",)),
    "loads": Metric("Weights that came to the device, from their file or back from being parked", ("model", "origin")),
    "parks": Metric("Weights that left the device while agents still use their model", ("model",)),
    "kv_moved_to_disk": Metric("KV caches that went from host memory to disk"),
    "kv_dropped": Metric("KV caches that found no place or were not worth one"),
    "kv_damaged": Metric("KV caches that failed their check"),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": Metric("From a turn's arrival to its first token", limits=_SECONDS),
    "mean_inter_token_seconds": Metric("Between two tokens of a turn, its mean, pauses included", limits=_SECONDS),
    "longest_stall_seconds": Metric("The longest time between two tokens of a turn while it ran", limits=_SECONDS),
    "turn_seconds": Metric("From a turn's arrival to its last token", limits=_SECONDS),
    "queue_seconds": Metric("What an admission waited for room, and a turn for its seat", ("call",), _SECONDS),
    "swap_seconds": Metric("For one KV cache to move", ("direction",), _SECONDS),
    "load_seconds": Metric("For weights to come to the device", ("origin",), _SECONDS),
    "park_seconds": Metric("For weights to leave the device", limits=_SECONDS),
    "estimate_miss_ratio": Metric("How far a load was off its estimate, either way, as a part of it", limits=_PARTS),
}
DIRECTIONS = ("out", "in", "on_to_disk")


def beginnings() -> Iterator[Figure]:
    """Counters that can be told of before anything has happened: of the others it is not known what their labels will be.

    A rate over time misses the event that a counter appears with, and most refusals come alone.
    """
    known: dict[str, tuple[Iterable[str], ...]] = {
        "admissions": (_values(ServiceClass),),
        "refusals": (("register", "reserve", "turn"), _values(RefusalCode)),
        "turns": (_values(FinishReason),),
        "tokens": (("prompt", "reused", "prefix", "generated"),),
        "swaps": (DIRECTIONS,),
        "swap_bytes": (DIRECTIONS,),
        **{name: () for name, it in COUNTERS.items() if not it.labels},
    }
    for name, labels in known.items():
        yield from ((name, values) for values in product(*labels))


def _values(kinds: type[Enum]) -> tuple[str, ...]:
    return tuple(str(kind.value) for kind in kinds)

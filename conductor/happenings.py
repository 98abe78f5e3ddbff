"""A line of the history, as it crosses processes. Who writes them: `history`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from conductor.types import ModelKey, Record


class Happening(str, enum.Enum):
    """What a line of the history tells of."""

    ADMITTED = "admitted"
    REFUSED = "refused"  #: a registration, a reservation, or a turn that could not go on
    LEFT = "left"
    RESERVED = "reserved"
    RELEASED = "released"
    LOADED = "loaded"
    PARKED = "parked"  #: weights left the device, and the model's agents are still here
    UNLOADED = "unloaded"
    POOL_OPENED = "pool_opened"
    POOL_CLOSED = "pool_closed"
    SWAPPED_OUT = "swapped_out"  #: KV, to host memory or to disk
    SWAPPED_IN = "swapped_in"
    DROPPED = "dropped"  #: KV that was to be kept, or was kept, and is not: recomputed from the tokens
    FORKED = "forked"
    PAUSED = "paused"  #: a turn stood still, whole
    TURN_ENDED = "turn_ended"
    FAILED = "failed"
    DRIFT = "drift"  #: strangers took what is booked here, or gave it back


@dataclass(frozen=True, slots=True)
class HistoryEntry(Record):
    number: int  #: 1 is the conductor's first; none is left out
    at_s: float  #: since the conductor's start
    kind: Happening
    agent: str | None
    model: ModelKey | None
    bytes: int | None
    ms: float | None  #: how long it took, from the order to the end
    text: str

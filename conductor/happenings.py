"""A line of the history and of the log, as it crosses processes. Who writes them: `history`."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from conductor.types import ModelKey, Record
from conductor.units import format_bytes


class Happening(str, enum.Enum):
    """What a line of the history tells of."""

    ASKED = "asked"  #: for an admission, a reservation, a fork or a turn; in the log alone
    ABANDONED = "abandoned"  #: whoever asked went away; in the log alone
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
    TURN_BEGAN = "turn_began"  #: it has its seat; `ms` is how long it waited; in the log alone
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
    request: int | None = None  #: what it was done for: the number of a call, the same from its being asked to its answer

    def __str__(self) -> str:
        """For people, without the time."""
        figures = ("" if self.bytes is None else format_bytes(self.bytes), "" if self.ms is None else f"{self.ms:,.1f} ms")
        number = "" if self.request is None else f"#{self.request}"
        return " ".join(filter(None, (self.kind.value, number, self.agent, self.model, *figures, self.text)))


#: A screen full of these would say nothing: they are not kept for those who look on.
IN_THE_LOG_ALONE = (Happening.ASKED, Happening.ABANDONED, Happening.TURN_BEGAN)

"""Every booked byte and who holds it.

The ledger is arithmetic, not policy: it refuses to exceed its cap, to release what is not booked and to hold a
byte without a holder. Nothing is clamped. Who may book is decided in `admission`. A cap that falls below what is booked
takes nothing from anybody: the difference is `overdrawn_bytes`, and nothing more can be booked until it is gone.

`split` and `join` hand bytes from one reservation to another without un-booking them, so a switch between agents
can neither fail for want of room nor leave a gap that somebody else could take.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from conductor.errors import InternalError, UnknownReservation
from conductor.types import Kind, Reservation, ReservationId


class OverCap(Exception):
    """Internal to `core`: the booking would exceed the cap. Admission turns it into a refusal with the numbers."""

    def __init__(self, requested_bytes: int, free_bytes: int) -> None:
        super().__init__(requested_bytes, free_bytes)
        self.requested_bytes, self.free_bytes = requested_bytes, free_bytes


@dataclass(frozen=True, slots=True)
class _Title:
    holder: str
    kind: Kind


class Ledger:
    """Integer bytes by reservation, under a cap.

    `prefix` makes ids unique across restarts of the process. Sizes and titles are two maps over the same ids, so
    that the sum of a thousand sizes costs microseconds and is never stored beside what it counts.
    """

    def __init__(self, cap_bytes: int, *, prefix: str = "r") -> None:
        if cap_bytes < 0:
            raise InternalError(f"a cap of {cap_bytes} bytes")
        self._cap = cap_bytes
        #: what was booked when the cap was last set: the most that may be booked beyond it
        self._tolerated = 0
        self._bytes: dict[ReservationId, int] = {}
        self._titles: dict[ReservationId, _Title] = {}
        #: split parts only: the reservation each part's bytes come from and return to
        self._origins: dict[ReservationId, ReservationId] = {}
        self._ids = itertools.count(1)
        self._prefix = prefix
        #: grows with every change of a size: equal means that nothing was booked in between
        self.revision = 0

    @property
    def cap_bytes(self) -> int:
        return self._cap

    def set_cap(self, cap_bytes: int) -> None:
        """Lower or raise the cap. What is booked stays booked."""
        self._require(cap_bytes >= 0, f"a cap of {cap_bytes} bytes")
        if cap_bytes != self._cap:
            self._cap, self._tolerated = cap_bytes, self.allocated_bytes
            self.revision += 1

    @property
    def allocated_bytes(self) -> int:
        return sum(self._bytes.values())

    @property
    def overdrawn_bytes(self) -> int:
        """Booked beyond the cap, since it fell."""
        return max(0, -self.free_bytes)

    @property
    def free_bytes(self) -> int:
        return self._cap - self.allocated_bytes

    def reserve(self, holder: str, kind: Kind, bytes: int) -> ReservationId:
        """Book `bytes` (0 or more) for `holder`. Raises OverCap with nothing changed."""
        self._require(bytes >= 0, f"{holder} books {bytes} bytes")
        self._require_room(bytes)
        return self._open(holder, kind, bytes)

    def resize(self, id: ReservationId, bytes: int) -> None:
        """Set a reservation to `bytes`. Raises OverCap or UnknownReservation with nothing changed."""
        self._require(bytes >= 0, f"{id} resized to {bytes} bytes")
        self._require_room(bytes - self.size(id))
        self._bytes[id] = bytes
        self.revision += 1

    def release(self, id: ReservationId) -> int:
        """Give a reservation's bytes back; returns how many. Raises UnknownReservation."""
        size = self.size(id)
        self._require(id not in self._origins, f"{id} is a part of {self._origins.get(id)}: join it instead")
        self._require(id not in self._origins.values(), f"{id} released while parts of it are in use")
        del self._bytes[id], self._titles[id]
        self.revision += 1
        return size

    def split(self, id: ReservationId, holder: str, kind: Kind, bytes: int) -> ReservationId:
        """Hand `bytes` of reservation `id` to `holder`. The total does not change, so the cap cannot refuse it."""
        self._require(0 <= bytes <= self.size(id), f"{holder} takes {bytes} of the {self.size(id)} bytes of {id}")
        self._require(id not in self._origins, f"{id} is a part itself: split {self._origins.get(id)} instead")
        part = self._open(holder, kind, bytes)
        self._bytes[id] -= bytes
        self._origins[part] = id
        return part

    def join(self, id: ReservationId) -> int:
        """Return a split part to where it came from; returns its bytes."""
        size = self.size(id)
        self._require(id in self._origins, f"{id} was not split from anything")
        self._bytes[self._origins.pop(id)] += size
        del self._bytes[id], self._titles[id]
        self.revision += 1
        return size

    def attach(self, id: ReservationId, to: ReservationId) -> None:
        """Make a reservation a part of another, as if it had been split from it. The total does not change."""
        self._require(id in self._bytes and to in self._bytes, f"{id} attached to {to}, and one of them is not booked")
        self._require(id != to, f"{id} attached to itself")
        self._require(not {id, to} & self._origins.keys(), f"{id} attached to {to}, and one of them is a part already")
        self._require(id not in self._origins.values(), f"{id} has parts of its own")
        self._origins[id] = to
        self.revision += 1

    def detach(self, id: ReservationId) -> None:
        """Make a part a reservation of its own, with its bytes. The total does not change."""
        self._require(id in self._origins, f"{id} is no part of anything")
        del self._origins[id]
        self.revision += 1

    def parts_bytes(self, id: ReservationId) -> int:
        """What is split from a reservation, or attached to it."""
        return sum(self._bytes[part] for part, origin in self._origins.items() if origin == id)

    def size(self, id: ReservationId) -> int:
        try:
            return self._bytes[id]
        except KeyError:
            raise UnknownReservation(id) from None

    def get(self, id: ReservationId) -> Reservation:
        size, title = self.size(id), self._titles[id]
        return Reservation(id, title.holder, title.kind, size)

    def snapshot(self) -> tuple[Reservation, ...]:
        """All reservations in the order they were made, those of no bytes left out."""
        return tuple(self.get(id) for id, size in self._bytes.items() if size)

    def leases(self) -> dict[ReservationId, int]:
        """Bytes by the reservation they were booked under, split parts counted with their origin."""
        whole = dict(self._bytes)
        for part, origin in self._origins.items():
            whole[origin] += whole.pop(part)
        return whole

    def check(self) -> None:
        """Raise InternalError unless every invariant holds."""
        self._require(self._bytes.keys() == self._titles.keys(), "sizes and titles name different reservations")
        self._require(all(size >= 0 for size in self._bytes.values()), "a negative reservation")
        self._require(all(title.holder for title in self._titles.values()), "bytes without a holder")
        self._require(self._origins.keys() <= self._bytes.keys(), "an origin kept for a part that is gone")
        self._require(set(self._origins.values()) <= self._bytes.keys() - self._origins.keys(), "a part without its origin")
        allocated = self.allocated_bytes
        self._require(allocated <= max(self._cap, self._tolerated), f"{allocated} bytes booked under a cap of {self._cap}")

    def _open(self, holder: str, kind: Kind, bytes: int) -> ReservationId:
        self._require(bool(holder), "a reservation without a holder")
        id = ReservationId(f"{self._prefix}{next(self._ids)}")
        self._bytes[id], self._titles[id] = bytes, _Title(holder, kind)
        self.revision += 1
        return id

    def _require_room(self, more: int) -> None:
        if more > 0 and more > (free := self.free_bytes):
            raise OverCap(more, free)

    @staticmethod
    def _require(holds: bool, story: str) -> None:
        if not holds:
            raise InternalError(story)

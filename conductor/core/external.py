"""Other tasks' bytes: booked through `reserve`, by somebody who is no agent, and given back when asked or when the owner dies."""

from __future__ import annotations

from collections.abc import Iterator

from conductor.core.ledger import Ledger
from conductor.types import Kind, OwnerId, ReservationId


class External:
    """A collection of reservations."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: the process that each dies with
        self._owners: dict[ReservationId, OwnerId | None] = {}

    def __iter__(self) -> Iterator[ReservationId]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, id: object) -> bool:
        return id in self._owners

    @property
    def bytes(self) -> int:
        return sum(map(self._ledger.size, self._owners))

    def of(self, owner: OwnerId) -> list[ReservationId]:
        return [id for id, known in self._owners.items() if known == owner]

    def reserve(self, holder: str, bytes: int, owner: OwnerId | None) -> ReservationId:
        """Raises OverCap."""
        id = self._ledger.reserve(holder, Kind.EXTERNAL, bytes)
        self._owners[id] = owner
        return id

    def release(self, id: ReservationId) -> int:
        """Returns its bytes."""
        del self._owners[id]
        return self._ledger.release(id)

"""Registrations that wait for room: first come, first served within a priority; bounded; nobody overtakes.

Who waits grows in priority (`seniority`), so that a stream of urgent newcomers cannot keep anybody out for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from conductor.core.events import RegisterRequested, RequestId


def seniority(priority: int, *, waited_s: float, ageing_s: float) -> float:
    """The rank of somebody who waits: each `ageing_s` counts as one priority."""
    return priority + waited_s / ageing_s


@dataclass(frozen=True, slots=True)
class Waiting:
    request: RegisterRequested
    since: float


class Waitlist:
    """`limit` bounds those who wait for others to leave, not those whose room is only being cleared."""

    def __init__(self, *, limit: int, ageing_s: float) -> None:
        self._limit, self._ageing_s = limit, ageing_s
        self._waiting: dict[RequestId, Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        """In order of arrival."""
        return iter(list(self._waiting.values()))

    def in_order(self, at: float) -> list[Waiting]:
        """In order of precedence. `sorted` is stable and the dict keeps the order of arrival."""
        return sorted(self._waiting.values(), key=lambda waiting: -self._rank(waiting, at))

    def _rank(self, waiting: Waiting, at: float) -> float:
        return seniority(waiting.request.agent.priority, waited_s=at - waiting.since, ageing_s=self._ageing_s)

    @property
    def full(self) -> bool:
        return sum(waiting.request.may_wait for waiting in self._waiting.values()) >= self._limit

    def add(self, request: RegisterRequested, at: float) -> None:
        self._waiting[request.request_id] = Waiting(request, at)

    def remove(self, request_id: RequestId) -> RegisterRequested | None:
        """Take a request out; None if it does not wait (any more)."""
        waiting = self._waiting.pop(request_id, None)
        return waiting.request if waiting else None

    def ahead_of(self, priority: int, at: float) -> int:
        """How many wait whom a newcomer of this priority must not overtake."""
        return sum(self._rank(waiting, at) >= priority for waiting in self._waiting.values())

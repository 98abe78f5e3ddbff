"""Registrations that wait for room: first come, first served within a priority; bounded; nobody overtakes."""

from __future__ import annotations

from collections.abc import Iterator

from conductor.core.events import RegisterRequested, RequestId


class Waitlist:
    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[RequestId, RegisterRequested] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[RegisterRequested]:
        """In order of precedence. `sorted` is stable and the dict keeps the order of arrival."""
        return iter(sorted(self._waiting.values(), key=lambda request: -request.agent.priority))

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._limit

    def add(self, request: RegisterRequested) -> None:
        self._waiting[request.request_id] = request

    def remove(self, request_id: RequestId) -> RegisterRequested | None:
        """Take a request out; None if it does not wait (any more)."""
        return self._waiting.pop(request_id, None)

    def ahead_of(self, priority: int) -> int:
        """How many wait whom a newcomer of this priority must not overtake."""
        return sum(request.agent.priority >= priority for request in self._waiting.values())

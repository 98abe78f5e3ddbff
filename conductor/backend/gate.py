"""A lock that many may hold together or one alone, in turns: nobody starves.

Covers one condition and two ways in. Knows nothing of what it guards.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from conductor.errors import InternalError


class Gate:
    """Who wants to be alone waits for those inside; newcomers wait behind it, and enter before the next one is alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()  # threads
        self._queued: set[int] = set()  # threads that enter when the one alone leaves
        self._wanted_alone = 0  # by how many, the one that is alone included
        self._alone: int | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Together with others. Raises InternalError if this thread is inside already: it could wait for itself."""
        me = threading.get_ident()
        self.require_outside()
        try:
            with self._changed:
                (self._queued if self._wanted_alone else self._inside).add(me)
                self._changed.wait_for(lambda: me in self._inside)
            yield
        finally:
            with self._changed:
                self._inside.discard(me)
                self._queued.discard(me)
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nobody else inside. Raises InternalError if this thread is inside already."""
        me = threading.get_ident()
        self.require_outside()
        with self._changed:
            self._wanted_alone += 1
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._inside and self._alone is None)
                self._alone = me
            yield
        finally:
            with self._changed:
                self._wanted_alone -= 1
                if self._alone in (me, None):  # else an interrupt ended the wait while another was alone
                    self._alone = None
                    self._inside |= self._queued
                    self._queued.clear()
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """How many threads wait to enter, together or alone."""
        with self._changed:
            return len(self._queued) + self._wanted_alone - (self._alone is not None)

    def require_outside(self) -> None:
        """Raises InternalError if this thread is inside."""
        me = threading.get_ident()
        if me in self._inside or me == self._alone:
            raise InternalError("a thread inside the KV arena asks for more of it, and could wait for itself for ever")

"""Work that somebody waits for goes before work that nobody does: both want the memory that the bytes come through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Precedence:
    """`give_way` is called by those who can wait, between two pieces of their work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._first = 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """Who is inside may wait for nobody who gives way."""
        with self._changed:
            self._first += 1
        try:
            yield
        finally:
            with self._changed:
                self._first -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        if self._first:
            with self._changed:
                self._changed.wait_for(lambda: not self._first)

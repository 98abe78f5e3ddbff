"""The CPU threads that all pools share: a step takes as many as its context uses, so that cores are never oversubscribed.

On the host device only; a GPU's steps queue in its driver.
"""

from __future__ import annotations

import threading
from collections import deque

from conductor.errors import InternalError


class ThreadBudget:
    """First come, first served: whoever gives back and asks again stands behind those who wait."""

    def __init__(self, threads: int) -> None:
        self._free = self._total = threads
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Event]] = deque()
        self.contended = False  #: somebody waits: whoever has threads should give them back after its step

    def acquire(self, threads: int) -> None:
        """Blocks. Raises InternalError for more threads than there are: they would be waited for for ever."""
        if threads > self._total:
            raise InternalError(f"{threads} threads asked for, of {self._total}")
        with self._lock:
            if not self._waiting and threads <= self._free:
                self._free -= threads
                return
            granted = threading.Event()
            self._waiting.append((threads, granted))
            self.contended = True
        granted.wait()

    def release(self, threads: int) -> None:
        with self._lock:
            self._free += threads
            if self._free > self._total:
                raise InternalError(f"{self._free} threads given back, of {self._total}")
            while self._waiting and self._waiting[0][0] <= self._free:
                wanted, granted = self._waiting.popleft()
                self._free -= wanted
                granted.set()
            self.contended = bool(self._waiting)

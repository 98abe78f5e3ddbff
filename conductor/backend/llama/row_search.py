"""The place of the highest value in each row of a large matrix, looked for by several threads.

The logits of sixteen agents are 8 MiB that a GPU has just written to host memory: one thread reads them in a third of a
millisecond, for which the GPU waits. numpy lets go of the interpreter meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

#: below it waking a thread takes as long as the search
_WORTH_HELP_BYTES = 1 << 20
#: of a search; a helper that wakes late takes none of them
_PIECE_ROWS = 2


class RowSearch:
    """`helpers`: threads beside the caller's, which end with the process; used by any number of callers at once."""

    def __init__(self, helpers: int) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._helpers = helpers
        for n in range(helpers):
            threading.Thread(target=self._help, name=f"row search {n}", daemon=True).start()

    def __call__(self, rows: npt.NDArray[np.float32]) -> list[int]:
        """The first of the highest of each row."""
        helpers = min(self._helpers, len(rows) // _PIECE_ROWS - 1)
        if helpers < 1 or rows.nbytes < _WORTH_HELP_BYTES:
            best: list[int] = rows.argmax(axis=1).tolist()
            return best
        search = _Search(rows)
        for _ in range(helpers):
            self._work.put(search.help)
        return search.finish()

    def _help(self) -> None:
        while True:
            self._work.get()()


class _Search:
    def __init__(self, rows: npt.NDArray[np.float32]) -> None:
        self._rows, self._best = rows, np.empty(len(rows), np.intp)
        self._starts = itertools.count(0, _PIECE_ROWS)  # `next` of it is one step, whichever thread takes it
        self._found: SimpleQueue[int | BaseException] = SimpleQueue()

    def help(self) -> None:
        """Look through pieces until all are taken."""
        found = 0
        try:
            while (start := next(self._starts)) < len(self._rows):
                piece = self._rows[start : start + _PIECE_ROWS]
                piece.argmax(axis=1, out=self._best[start : start + _PIECE_ROWS])
                found += len(piece)
        except BaseException as error:  # whoever waits must not wait for ever
            self._found.put(error)
        else:
            if found:
                self._found.put(found)

    def finish(self) -> list[int]:
        """Take part, and wait for those who have a piece in hand."""
        self.help()
        missing = len(self._rows)
        while missing:
            found = self._found.get()
            if isinstance(found, BaseException):
                raise found
            missing -= found
        best: list[int] = self._best.tolist()
        return best


@functools.cache
def shared() -> RowSearch:
    """One for all contexts: a few cores of many, and none of few."""
    return RowSearch(min(3, (os.cpu_count() or 1) // 4))

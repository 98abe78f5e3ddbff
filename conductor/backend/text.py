"""Generated tokens as text: never cut inside a character, never past a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextAssembler:
    """Feeds on the bytes of tokens; `ready` is what may be shown, `stopped` whether a stop string appeared.

    Bytes of an unfinished character wait for the next token, text that may be the beginning of a stop string for the
    text that decides it.
    """

    def __init__(self, stop: Sequence[str] = (), *, partial: bytes = b"") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._ready: list[str] = []
        #: bytes that nobody needs as text yet: without stop strings they are decoded when somebody looks
        self._raw: list[bytes] = []
        self._held = self._decoder.decode(partial)
        self.stopped = False

    def add(self, piece: bytes) -> bool:
        """Take in one token's bytes; True if a stop string is complete now."""
        if not self._stop:
            self._raw.append(piece)
            return False
        self._held += self._decoder.decode(piece)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._release(min(found))
            self._held, self.stopped = "", True
            return True
        self._release(len(self._held) - self._may_begin_stop())
        return False

    def take(self) -> str:
        """The text that became ready since the last call."""
        self._decode_raw()
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def finish(self) -> bytes:
        """Release what waited for a stop string that did not come; returns the bytes of an unfinished character."""
        self._decode_raw()
        if not self.stopped:
            self._release(len(self._held))
        return self._decoder.getstate()[0]

    def _decode_raw(self) -> None:
        if self._raw:
            self._ready.append(self._decoder.decode(b"".join(self._raw)))
            self._raw.clear()

    def _release(self, count: int) -> None:
        if count:
            self._ready.append(self._held[:count])
            self._held = self._held[count:]

    def _may_begin_stop(self) -> int:
        """Length of the longest end of the held text that some stop string begins with."""
        longest = max(map(len, self._stop)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

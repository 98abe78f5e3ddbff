"""A saved sequence in a form that contexts of any number of slots take.

llama.cpp writes an attention cache as one stream for each slot of the context: their count, and for each how many cells it
holds, zero for all but the sequence's own. Only these words differ between contexts; the cells are the same. So a state is
kept with room around it for the words of any context, and they are written for the one that is to take it: the empty
streams of the first cache in front of its cells, those of a second one behind, so that nothing has to be moved.

Layouts, after llama.cpp's own header: one cache (full attention; on a hybrid the recurrent state follows, which knows no
streams), two (the layers that do not slide, then those that do), or none (recurrent only).
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass, replace

from conductor.backend.llama.binding import ByteArray
from conductor.core.estimate import MAX_SLOTS

_HEADER = struct.Struct("<II")  # magic, and the slot that it was saved from, which nobody reads
_MAGIC = 0xAF143CD8
_WORD = 4
_ROOM = _WORD * (MAX_SLOTS - 1)  #: for the empty streams of any context


@dataclass(frozen=True, slots=True)
class Form:
    """Where the parts of a saved state lie that are the same for any number of slots, in the memory that was given for it.

    What lies outside of them is nobody's: whoever restores the state writes there. One restore at a time.
    """

    parts: tuple[tuple[int, int], ...]  #: (start, end) of each
    caches: int  #: that have streams

    def packed(self, state: ByteArray) -> Form:
        """The second part moved to where it belongs, once: what a context of several slots had written before it."""
        if len(self.parts) < 2:
            return self
        (first, end), (start, last) = self.parts
        at = end + _WORD * (self.caches - 1)
        if start != at:
            ctypes.memmove(state.ctypes.data + at, state.ctypes.data + start, last - start)
        return replace(self, parts=((first, end), (at, at + last - start)))

    def opened(self, state: ByteArray, slots: int) -> tuple[int, int]:
        """Write the words for a context of so many slots; (where the state begins then, its bytes)."""
        first, last = self.parts[0][0], self.parts[-1][1]
        if not self.caches:
            return first, last - first
        count, empty, base = struct.pack("<I", slots), bytes(_WORD * (slots - 1)), state.ctypes.data
        head = _HEADER.pack(_MAGIC, 0) + count + empty
        # By address: a store gives bytes out read-only, and means those inside the parts.
        ctypes.memmove(base + first - len(head), head, len(head))
        if self.caches == 2:
            ctypes.memmove(base + self.parts[1][0] - _WORD, count, _WORD)
            ctypes.memmove(base + last, empty, len(empty))
            last += len(empty)
        return first - len(head), last - first + len(head)


@dataclass(frozen=True, slots=True)
class Streams:
    """How a context lays out what it saves."""

    slots: int
    caches: int  #: with streams: 0 to 2
    hybrid: bool  #: a recurrent state follows

    @property
    def offset(self) -> int:
        """Where in the memory given for it llama.cpp is to write a state."""
        return _ROOM if self.caches else 0

    @property
    def slack(self) -> int:
        """Bytes around a state as llama.cpp writes it."""
        return (1 + self.caches) * _ROOM - self.caches * _WORD * (self.slots - 1) if self.caches else 0

    def bytes(self, state_bytes: int) -> int:
        """What a state that llama.cpp calls so large takes when it is kept: the same, whatever the number of slots."""
        return state_bytes + self.slack

    def form(self, state: ByteArray, bytes: int, *, second: int, slot: int) -> Form | None:
        """Of what llama.cpp wrote at `offset`: `second` of the bytes are its last part. None if it is laid out otherwise."""
        start, end = self.offset, self.offset + bytes
        if not self.caches:
            return Form(((start, end),), 0)
        if (self.hybrid and self.caches == 2) or struct.unpack_from("<I", state.data, start)[0] != _MAGIC:
            return None
        caches = 1 if second + _HEADER.size == bytes else self.caches
        border = end - second if self.hybrid or caches == 2 else end
        parts = [self._cells(state, start + _HEADER.size, border, slot)]
        if self.hybrid:
            parts.append((border, end))
        elif caches == 2:
            parts.append(self._cells(state, border, end, slot))
        return None if None in parts else Form(tuple(part for part in parts if part), caches)

    def _cells(self, state: ByteArray, start: int, end: int, slot: int) -> tuple[int, int] | None:
        """(start, end) of the one stream that is not empty, if the cache's words are what they should be."""
        behind = self.slots - 1 - slot
        first, last = start + _WORD * (1 + slot), end - _WORD * behind
        if last - first < _WORD:
            return None
        words = struct.unpack_from(f"<{2 + slot}I", state.data, start)
        alone = words[0] == self.slots and not any(words[1:-1]) and words[-1] and not state[last:end].any()
        return (first, last) if alone else None

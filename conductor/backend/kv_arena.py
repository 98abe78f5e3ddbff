"""One block of host memory, shared by saved KVs of any size: first fit, and moved together when only that makes room.

Saving into memory that was touched before runs at copy speed; fresh or pageable memory costs several times as much, which
is why the arena is reused from its start and never grown. Covers places; what is in them, and whether it is still what was
put there, is `kv_store`'s. Safe to use from any thread; bytes are moved under no lock that a reader of numbers would need.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conductor.backend.gate import Gate
from conductor.errors import InternalError

if TYPE_CHECKING:
    from conductor.backend.llama import ByteArray


@dataclass(slots=True, eq=False)
class Span:
    """A place in the arena. It may move between two `open`s, never during one."""

    offset: int
    bytes: int
    holders: int = 1  #: who took it, and whoever keeps it in place of that one while working with it

    @property
    def end(self) -> int:
        return self.offset + self.bytes


class KvArena:
    def __init__(self, memory: ByteArray) -> None:
        self._memory = memory
        self._spans: set[Span] = set()
        self._lock = threading.Lock()  # the table of spans; held for moments
        self._taking = threading.Lock()  # room that was made is for whom it was made
        self._gate = Gate()  # inside: whoever has bytes in view; alone: whoever moves them

    @property
    def budget_bytes(self) -> int:
        return int(self._memory.nbytes)

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return sum(span.bytes for span in self._spans)

    def take(self, bytes: int) -> Span | None:
        """A place of this size, others moved together if need be; None if fewer bytes are free."""
        self._gate.require_outside()
        with self._taking:
            span = self._fit(bytes)
            if span is None and self.budget_bytes - self.used_bytes >= bytes:
                with self._gate.alone():
                    self._make_room(bytes)
                span = self._fit(bytes)
            return span

    def hold(self, span: Span) -> None:
        """Keep the place until a `drop` of one's own, whoever else drops it before."""
        with self._lock:
            self._require(span)
            span.holders += 1

    def drop(self, span: Span) -> None:
        """Free the place, when nobody else holds it."""
        with self._lock:
            self._require(span)
            span.holders -= 1
            if span.holders == 0:
                self._spans.remove(span)

    @contextmanager
    def open(self, span: Span) -> Iterator[ByteArray]:
        """The place's bytes, which stay where they are meanwhile. Nothing else of the arena may be asked for in it."""
        with self._gate.inside():
            yield self._memory[span.offset : span.end]

    def check(self) -> None:
        """Raise InternalError if places overlap or leave the arena."""
        with self._lock:
            edge = 0
            for span in self._by_offset():
                if span.offset < edge or span.bytes < 1 or span.holders < 1:
                    raise InternalError(f"the KV arena is broken at {edge}: {span}")
                edge = span.end
        if edge > self.budget_bytes:
            raise InternalError(f"the KV arena's places end at {edge} of {self.budget_bytes} bytes")

    def _require(self, span: Span) -> None:
        if span not in self._spans:
            raise InternalError(f"a place of {span.bytes} bytes that the KV arena does not know, or that was freed")

    def _by_offset(self) -> list[Span]:
        return sorted(self._spans, key=lambda span: span.offset)

    def _fit(self, bytes: int) -> Span | None:
        """The first hole that is large enough."""
        with self._lock:
            spans = self._by_offset()
            edges = [(0, 0), *((span.offset, span.end) for span in spans), (self.budget_bytes, 0)]
            for (_, end), (start, _) in itertools.pairwise(edges):
                if start - end >= bytes:
                    span = Span(end, bytes)
                    self._spans.add(span)
                    return span
        return None

    def _make_room(self, bytes: int) -> None:
        """Move places together until there is a hole that is large enough.

        Nobody has bytes in view and nobody else takes a place; others may only free theirs, which makes more room.
        """
        with self._lock:
            moves = self._cheapest_moves(bytes)
        for span, offset in moves:
            base = self._memory.ctypes.data
            ctypes.memmove(base + offset, base + span.offset, span.bytes)  # may overlap; the interpreter runs on
            with self._lock:
                span.offset = offset

    def _cheapest_moves(self, bytes: int) -> list[tuple[Span, int]]:
        """The neighbours with enough room between and around them and the fewest bytes to move, each with its new offset.

        Moved to the left one after another, they leave their room in one piece behind the last.
        """
        spans = self._by_offset()
        ends = [0, *(span.end for span in spans)]
        starts = [*(span.offset for span in spans), self.budget_bytes]
        first, moved, best = 0, 0, None
        for last, span in enumerate(spans):
            moved += span.bytes
            # Fewer neighbours as long as that leaves enough room.
            while first < last and starts[last + 1] - ends[first + 1] - (moved - spans[first].bytes) >= bytes:
                moved -= spans[first].bytes
                first += 1
            if starts[last + 1] - ends[first] - moved >= bytes and (best is None or moved < best[0]):
                best = (moved, first, last)
        if best is None:
            return []  # freed meanwhile, so that there is a hole already
        neighbours = spans[best[1] : best[2] + 1]
        offsets = itertools.accumulate((span.bytes for span in neighbours), initial=ends[best[1]])
        return list(zip(neighbours, offsets, strict=False))  # the last offset is where the room begins

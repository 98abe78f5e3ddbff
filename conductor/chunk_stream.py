"""Text on its way from the thread that makes it to whoever reads it: bounded, so that a slow reader slows its own turn only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from conductor.types import Chunk

#: chunks that may wait for a reader before its turn is held; it goes on when they are fetched
MOST_WAITING = 16


class ChunkStream:
    """Between `emit`, which any thread may call, and iteration on the loop that made the stream.

    `on_hold` is told when the reader falls behind, and when it has caught up.
    """

    def __init__(self) -> None:
        self.on_hold: Callable[[bool], None] = lambda held: None
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Chunk | None] = asyncio.Queue()
        self._held = False

    def emit(self, chunk: Chunk) -> None:
        self._loop.call_soon_threadsafe(self._arrived, chunk)

    def close(self) -> None:
        """Nothing comes any more."""
        self._queue.put_nowait(None)

    def _arrived(self, chunk: Chunk) -> None:
        self._queue.put_nowait(chunk)
        if not self._held and self._queue.qsize() >= MOST_WAITING:
            self._hold(True)

    def _hold(self, held: bool) -> None:
        self._held = held
        self.on_hold(held)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """What waits when the reader comes, it gets as one chunk."""
        ended = False
        while not ended and (chunk := await self._queue.get()) is not None:
            text, tokens = [chunk.text], chunk.tokens
            while not ended and not self._queue.empty():
                more = self._queue.get_nowait()
                ended = more is None
                if more is not None:
                    text.append(more.text)
                    tokens += more.tokens
            if self._held:
                self._hold(False)
            yield Chunk("".join(text), tokens)

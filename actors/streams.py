"""Reading a turn as it is made, from a plain program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from actors.connection import own
from actors.naming import call_of
from conductor.errors import ConductorError
from conductor.types import Chunk, DecodeResult

#: Chunks that Ray holds for a reader before the stream waits for it. Set at all, it also ends streams of dead readers.
STREAM_BACKPRESSURE = 32


def stream(conductor: Any, agent_id: str, prompt: str | None = None, **options: Any) -> Iterator[Chunk | DecodeResult]:
    """A turn as it is made: a `Chunk` now and then, the DecodeResult last. A reader that stops ends the turn.

    `conductor`: its handle. `options` are those of `decode`, and what it raises is raised here.
    """
    turn = call_of(conductor, "stream", agent_id).remote(agent_id, prompt, **options)
    finished = False
    try:
        for reference in turn:
            item = ray.get(reference)
            finished = isinstance(item, DecodeResult)
            yield item
    except ConductorError as error:
        finished = True
        raise own(error) from None
    finally:
        if not finished and ray.is_initialized():
            ray.cancel(turn)  # dropping the generator alone would let the turn run on

"""Reading a turn as it is made, from a plain program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from actors.connection import own
from conductor.errors import ConductorError
from conductor.types import Chunk, DecodeResult


def stream(conductor: Any, agent_id: str, prompt: str | None = None, **options: Any) -> Iterator[Chunk | DecodeResult]:
    """Chunks of the turn, its DecodeResult last. A reader that stops ends the turn. Raises what `decode` raises."""
    turn = conductor.stream.remote(agent_id, prompt, **options)
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

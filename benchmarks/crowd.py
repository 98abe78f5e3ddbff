"""Agents of one conductor, through its Ray actor, whose turns one driver asks for at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import ray

import actors
from benchmarks.readings import Reading
from conductor.config import Config
from conductor.types import Chunk, DecodeResult, Status

T = TypeVar("T")


class Crowd:
    """Starts Ray and a conductor; close it."""

    def __init__(self, settings: Config) -> None:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self.conductor = actors.connect(settings)
        self._loop = asyncio.new_event_loop()
        self._agents: list[str] = []

    def close(self) -> None:
        self._loop.close()
        actors.stop(self.conductor)
        ray.shutdown()

    def status(self) -> Status:
        status: Status = ray.get(self.conductor.status.remote())
        return status

    def admit(self, agents: Mapping[str, str], *, window: int) -> None:
        """Make these the agents there are: {agent: model}."""
        for agent in self._agents:
            ray.get(self.conductor.unregister.remote(agent))
        for agent, model in agents.items():
            ray.get(self.conductor.register.remote(agent, model, window=window))
        self._agents = list(agents)

    def decode(self, prompts: Mapping[str, str], max_tokens: int) -> tuple[list[Reading], list[DecodeResult]]:
        """A turn of each agent, all at once; the answers come whole."""
        return self._at_once([self._decode(agent, prompt, max_tokens) for agent, prompt in prompts.items()])

    def stream(self, prompts: Mapping[str, str], max_tokens: int) -> tuple[list[Reading], list[DecodeResult]]:
        """A turn of each agent, all at once; the answers come as they are made."""
        return self._at_once([self._stream(agent, prompt, max_tokens) for agent, prompt in prompts.items()])

    def _at_once(
        self, turns: Sequence[Coroutine[Any, Any, tuple[Reading, DecodeResult]]]
    ) -> tuple[list[Reading], list[DecodeResult]]:
        readings, results = zip(*self._loop.run_until_complete(_gathered(turns)), strict=True)
        return list(readings), list(results)

    async def _decode(self, agent: str, prompt: str, max_tokens: int) -> tuple[Reading, DecodeResult]:
        reading = Reading(time.perf_counter())
        result: DecodeResult = await self.conductor.decode.remote(agent, prompt, max_tokens=max_tokens, reset=True)
        return _ended(reading, result)

    async def _stream(self, agent: str, prompt: str, max_tokens: int) -> tuple[Reading, DecodeResult]:
        reading, result = Reading(time.perf_counter()), None
        async for reference in self.conductor.stream.remote(agent, prompt, max_tokens=max_tokens, reset=True):
            item: Chunk | DecodeResult = await reference
            if isinstance(item, Chunk):
                reading.arrived(item.tokens)
            else:
                result = item
        assert result is not None
        return _ended(reading, result)


def _ended(reading: Reading, result: DecodeResult) -> tuple[Reading, DecodeResult]:
    reading.first_token_s = result.time_to_first_token_ms / 1000
    reading.ended(result.generated_tokens)
    return reading, result


async def _gathered(turns: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    return await asyncio.gather(*turns)

"""Many agents at once, at random: turns awaited, streamed, read slowly, left, cancelled, timed out, forked.

`Storm` drives a plain conductor and keeps an account of every request: what it was and how it ended. Randomness is the seed's;
what it meets is the machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from conductor.errors import ConductorError, TurnCancelled, WindowFull
from conductor.gpu_conductor import GpuConductor
from conductor.types import Chunk, DecodeResult, FinishReason

#: how a request may end: a result by its reason, a reader that left, or one of these errors
EXPECTED_ERRORS = (TurnCancelled, WindowFull)


@dataclass
class Account:
    """One line for each request."""

    endings: Counter[str] = field(default_factory=Counter)
    results: list[DecodeResult] = field(default_factory=list)
    clones: int = 0  #: that had their turn

    @property
    def requests(self) -> int:
        return sum(self.endings.values())

    @property
    def generated_tokens(self) -> int:
        return sum(result.generated_tokens for result in self.results)

    def note(self, result: DecodeResult) -> None:
        self.results.append(result)
        self.endings[result.finish_reason.value] += 1


class Storm:
    """Each agent sends requests one after another, now and then two at once; all agents together send so many."""

    def __init__(self, conductor: GpuConductor, agents: list[str], *, seed: int) -> None:
        self._conductor, self._agents = conductor, agents
        self._chance = random.Random(seed)
        self._left, self._clones = 0, 0
        self.account = Account()

    async def rage(self, requests: int) -> Account:
        self._left = requests
        await asyncio.gather(*(self._agent(agent) for agent in self._agents))
        return self.account

    async def _agent(self, agent: str) -> None:
        doings: list[Callable[[str], Awaitable[None]]] = [
            self._awaits, self._awaits, self._streams, self._streams, self._reads_slowly, self._stops_reading,
            self._goes_away, self._is_cancelled, self._has_little_time, self._is_cloned,
        ]  # fmt: skip
        while self._left > 0:
            at_once = 2 if self._chance.random() < 0.1 else 1
            doing = [self._chance.choice(doings) for _ in range(min(at_once, self._left))]
            self._left -= len(doing)
            await asyncio.gather(*(self._accounted(do, agent) for do in doing))
            await asyncio.sleep(self._chance.choice([0, 0, 0.01, 0.05]))

    async def _accounted(self, do: Callable[[str], Awaitable[None]], agent: str) -> None:
        try:
            await do(agent)
        except EXPECTED_ERRORS as error:
            self.account.endings[type(error).__name__] += 1
        except ConductorError as error:
            self.account.endings[f"unexpected {type(error).__name__}: {error}"] += 1

    def _options(self) -> dict[str, object]:
        chance = self._chance
        words = " ".join(chance.choice(["import", "os", "def", "main", "return", "x"]) for _ in range(chance.randrange(1, 60)))
        return {
            "prompt": f"# {words}\n",
            "max_tokens": chance.choice([1, 8, 20, 40]),
            "temperature": chance.choice([0.0, 0.0, 0.8]),
            "reset": chance.random() < 0.4,
            "context_shift": chance.random() < 0.8,
            "stop": chance.choice([(), (), ("return",)]),
        }

    async def _awaits(self, agent: str) -> None:
        self.account.note(await self._conductor.decode(agent, **self._options()))  # type: ignore[arg-type]

    async def _streams(self, agent: str, *, pause_s: float = 0, stop_after: int | None = None) -> None:
        text, chunks = "", 0
        async with contextlib.aclosing(self._conductor.stream(agent, **self._options())) as turn:  # type: ignore[arg-type, type-var]
            async for item in turn:
                if isinstance(item, Chunk):
                    text, chunks = text + item.text, chunks + 1
                    if chunks == stop_after:
                        self.account.endings["left"] += 1
                        return
                    await asyncio.sleep(pause_s)
                else:
                    assert text == item.text, "chunks and result differ"
                    self.account.note(item)

    async def _reads_slowly(self, agent: str) -> None:
        await self._streams(agent, pause_s=0.02)

    async def _stops_reading(self, agent: str) -> None:
        await self._streams(agent, stop_after=self._chance.randrange(1, 4))

    async def _goes_away(self, agent: str) -> None:
        turn = asyncio.ensure_future(self._awaits(agent))
        await asyncio.wait([turn], timeout=self._chance.choice([0, 0.01, 0.1]))
        if not turn.done():
            turn.cancel()
        try:
            await turn
        except asyncio.CancelledError:
            self.account.endings["left"] += 1

    async def _is_cancelled(self, agent: str) -> None:
        turn = asyncio.ensure_future(self._awaits(agent))
        await asyncio.wait([turn], timeout=self._chance.choice([0, 0.01, 0.1]))
        await self._conductor.cancel(agent)
        await turn

    async def _has_little_time(self, agent: str) -> None:
        options = {**self._options(), "timeout_s": self._chance.choice([0.0, 0.01, 0.1])}
        result = await self._conductor.decode(agent, **options)  # type: ignore[arg-type]
        assert result.generated_tokens or result.finish_reason in (FinishReason.TIMEOUT, FinishReason.CANCELLED)
        self.account.note(result)

    async def _is_cloned(self, agent: str) -> None:
        """The clone has the agent's conversation, speaks once and leaves."""
        self._clones += 1
        clone = f"clone-{self._clones}"
        await self._conductor.fork(agent, clone)
        try:
            result = await self._conductor.decode(clone, **self._options())  # type: ignore[arg-type]
        finally:
            await self._conductor.unregister(clone)
        self.account.note(result)
        self.account.clones += 1

"""A smaller storm through Ray: three processes with agents of their own, and others that are killed in the middle of a stream."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from actors.connection import own
from actors.deaths import Owner
from conductor.errors import TurnCancelled, WindowFull
from conductor.types import DecodeResult, MirrorState
from tests.support.conducting import WITHIN_S, Conduct, Conductor
from tests.support.eventually import eventually
from tests.support.talk import ENDLESS, SHIPPED

AGENTS = 4


class Driver:
    """A process that says all sorts of things to its agents at once, and counts how that ends."""

    def __init__(self, conductor: Any, name: str, seed: int, requests: int) -> None:
        self._conductor, self._name, self._chance = conductor, name, random.Random(seed)
        self._left, self._clones = requests, 0
        self.endings: Counter[str] = Counter()

    async def rage(self) -> Counter[str]:
        agents = [f"{self._name}-{n}" for n in range(AGENTS)]
        for n, agent in enumerate(agents):
            model = ("coder", "reviewer")[n % 2]
            await self._conductor.register.remote(agent, model, window=512, priority=n % 3, owner=Owner.current())
        await asyncio.gather(*(self._agent(agent) for agent in agents))
        for agent in agents:
            await self._conductor.unregister.remote(agent)
        return self.endings

    async def _agent(self, agent: str) -> None:
        doings: list[Callable[[str], Awaitable[str]]] = [
            self._awaits, self._streams, self._stops_reading, self._is_cancelled, self._has_little_time, self._is_cloned,
        ]  # fmt: skip
        while self._left > 0:
            self._left -= 1
            try:
                ending = await self._chance.choice(doings)(agent)
            except RayTaskError as raised:
                error = own(raised)
                expected = isinstance(error, (TurnCancelled, WindowFull))
                ending = type(error).__name__ if expected else f"unexpected {type(error).__name__}: {error}"
            self.endings[ending] += 1

    def _options(self) -> dict[str, Any]:
        chance = self._chance
        options = {"max_tokens": chance.choice([1, 8, 40]), "context_shift": True, "reset": chance.random() < 0.4}
        return {"prompt": "import os\n" * chance.randrange(1, 12), **options}

    async def _awaits(self, agent: str) -> str:
        result: DecodeResult = await self._conductor.decode.remote(agent, **self._options())
        return result.finish_reason.value

    async def _streams(self, agent: str) -> str:
        text = ""
        async for reference in self._conductor.stream.remote(agent, **self._options()):
            item = await reference
            if isinstance(item, DecodeResult):
                return item.finish_reason.value if item.text == text else "unexpected: chunks and result differ"
            text += item.text
        return "unexpected: a stream without a result"

    async def _stops_reading(self, agent: str) -> str:
        stream = self._conductor.stream.remote(agent, **self._options())
        await (await anext(aiter(stream)))
        ray.cancel(stream)
        return "left"

    async def _is_cancelled(self, agent: str) -> str:
        turn = self._conductor.decode.remote(agent, **self._options())
        await self._conductor.cancel.remote(agent)
        result: DecodeResult = await turn
        return result.finish_reason.value

    async def _has_little_time(self, agent: str) -> str:
        timeout_s = self._chance.choice([0.0, 0.01, 0.1])
        result: DecodeResult = await self._conductor.decode.remote(agent, **self._options(), timeout_s=timeout_s)
        return result.finish_reason.value

    async def _is_cloned(self, agent: str) -> str:
        self._clones += 1
        clone = f"{self._name}-clone-{self._clones}"
        await self._conductor.fork.remote(agent, clone, owner=Owner.current())
        try:
            return await self._awaits(clone)
        finally:
            await self._conductor.unregister.remote(clone)


@ray.remote(num_cpus=0, max_retries=0)
def drive(conductor: Any, name: str, seed: int, requests: int) -> Counter[str]:
    return asyncio.run(Driver(conductor, name, seed, requests).rage())


@ray.remote(num_cpus=0, max_retries=0)
def stream_for_ever(conductor: Any, name: str, pid_file: str) -> None:
    """With a clone beside it, and a reservation."""
    ray.get(conductor.register.remote(name, "coder", window=512, owner=Owner.current()))
    ray.get(conductor.fork.remote(name, f"{name}-twin", owner=Owner.current()))
    ray.get(conductor.reserve.remote(name, 1000, owner=Owner.current()))
    for reference in conductor.stream.remote(name, "import os\n", temperature=1.0, **ENDLESS):
        ray.get(reference)
        Path(f"{pid_file}.new").write_text(str(os.getpid()))
        os.replace(f"{pid_file}.new", pid_file)


@pytest.mark.slow
@pytest.mark.parametrize("requests", [25, pytest.param(50, marks=pytest.mark.slow)])
def test_all_requests_are_accounted_for_while_others_are_killed_and_nothing_is_left(
    conduct: Conduct, tmp_path: Path, requests: int
) -> None:
    conductor = conduct(SHIPPED, context={"slots": 2, "first_window": 256}, min_turn_ms=50, stream_interval_ms=1)
    drivers = [drive.remote(conductor.handle, name, seed, requests) for seed, name in enumerate(("ada", "bob", "cleo"))]
    pid_files = [tmp_path / f"victim-{n}" for n in range(3)]
    victims = [stream_for_ever.remote(conductor.handle, file.name, str(file)) for file in pid_files]
    for file in pid_files:
        eventually(file.exists, within_s=60)
        os.kill(int(file.read_text()), signal.SIGKILL)

    accounts = ray.get(drivers)
    assert [account.total() for account in accounts] == [requests] * 3
    together = sum(accounts, Counter())
    assert not [ending for ending in together if ending.startswith("unexpected")], together
    assert together.keys() >= {"length", "timeout", "left", "TurnCancelled"}
    ray.wait(victims, num_returns=len(victims))
    eventually(lambda: is_at_rest(conductor), WITHIN_S)
    mirror = conductor.call("mirrored", 5.0)
    assert (mirror.state, mirror.used_mib) == (MirrorState.EQUAL, 0)
    assert conductor.free_mib() == mirror.total_mib


def is_at_rest(conductor: Conductor) -> bool:
    status = conductor.status()
    return conductor.is_empty() and (status.waiting, status.pools) == ((), ())

"""Readers that fall behind, stop or go away: each holds up its own turn only, and a seat that it does not use is others'."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from conductor.chunk_stream import MOST_WAITING
from conductor.gpu_conductor import GpuConductor
from conductor.types import Chunk, DecodeResult, FinishReason, KvPlace
from tests.conftest import Start
from tests.support.parrot import write_parrot
from tests.support.talk import ENDLESS, agent_of, is_busy, until

SAYS = "abcdefghij"
LONG = 3000
Stream = AsyncIterator[Chunk | DecodeResult]


async def two(start: Start, directory: Path, *, slots: int, **options: Any) -> GpuConductor:
    """Agents `slow` and `quick` on a model that never ends its turn, in one pool of so many seats."""
    path = write_parrot(directory / "endless.gguf", SAYS, ends=False)
    options = {"stream_interval_ms": 0, "context": {"slots": slots}} | options
    conductor = await start({"endless": path}, **options)
    for agent in ("slow", "quick"):
        await conductor.register(agent, "endless", window=4096)
    return conductor


def progress(conductor: GpuConductor) -> dict[str, int]:
    return {str(agent): tokens for agent, tokens in conductor._engine.progress().items()}


async def begun(conductor: GpuConductor, agent: str, **options: Any) -> Stream:
    """A stream of which one chunk was read, and no more since, until its turn is held."""
    stream = conductor.stream(agent, "x", **options)
    assert isinstance(await anext(stream), Chunk)
    await until(lambda: is_held(conductor, agent))
    return stream


async def is_held(conductor: GpuConductor, agent: str) -> bool:
    return any(turn.held for turn in conductor._state.rotation.turns.values() if turn.agent_id == agent)


async def rest_of(stream: Stream) -> tuple[str, DecodeResult]:
    items = [item async for item in stream]
    result = items[-1]
    assert isinstance(result, DecodeResult)
    return "".join(item.text for item in items[:-1] if isinstance(item, Chunk)), result


# --- a reader that does not read ----------------------------------------------------------------------------------------


async def test_who_does_not_read_holds_its_own_turn_and_nobody_elses_and_misses_nothing(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=2)
    expected = (await conductor.decode("quick", "x", max_tokens=LONG)).text
    stream = conductor.stream("slow", "x", max_tokens=LONG)
    first = await anext(stream)
    assert isinstance(first, Chunk)
    await until(lambda: is_held(conductor, "slow"))
    other = await conductor.decode("quick", "x", max_tokens=LONG, reset=True)
    assert other.text == expected, "it goes on to its end"
    held_at = progress(conductor)["slow"]
    assert held_at < LONG
    await conductor.decode("quick", "x", max_tokens=LONG, reset=True)
    assert progress(conductor)["slow"] == held_at, "not a token more"
    text, result = await rest_of(stream)
    assert first.text + text == result.text == expected


async def test_what_waits_for_a_reader_is_bounded_and_comes_as_one_chunk(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=2)
    stream = await begun(conductor, "slow", max_tokens=LONG)
    await conductor.decode("quick", "x", max_tokens=50)
    waiting = progress(conductor)["slow"]
    chunk = await anext(stream)
    assert isinstance(chunk, Chunk)
    assert MOST_WAITING <= chunk.tokens <= waiting
    await rest_of(stream)


@pytest.mark.slow
async def test_a_held_turn_gives_its_seat_up_at_once_and_goes_on_later(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=1, min_turn_ms=600_000)
    stream = await begun(conductor, "slow", max_tokens=LONG)
    expected = (await conductor.decode("quick", "x", max_tokens=LONG)).text
    assert (await agent_of(conductor, "slow")).kv is KvPlace.HOST
    text, result = await rest_of(stream)
    assert result.text == expected
    assert expected.endswith(text)
    assert result.pauses == 1


async def test_a_reader_that_has_caught_up_waits_for_its_seat_like_any_other(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=1, min_turn_ms=600_000)
    stream = await begun(conductor, "slow", **ENDLESS)
    quick = asyncio.create_task(conductor.decode("quick", "x", **ENDLESS))
    await until(lambda: is_busy(conductor, "quick"))
    assert isinstance(await anext(stream), Chunk)
    await until(lambda: waits(conductor, "slow"))
    await conductor.cancel("quick")
    await asyncio.wait([quick])
    assert isinstance(await anext(stream), Chunk)
    await stream.aclose()  # type: ignore[attr-defined]


async def waits(conductor: GpuConductor, agent: str) -> bool:
    return agent in {turn.agent_id for turn in (await conductor.status()).waiting}


@pytest.mark.slow
async def test_a_reader_of_a_turn_that_is_over_has_no_say_in_its_agents_next(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=2)
    first = await begun(conductor, "slow", max_tokens=LONG)
    await conductor.cancel("slow")
    second = await begun(conductor, "slow", max_tokens=LONG, reset=True)
    await conductor.decode("quick", "x", max_tokens=50)
    held_at = progress(conductor)["slow"]
    _, cancelled = await rest_of(first)
    assert cancelled.finish_reason is FinishReason.CANCELLED
    await conductor.decode("quick", "x", max_tokens=LONG)
    assert progress(conductor)["slow"] == held_at, "its own reader has not caught up"
    _, result = await rest_of(second)
    assert result.generated_tokens == LONG


# --- a reader that goes away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("how", ["closed", "forgotten"])
async def test_a_reader_that_goes_away_frees_its_seat(start: Start, tmp_path: Path, how: str, held: bool) -> None:
    conductor = await two(start, tmp_path, slots=1, min_turn_ms=600_000)
    reading = asyncio.Event()

    async def read() -> None:
        async with contextlib.AsyncExitStack() as closing:
            stream = conductor.stream("slow", "x", **ENDLESS)
            if how == "closed":  # and if not, Python closes it because nobody has it any more
                await closing.enter_async_context(contextlib.aclosing(stream))  # type: ignore[type-var]
            async for _ in stream:
                reading.set()
                if held:
                    await asyncio.Event().wait()

    reader = asyncio.create_task(read())
    await reading.wait()
    if held:
        await until(lambda: is_held(conductor, "slow"))
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    del reader
    assert (await conductor.decode("quick", "x", max_tokens=3)).text == "abc"
    assert not await is_busy(conductor, "slow")
    assert conductor._state.rotation.turns == {}
    assert (await conductor.decode("slow", "x", max_tokens=3)).text == "abc"


async def test_a_reader_that_leaves_while_its_turn_waits_for_a_seat_leaves_nothing(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=1, min_turn_ms=600_000)
    quick = asyncio.create_task(conductor.decode("quick", "x", **ENDLESS))
    await until(lambda: is_busy(conductor, "quick"))
    first = asyncio.ensure_future(anext(conductor.stream("slow", "x", **ENDLESS)))
    await until(lambda: waits(conductor, "slow"))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not await waits(conductor, "slow")
    await conductor.cancel("quick")
    await asyncio.wait([quick])
    assert (await conductor.decode("slow", "x", max_tokens=3)).text == "abc"


# --- chunks -------------------------------------------------------------------------------------------------------------


async def test_chunks_are_put_together_over_the_interval(start: Start, tmp_path: Path) -> None:
    conductor = await two(start, tmp_path, slots=1, stream_interval_ms=1000)
    *chunks, result = [item async for item in conductor.stream("slow", "x", max_tokens=LONG)]
    assert isinstance(result, DecodeResult)
    assert result.generated_tokens == LONG
    assert len(chunks) < LONG / 10
    assert "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk)) == result.text

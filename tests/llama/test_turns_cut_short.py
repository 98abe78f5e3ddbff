"""`cancel` and `timeout_s` on the whole conductor: a turn ends with what it made, in whatever moment, and the session goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conductor.errors import InvalidRequest, TurnCancelled, UnknownAgent
from conductor.gpu_conductor import GpuConductor
from conductor.types import DecodeResult, FinishReason
from tests.conftest import Start
from tests.support.parrot import write_parrot
from tests.support.talk import ENDLESS, SHIPPED, agent_of, is_busy, until

SAYS = "abcdefghij"


async def crew(start: Start, directory: Path, **options: object) -> GpuConductor:
    """Agents `ada` and `bob` on a model that never ends its turn, with one seat."""
    path = write_parrot(directory / "endless.gguf", SAYS, ends=False)
    conductor = await start({"endless": path}, **{"context": {"slots": 1}} | options)
    for agent in ("ada", "bob"):
        await conductor.register(agent, "endless", window=512)
    return conductor


async def has_made_some(conductor: GpuConductor, agent: str) -> bool:
    return any(known == agent and tokens > 20 for known, tokens in conductor._engine.progress().items())


def begin(conductor: GpuConductor, agent: str, **options: object) -> asyncio.Task[DecodeResult]:
    return asyncio.create_task(conductor.decode(agent, "x", **{**ENDLESS, **options}))


async def goes_on(conductor: GpuConductor, agent: str, result: DecodeResult) -> None:
    """From exactly where the result ends."""
    after = SAYS[(SAYS.index(result.text[-1]) + 1) % len(SAYS)]
    assert (await conductor.decode(agent, max_tokens=10)).text[0] == after


# --- running ------------------------------------------------------------------------------------------------------------


async def test_a_running_turn_that_is_cancelled_ends_with_what_it_made(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    turn = begin(conductor, "ada")
    await until(lambda: has_made_some(conductor, "ada"))
    assert await conductor.cancel("ada") == 1
    result = await turn
    assert (result.finish_reason, result.stopped_on_eos) == (FinishReason.CANCELLED, False)
    assert result.generated_tokens == len(result.text) > 10
    await goes_on(conductor, "ada", result)


async def test_a_stream_that_is_cancelled_has_its_result_last(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path, stream_interval_ms=0)
    text = ""
    async for item in conductor.stream("ada", "x", **ENDLESS):
        text += item.text if not isinstance(item, DecodeResult) else ""
        if len(text) > 20 and not isinstance(item, DecodeResult):
            await conductor.cancel("ada")
    assert isinstance(item, DecodeResult)
    assert (item.finish_reason, item.text) == (FinishReason.CANCELLED, text)


async def test_a_turn_whose_time_is_up_ends_with_what_it_made(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    result = await begin(conductor, "ada", timeout_s=1.0)
    assert result.finish_reason is FinishReason.TIMEOUT
    assert result.generated_tokens == len(result.text) > 0
    await goes_on(conductor, "ada", result)


async def test_a_turn_that_ends_in_time_is_like_any_other(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    assert (await begin(conductor, "ada", timeout_s=600, max_tokens=5)).finish_reason is FinishReason.LENGTH


async def test_cancelling_twice_ends_it_once(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    turn = begin(conductor, "ada")
    await until(lambda: has_made_some(conductor, "ada"))
    assert await asyncio.gather(conductor.cancel("ada"), conductor.cancel("ada")) == [1, 1], "it has not ended yet"
    assert (await turn).finish_reason is FinishReason.CANCELLED
    assert await conductor.cancel("ada") == 0


async def test_an_agents_turns_end_together_and_nobody_elses(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    turns = [begin(conductor, "ada") for _ in range(3)]
    await until(lambda: has_made_some(conductor, "ada"))
    other = begin(conductor, "bob", max_tokens=5)
    assert await conductor.cancel("ada") == 3
    first, *others = await asyncio.gather(*turns, return_exceptions=True)
    assert isinstance(first, DecodeResult)
    assert [type(outcome) for outcome in others] == [TurnCancelled, TurnCancelled]
    assert (await other).text == "abcde"


async def test_who_is_unknown_is_told_so(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path)
    with pytest.raises(UnknownAgent):
        await conductor.cancel("nobody")
    with pytest.raises(InvalidRequest):
        await conductor.cancel("")
    for nonsense in (-1, float("nan"), "soon", True):
        with pytest.raises(InvalidRequest):
            await conductor.decode("ada", "x", timeout_s=nonsense)  # type: ignore[arg-type]


# --- before it has made anything ----------------------------------------------------------------------------------------


async def a_long_prompt(start: Start) -> tuple[GpuConductor, int]:
    """A conductor that reads prompts token by token, and what `ada` holds."""
    conductor = await start({"reviewer": {"path": SHIPPED["reviewer"], "n_batch": 1}})
    await conductor.register("ada", "reviewer")
    await conductor.decode("ada", "import os\n", max_tokens=8)
    return conductor, (await agent_of(conductor, "ada")).tokens


async def test_a_turn_cancelled_while_its_prompt_is_read_never_was(start: Start) -> None:
    conductor, before = await a_long_prompt(start)
    turn = asyncio.create_task(conductor.decode("ada", "x = eval(y)\n" * 250))
    await until(lambda: is_busy(conductor, "ada"))
    assert await conductor.cancel("ada") == 1
    with pytest.raises(TurnCancelled):
        await turn
    assert (await agent_of(conductor, "ada")).tokens == before


async def test_a_turn_whose_time_is_up_while_its_prompt_is_read_has_no_tokens(start: Start) -> None:
    conductor, before = await a_long_prompt(start)
    turn = asyncio.create_task(conductor.decode("ada", "x = eval(y)\n" * 250, timeout_s=0.02))
    result = await turn
    assert (result.finish_reason, result.tokens, result.text) == (FinishReason.TIMEOUT, (), "")
    assert (await agent_of(conductor, "ada")).tokens == before
    assert (await conductor.decode("ada", "import", max_tokens=1)).prompt_tokens_reused in (before - 1, before)


async def test_a_waiting_turn_is_cancelled_or_has_no_tokens_when_its_time_is_up(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tmp_path, min_turn_ms=600_000)
    running = begin(conductor, "bob")
    await until(lambda: is_busy(conductor, "bob"))
    cancelled = begin(conductor, "ada")
    await asyncio.sleep(0)
    assert await conductor.cancel("ada") == 1
    with pytest.raises(TurnCancelled):
        await cancelled
    for timeout_s in (0, 0.02):
        late = await begin(conductor, "ada", timeout_s=timeout_s)
        assert (late.finish_reason, late.tokens) == (FinishReason.TIMEOUT, ())
    assert not running.done()
    running.cancel()


# --- standing still -----------------------------------------------------------------------------------------------------


async def standing(conductor: GpuConductor, **options: object) -> tuple[asyncio.Task[DecodeResult], asyncio.Task[DecodeResult]]:
    """A turn of `ada` that stands still with something made, while one of `bob` runs."""
    turn = begin(conductor, "ada", **options)
    await until(lambda: has_made_some(conductor, "ada"))
    other = begin(conductor, "bob")
    await until(lambda: stands_still(conductor, "ada"))
    return turn, other


async def stands_still(conductor: GpuConductor, agent: str) -> bool:
    return any(turn.stands_still and turn.has_made for turn in conductor._state.rotation.turns.values() if turn.agent_id == agent)


async def cancel(conductor: GpuConductor) -> FinishReason:
    assert await conductor.cancel("ada") == 1
    return FinishReason.CANCELLED


async def let_time_run_out(conductor: GpuConductor) -> FinishReason:
    return FinishReason.TIMEOUT


@pytest.mark.parametrize(("end", "timeout_s"), [(cancel, None), (let_time_run_out, 2.0)])
async def test_a_turn_that_stands_still_ends_with_what_it_made(
    start: Start, tmp_path: Path, end: Callable[[GpuConductor], Awaitable[FinishReason]], timeout_s: float | None
) -> None:
    conductor = await crew(start, tmp_path, min_turn_ms=10)
    turn, other = await standing(conductor, timeout_s=timeout_s)
    reason = await end(conductor)
    result = await turn
    assert result.finish_reason is reason
    assert result.generated_tokens == len(result.text) > 10
    await conductor.cancel("bob")
    await asyncio.wait([other])
    await goes_on(conductor, "ada", result)

"""Streams and cancellations: whoever leaves, in whatever moment, leaves the device free and the session whole."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest

from conductor.errors import InvalidRequest, TurnCancelled, UnknownAgent, WindowFull
from conductor.types import (
    DecodeResult,
    FinishReason,
)
from tests.conftest import Start
from tests.support.growing import WITHIN_S, stage
from tests.support.parrot import write_parrot
from tests.support.talk import ENDLESS, SHIPPED, agent_of, is_busy, until, user
from tests.support.tiny_gguf import write_tiny_gguf

# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream_interval_ms", [0, 1, 1000])
async def test_chunks_add_up_to_the_result(start: Start, stream_interval_ms: int) -> None:
    conductor = await start({"reviewer": SHIPPED["reviewer"]}, stream_interval_ms=stream_interval_ms)
    await conductor.register("ada", "reviewer")
    messages = [user("Review this Python code for security flaws:\n\n```python\neval(input())\n```")]
    *chunks, result = [item async for item in conductor.stream("ada", messages=messages)]
    assert isinstance(result, DecodeResult)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert sum(chunk.tokens for chunk in chunks) in (result.generated_tokens, result.generated_tokens - 1)  # its end has no text
    assert len(chunks) > 2 or stream_interval_ms
    assert (await conductor.decode("ada", messages=messages, reset=True)).tokens == result.tokens


async def test_an_error_reaches_the_reader_of_a_stream(parrot: Start) -> None:
    conductor = await parrot("abc", window=16)
    for agent, error in (("polly", WindowFull), ("nobody", UnknownAgent), ("", InvalidRequest)):
        with pytest.raises(error):
            _ = [item async for item in conductor.stream(agent, "x" * 20)]


async def test_a_stream_left_in_the_middle_gives_the_device_back_and_keeps_the_session(start: Start, tmp_path: Path) -> None:
    models = {
        "endless": write_parrot(tmp_path / "endless.gguf", "abcdefghij", ends=False),
        "other": write_parrot(tmp_path / "other.gguf", "123"),
    }
    conductor = await start(models, live_contexts=1, stream_interval_ms=0)
    for name, model in (("ada", "endless"), ("bob", "other")):
        await conductor.register(name, model, window=512)
    stream = conductor.stream("ada", "x", **ENDLESS)
    assert "abcdefghij".startswith((await anext(stream)).text)
    await stream.aclose()
    assert (await conductor.decode("bob", "x")).text == "123"
    assert not (await agent_of(conductor, "ada")).busy
    shown = (await conductor.decode("ada", max_tokens=10)).text
    assert shown in "abcdefghij" * 2  # goes on where it was stopped


async def test_a_cancelled_caller_ends_its_turn(start: Start, tmp_path: Path) -> None:
    models = {"endless": write_parrot(tmp_path / "endless.gguf", "abcdefghij", ends=False)}
    conductor = await start(models)
    for name in ("ada", "bob"):
        await conductor.register(name, "endless", window=512)
    turn = asyncio.create_task(conductor.decode("ada", "x", **ENDLESS))
    await until(lambda: is_busy(conductor, "ada"))
    queued = asyncio.create_task(conductor.decode("bob", "x", max_tokens=3))
    turn.cancel()
    assert (await queued).text == "abc"
    with pytest.raises(asyncio.CancelledError):
        await turn


async def test_an_agent_that_is_unregistered_in_the_middle_of_its_turn_is_told_and_gone(parrot: Start) -> None:
    conductor = await parrot("abcdefghij", ends=False)
    stream = conductor.stream("polly", "x", **ENDLESS)
    assert (await anext(stream)).text
    queued = asyncio.create_task(conductor.decode("polly", "x"))
    await asyncio.sleep(0)
    await conductor.unregister("polly")
    assert await conductor.list() == ()
    *_, result = [item async for item in stream]
    assert result.finish_reason is FinishReason.CANCELLED
    with pytest.raises(TurnCancelled):
        await queued


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 4])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
def test_a_turn_ended_in_its_prompt_leaves_the_conversation_as_it_was(
    tmp_path: Path, architecture: str, batches: int, shift: bool
) -> None:
    """Below the conductor, where the moment can be chosen: after so many batches of the prompt."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, sliding_window=32, n_layer=6, seed=9)
    opening, long = "the world and the agent. " * 6, "hello model? " * 16
    answers = []
    with stage(path, tmp_path) as on_stage:
        for name in ("disturbed", "quiet"):
            agent = on_stage.talker(name, window=200, n_batch=16, n_ubatch=16)
            agent.says(opening, max_tokens=12)
            held = agent.tokens
            if name == "disturbed":
                request, window = agent.request(long, max_tokens=12, context_shift=shift), held + 40 if shift else 200
                if batches:
                    agent.in_step(batches, agent.stops)
                begin = agent.begins if batches else functools.partial(agent.begins_and, agent.stops)
                turn = begin(request, window=window)
                with pytest.raises(TurnCancelled):
                    turn.result(WITHIN_S)
            assert agent.tokens == held
            agent.closes()
            agent.opens()
            answers.append(agent.says("hello", max_tokens=12).tokens)
    assert answers[0] == answers[1]


async def test_a_caller_who_leaves_while_the_prompt_is_read_leaves_no_trace(start: Start) -> None:
    conductor = await start({"reviewer": {"path": SHIPPED["reviewer"], "n_batch": 1}})
    for name in ("ada", "bob"):
        await conductor.register(name, "reviewer")
    for name in ("ada", "bob"):
        await conductor.decode(name, "import os\n", max_tokens=8)
    before = (await agent_of(conductor, "ada")).tokens
    long = asyncio.create_task(conductor.decode("ada", "x = eval(y)\n" * 250))
    await until(lambda: is_busy(conductor, "ada"))
    long.cancel()
    await conductor.decode("bob", "import", max_tokens=1)
    assert (await agent_of(conductor, "ada")).tokens == before
    # The last token before the cancelled prompt may have been decoded with it, and then stays in the cache.
    assert (await conductor.decode("ada", "import", max_tokens=1)).prompt_tokens_reused in (before - 1, before)


# --- many at once -----------------------------------------------------------------------------------------------------


async def test_turns_of_one_agent_are_served_in_the_order_of_their_arrival(parrot: Start) -> None:
    conductor = await parrot("abcdefghijklmnopqrstuvwxyz", ends=False, window=512)
    served: list[int] = []

    async def turn(n: int) -> str:
        result = await conductor.decode("polly", "." if n == 0 else None, max_tokens=3)
        served.append(n)
        return result.text

    texts = await asyncio.gather(*map(turn, range(8)))
    assert served == list(range(8))
    assert "".join(texts) == "abcdefghijklmnopqrstuvwx"


async def test_status_answers_while_a_turn_runs(parrot: Start) -> None:
    conductor = await parrot("abcdefghij", ends=False)
    turn = asyncio.create_task(conductor.decode("polly", "x", **ENDLESS))
    await until(lambda: is_busy(conductor, "polly"))
    status = await conductor.status()
    assert not turn.done()
    assert [(agent.id, agent.busy) for agent in status.agents] == [("polly", True)]
    turn.cancel()

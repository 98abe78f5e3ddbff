"""Turns of models larger than the device cut short, or failing: each ends as it should, and the session goes on."""

from __future__ import annotations

import asyncio

import pytest

from conductor.backend.llama import Unmovable
from conductor.errors import DecodeFailed, ModelLoadFailed, TurnCancelled, TurnTimedOut
from conductor.gpu_conductor import GpuConductor
from conductor.types import FinishReason
from tests.support import moving
from tests.support.larger import (
    CREW,
    ROOMY,
    SMALL,
    Begin,
    alone,
    held_bytes,
    joins,
    recomputed,
    residency,
    says,
)  # fmt: skip
from tests.support.moving import Failing
from tests.support.talk import ENDLESS, agent_of, is_busy, until

# --- what ends early, and what fails ------------------------------------------------------------------------------------


async def test_a_turn_that_is_cancelled_or_out_of_time_while_layers_stream_ends_with_what_it_made(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama")
    await joins(conductor, "ada", "llama")
    turn = asyncio.create_task(conductor.decode("ada", "hello", **ENDLESS))
    await until(lambda: has_made_some(conductor, "ada"))
    assert await conductor.cancel("ada") == 1
    result = await turn
    assert (result.finish_reason, result.generated_tokens > 0) == (FinishReason.CANCELLED, True)
    assert (await agent_of(conductor, "ada")).tokens > result.generated_tokens
    timed_out = await conductor.decode("ada", "x", **ENDLESS, timeout_s=0.3)
    assert timed_out.finish_reason is FinishReason.TIMEOUT
    assert (await conductor.decode("ada", "x", max_tokens=3, context_shift=True)).generated_tokens == 3


async def has_made_some(conductor: GpuConductor, agent: str) -> bool:
    return any(known == agent and tokens > 20 for known, tokens in conductor._engine.progress().items())


async def test_whoever_waits_for_the_other_models_turn_may_give_up(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama", "qwen2")
    for agent, model in (("ada", "llama"), ("bob", "qwen2"), ("cy", "qwen2")):
        await joins(conductor, agent, model)
    turn = asyncio.create_task(conductor.decode("ada", "hello", **ENDLESS))
    await until(lambda: is_busy(conductor, "ada"))
    with pytest.raises(TurnTimedOut):
        await conductor.decode("bob", "hello", max_tokens=2, wait_s=0.05)
    waiting = asyncio.create_task(conductor.decode("cy", "hello", max_tokens=2))
    await asyncio.sleep(0)
    await conductor.cancel("cy")
    with pytest.raises(TurnCancelled):
        await waiting
    await conductor.cancel("ada")
    await turn
    assert (await conductor.decode("bob", "hello", max_tokens=2)).generated_tokens == 2


@pytest.mark.parametrize("at_begin", [False, True])
async def test_a_copy_that_fails_ends_the_turn_and_leaves_the_session_as_it_was(begin: Begin, at_begin: bool) -> None:
    [expected], again = await alone(begin, "llama", 1), await recomputed(begin, "llama")
    conductor = await begin(SMALL, "llama")
    await joins(conductor, "ada", "llama")
    with moving.transfers(lambda buffer: Failing(buffer, at_begin=at_begin)) as made:
        assert await says(conductor, "ada", 0) == expected
        before = (await agent_of(conductor, "ada")).tokens
        made[-1].arm(range(3, 4))
        with pytest.raises(DecodeFailed, match="the link is down"):
            await says(conductor, "ada", 1)
        assert (await agent_of(conductor, "ada")).tokens == before
        assert await says(conductor, "ada", 1) == again
    assert (await residency(conductor, "llama")).residency.startswith("streamed")


async def test_what_was_made_before_a_copy_failed_stays_and_the_next_turn_goes_on_there(begin: Begin) -> None:
    [expected] = await alone(begin, "llama", 1)
    conductor = await begin(SMALL, "llama")
    await joins(conductor, "ada", "llama")
    with moving.transfers(lambda buffer: Failing(buffer, at_begin=False)) as made:
        await says(conductor, "ada", 0)
        prompted = (await agent_of(conductor, "ada")).tokens - len(expected)
        made[-1].arm(range(80, 81))
        with pytest.raises(DecodeFailed):
            await says(conductor, "ada", 0, reset=True)
    kept = (await agent_of(conductor, "ada")).tokens - prompted
    assert 0 < kept < len(expected)
    assert (await conductor.decode("ada", max_tokens=len(expected) - kept)).tokens == expected[kept:]


async def test_a_pass_serves_all_and_its_failure_ends_all_their_turns(begin: Begin) -> None:
    conductor = await begin(SMALL, "llama")
    for agent in CREW:
        await joins(conductor, agent, "llama")
    with moving.transfers(lambda buffer: Failing(buffer, at_begin=False)) as made:
        expected = await asyncio.gather(*(says(conductor, agent, 0) for agent in CREW))
        made[-1].arm(range(100_000))
        ended = await asyncio.gather(*(says(conductor, agent, 1) for agent in CREW), return_exceptions=True)
        assert [type(end) for end in ended] == [DecodeFailed] * 3
        made[-1].arm(range(0))
        again = await asyncio.gather(*(says(conductor, agent, 0, reset=True) for agent in CREW))
    assert again == expected


async def test_a_model_that_turns_out_not_to_move_is_loaded_as_ever_or_says_why_not(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: object) -> None:
        raise Unmovable("its structs are others")

    monkeypatch.setattr("conductor.backend.llama.movable.survey", differs)
    roomy = await begin(ROOMY, "llama")
    await joins(roomy, "ada", "llama")
    assert len(await says(roomy, "ada", 0)) == 16
    model = await residency(roomy, "llama")
    assert (model.residency, model.weights, roomy._state.books.homes.ledger.allocated_bytes) == ("resident", None, 0)
    small = await begin(SMALL, "llama")
    await joins(small, "ada", "llama")
    for _ in range(2):
        with pytest.raises(ModelLoadFailed, match="cannot stream: its structs are others"):
            await says(small, "ada", 0)
    assert (held_bytes(small), small._engine._models._loaded) == (0, {})

"""Forks through the whole conductor: a clone says what its source would have said, and reads nothing again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from conductor.errors import (
    AdmissionRefused,
    ConductorError,
    DuplicateAgent,
    InvalidRequest,
    TurnCancelled,
    UnknownAgent,
)
from conductor.gpu_conductor import GpuConductor
from conductor.types import DecodeResult, FinishReason, KvPlace
from tests.conftest import Start
from tests.support.parrot import write_parrot
from tests.support.talk import ENDLESS, SHIPPED, agent_of, is_busy, until, user
from tests.support.tiny_gguf import write_tiny_gguf

OPENING = "the world and the agent say hello to the model. " * 3
SPEECH: dict[str, Any] = {"max_tokens": 40}


def tiny(directory: Path, architecture: str = "llama") -> dict[str, Any]:
    """Six layers, so that one of gemma3's does not slide."""
    path = directory / f"{architecture}.gguf"
    return {"tiny": write_tiny_gguf(path, architecture=architecture, sliding_window=64, n_layer=6, seed=3)}


async def crew(start: Start, models: dict[str, Any], *agents: str, **options: Any) -> GpuConductor:
    """The agents share one seat, and the first has spoken before the second, and so on."""
    conductor = await start(models, **{"context": {"slots": 1}} | options)
    conductor._state.kv_books.disk_bytes_per_s = 1e18  # any file is worth its writing
    for agent in agents:
        await conductor.register(agent, "tiny", window=512)
        await conductor.decode(agent, OPENING, **SPEECH)
    return conductor


async def place(conductor: GpuConductor, agent: str) -> KvPlace:
    return (await agent_of(conductor, agent)).kv


@pytest.mark.parametrize("kept", [KvPlace.SLOT, KvPlace.HOST, KvPlace.DISK])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mamba"])
async def test_a_clone_says_what_its_source_says_wherever_its_kv_is(
    start: Start, tmp_path: Path, architecture: str, kept: KvPlace
) -> None:
    models = tiny(tmp_path, architecture)
    probe = await crew(start, models, "ada", "bob")
    one = (await agent_of(probe, "ada")).saved_bytes
    disk = {"directory": str(tmp_path / "kv"), "budget": "16MiB"}
    others = {KvPlace.SLOT: (), KvPlace.HOST: ("bob",), KvPlace.DISK: ("bob", "cleo")}[kept]
    conductor = await crew(start, models, "ada", *others, disk=disk, host_budget=one * 3 // 2 if kept is KvPlace.DISK else "8MiB")
    if kept is KvPlace.DISK:
        await conductor.unregister("bob")  # whose KV took ada's place
    assert await place(conductor, "ada") is kept

    admission = await conductor.fork("ada", "twin")
    assert (admission.agent_id, admission.window) == ("twin", 512)
    assert (await place(conductor, "ada"), await place(conductor, "twin")) == (kept, KvPlace.HOST)
    before = (await agent_of(conductor, "ada")).tokens
    assert (await agent_of(conductor, "twin")).tokens == before

    said = [await conductor.decode(agent, "and then ", **SPEECH) for agent in ("twin", "ada")]
    assert said[0].tokens == said[1].tokens
    for result in said:
        assert (result.recomputed_tokens, result.prompt_tokens) == (0, said[0].prompt_tokens)
        assert result.prompt_tokens < 10
        assert result.prompt_tokens_reused in (before - 1, before)


async def test_both_go_on_independently(start: Start, tmp_path: Path) -> None:
    models = tiny(tmp_path)
    alone = await crew(start, models, "ada", "bob")
    conductor = await crew(start, models, "ada", context={"slots": 2})
    await conductor.fork("ada", "twin")
    pairs = [("ada", "ada", "one "), ("twin", "bob", "two "), ("ada", "ada", "three "), ("twin", "bob", "four ")]
    for agent, witness, text in pairs:
        said = await conductor.decode(agent, text, **SPEECH)
        assert said.tokens == (await alone.decode(witness, text, **SPEECH)).tokens


async def test_a_clone_of_a_chat_goes_on_with_it(start: Start) -> None:
    conductor = await start({"coder": SHIPPED["coder"]})
    await conductor.register("ada", "coder")
    opening = [user("Write a Python function `add(a, b)` that returns the sum of two numbers.")]
    first = await conductor.decode("ada", messages=opening, max_tokens=60)
    await conductor.fork("ada", "twin")
    messages = [*opening, {"role": "assistant", "content": first.text}, user("And one that subtracts.")]
    said = [await conductor.decode(agent, messages=messages, max_tokens=60) for agent in ("ada", "twin")]
    assert said[0].text == said[1].text
    assert said[1].prompt_tokens_reused >= first.prompt_tokens


async def test_without_room_in_host_memory_a_clone_reads_it_again_and_says_the_same(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tiny(tmp_path), "ada", host_budget="4KiB", context={"slots": 2})
    await conductor.fork("ada", "twin")
    assert await place(conductor, "twin") is KvPlace.TOKENS
    said = [await conductor.decode(agent, "and then ", max_tokens=8) for agent in ("twin", "ada")]
    assert said[0].recomputed_tokens > 0
    assert said[0].tokens == said[1].tokens


@pytest.mark.parametrize("service_class", ["guaranteed", "best_effort"])
async def test_a_clone_is_of_its_sources_class(start: Start, tmp_path: Path, service_class: str) -> None:
    conductor = await start(tiny(tmp_path))
    await conductor.register("ada", "tiny", window=512, service_class=service_class, priority=3)
    await conductor.decode("ada", OPENING, **SPEECH)
    admission = await conductor.fork("ada", "twin")
    assert (admission.service_class.value, admission.priority) == (service_class, 3)
    assert await place(conductor, "twin") is (KvPlace.SLOT if service_class == "guaranteed" else KvPlace.HOST)
    said = [await conductor.decode(agent, "and then ", **SPEECH) for agent in ("twin", "ada")]
    assert said[0].tokens == said[1].tokens
    assert said[0].recomputed_tokens == 0


async def test_a_fork_during_a_turn_takes_what_the_turn_says_and_nothing_later(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tiny(tmp_path), "ada")
    turn = asyncio.create_task(conductor.decode("ada", "and so ", max_tokens=200))
    await until(lambda: is_busy(conductor, "ada"))
    fork = asyncio.create_task(conductor.fork("ada", "twin"))
    await until(lambda: has_come(conductor, "twin"))
    later = asyncio.create_task(conductor.decode("ada", "later ", max_tokens=200))
    await fork
    assert turn.done()
    assert not later.done()
    held = (await agent_of(conductor, "twin")).tokens
    assert (await later).prompt_tokens_reused in (held - 1, held)
    assert (await conductor.decode("twin", "later ", max_tokens=200)).tokens == later.result().tokens


async def has_come(conductor: GpuConductor, agent: str) -> bool:
    return agent in {known.id for known in await conductor.list()}


# --- what fails ---------------------------------------------------------------------------------------------------------


async def test_what_cannot_be_forked_is_told_and_books_nothing(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tiny(tmp_path), "ada", "bob")
    before = await conductor.status()
    names: list[tuple[Any, Any, type[ConductorError]]] = [
        ("nobody", "twin", UnknownAgent), ("ada", "bob", DuplicateAgent), ("ada", "ada", DuplicateAgent),
        ("ada", "", InvalidRequest), ("", "twin", InvalidRequest), ("ada", 7, InvalidRequest),
        ("ada", "x" * 10_000, InvalidRequest),
    ]  # fmt: skip
    for source, new, error in names:
        with pytest.raises(error):
            await conductor.fork(source, new)
    with pytest.raises(InvalidRequest, match="new_id"):
        await conductor.fork("ada", "\n")
    with pytest.raises(InvalidRequest):
        await conductor.fork("ada", "twin", wait_s=-1)
    after = await conductor.status()
    assert after.ledger.reservations == before.ledger.reservations
    assert [agent.id for agent in after.agents] == ["ada", "bob"]
    assert after.host_memory.used_bytes == before.host_memory.used_bytes


async def test_a_clone_that_does_not_fit_is_refused_like_any_other(start: Start, tmp_path: Path) -> None:
    conductor = await start(tiny(tmp_path), device={"kind": "host", "host_bytes": "16MiB"})
    await conductor.register("ada", "tiny", window=512, service_class="guaranteed")
    await conductor.decode("ada", OPENING, **SPEECH)
    ledger = (await conductor.status()).ledger
    await conductor.reserve("trainer", ledger.max_bytes - ledger.allocated_bytes)
    with pytest.raises(AdmissionRefused):
        await conductor.fork("ada", "twin")
    assert [agent.id for agent in await conductor.list()] == ["ada"]


@pytest.mark.parametrize("how", ["caller", "cancel", "source", "clone", "owner"])
async def test_a_fork_that_waits_ends_with_whoever_leaves_and_nothing_of_it_is_left(
    start: Start, tmp_path: Path, how: str
) -> None:
    conductor = await start({"endless": write_parrot(tmp_path / "endless.gguf", "abcdefghij", ends=False)})
    await conductor.register("ada", "endless", window=256)
    booked = (await conductor.status()).ledger.allocated_bytes
    turn = asyncio.create_task(conductor.decode("ada", "x", **ENDLESS))
    await until(lambda: is_busy(conductor, "ada"))
    fork = asyncio.create_task(conductor.fork("ada", "twin", owner="worker of twin"))
    await until(lambda: has_come(conductor, "twin"))
    match how:
        case "caller":
            fork.cancel()
        case "cancel":
            assert await conductor.cancel("ada") == 2
        case "source":
            await conductor.unregister("ada")
        case "clone":
            await conductor.unregister("twin")
        case "owner":
            conductor.owner_died("worker of twin")
    expected = {"caller": asyncio.CancelledError, "cancel": TurnCancelled}.get(how, UnknownAgent)
    with pytest.raises(expected):
        await fork
    assert not await has_come(conductor, "twin")
    if how in ("source", "cancel"):
        assert await ending(turn) in (FinishReason.CANCELLED, TurnCancelled)
    else:
        assert not turn.done()
        assert (await conductor.status()).ledger.allocated_bytes == booked
        turn.cancel()


async def ending(turn: asyncio.Task[DecodeResult]) -> object:
    """With what it made or, if that was nothing, an error."""
    (outcome,) = await asyncio.gather(turn, return_exceptions=True)
    return outcome.finish_reason if isinstance(outcome, DecodeResult) else type(outcome)


async def test_a_clone_for_a_dead_owner_is_not_admitted(start: Start, tmp_path: Path) -> None:
    conductor = await crew(start, tiny(tmp_path), "ada")
    conductor.owner_died("worker of twin")
    with pytest.raises(UnknownAgent):
        await conductor.fork("ada", "twin", owner="worker of twin")
    assert [agent.id for agent in await conductor.list()] == ["ada"]

"""Requests at random by the hundred: 32 agents on three models, more than there are seats and memory for, and nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conductor.gpu_conductor import GpuConductor
from conductor.types import KvPlace
from tests.support.storm import Storm
from tests.support.talk import SHIPPED
from tests.support.tiny_gguf import write_tiny_gguf

Start = Callable[..., Awaitable[GpuConductor]]


@pytest.mark.parametrize("requests", [300, pytest.param(1000, marks=pytest.mark.slow)])
async def test_random_requests_are_all_accounted_for_and_everything_comes_to_rest(start: Start, requests: int) -> None:
    conductor = await start(
        SHIPPED,
        live_contexts=None,
        device={"kind": "host", "host_bytes": "40MiB"},
        host_budget="6MiB",
        context={"slots": 4, "first_window": 256},
        min_turn_ms=50,
        max_stall_ms=50,
    )
    agents = [f"agent-{i}" for i in range(32)]
    for i, agent in enumerate(agents):
        model = ("coder", "reviewer", "documenter")[i % 3]
        service_class = "best_effort" if i % 5 == 0 else "shared"
        await conductor.register(agent, model, window=512, priority=i % 3, service_class=service_class)
    before = (await conductor.status()).ledger.allocated_bytes

    account = await Storm(conductor, agents, seed=4).rage(requests)

    assert account.requests == requests
    assert not [ending for ending in account.endings if ending.startswith("unexpected")], account.endings
    assert account.clones > requests // 20
    assert account.endings.keys() >= {"length", "timeout", "cancelled", "left", "TurnCancelled"}
    conductor.check()
    status = await conductor.status()
    assert (status.waiting, [agent.id for agent in status.agents if agent.busy]) == ((), [])
    assert sum(pool.running for pool in status.pools) == 0
    for agent in agents:  # every session goes on
        again = await conductor.decode(agent, "import os\n", max_tokens=2, context_shift=True)
        assert again.generated_tokens
    for agent in agents:
        await conductor.unregister(agent)
    status = await conductor.status()
    assert before
    assert (status.ledger.allocated_bytes, status.host_memory.used_bytes) == (0, 0)
    assert (status.agents, status.models, status.pools) == ((), (), ())


@pytest.mark.slow
async def test_more_agents_than_seats_take_turns_and_each_says_what_it_says_alone(start: Start, tmp_path: Path) -> None:
    """With the same batch shape: one seat, so that every step has one sequence."""
    models = {"tiny": write_tiny_gguf(tmp_path / "tiny.gguf", n_layer=6)}
    prompts = {f"agent-{i}": f"{i} is a number " * 4 for i in range(6)}
    alone, crowded = await start(models, context={"slots": 1}), await start(models, context={"slots": 1}, min_turn_ms=10)
    expected = {}
    for agent, prompt in prompts.items():
        await alone.register(agent, "tiny", window=1024)
        await crowded.register(agent, "tiny", window=1024)
        expected[agent] = (await alone.decode(agent, prompt, max_tokens=500)).tokens
    results = await asyncio.gather(*(crowded.decode(agent, prompt, max_tokens=500) for agent, prompt in prompts.items()))
    assert {result.agent_id: result.tokens for result in results} == expected
    assert all(result.pauses for result in results), "nobody had a turn in one piece"
    assert {agent.kv for agent in await crowded.list()} == {KvPlace.SLOT, KvPlace.HOST}

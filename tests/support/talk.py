"""Words and waits that stories about turns share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from conductor.gpu_conductor import GpuConductor
from conductor.types import AgentStatus

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {name: ROOT / "models" / f"{name}.gguf" for name in ("coder", "reviewer", "documenter")}

TASK = "Write a Python function `add(a, b)` that returns the sum of two numbers."
ANOTHER = "Write a Python function `sub(a, b)` that returns the difference of two numbers."
#: a turn that only a cancellation ends, if the model never ends it
ENDLESS: dict[str, Any] = {"max_tokens": 2**31 - 1, "context_shift": True}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def agent_of(conductor: GpuConductor, id: str) -> AgentStatus:
    return next(agent for agent in await conductor.list() if agent.id == id)


async def is_busy(conductor: GpuConductor, id: str) -> bool:
    return (await agent_of(conductor, id)).busy


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """For facts that another task brings about: lets it run, and asks again."""

    async def ask() -> None:
        while not await condition():  # noqa: ASYNC110 (the conductor tells nobody when a turn begins)
            await asyncio.sleep(0)

    await asyncio.wait_for(ask(), timeout=20)

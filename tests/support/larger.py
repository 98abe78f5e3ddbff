"""Models of several MiB on host devices of fewer: conductors, what agents say there, and what the device holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from conductor.gpu_conductor import GpuConductor
from conductor.types import ModelStatus
from tests.conftest import Start
from tests.support.tiny_gguf import write_tiny_gguf

#: eight layers of about a MiB
GEOMETRY: dict[str, Any] = {"n_layer": 8, "n_embd": 128, "n_ff": 512, "sliding_window": 32}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"architecture": "qwen2", "tied": True},
    "gemma3": {"architecture": "gemma3"},
    "experts": {"n_expert": 4, "n_ff": 192},
}
CONTEXT = {"n_batch": 64, "n_ubatch": 16, "first_window": 256}
SMALL, FOR_ONE, ROOMY = "5MiB", "10MiB", "64MiB"
BEST_EFFORT = "best_effort"
#: a conversation; greedy ones of random weights repeat themselves, so what is drawn tells more
TURNS: tuple[dict[str, Any], ...] = (
    {"prompt": "hello world, a prompt of more than one step of sixteen tokens, and longer than the window that slides"},
    {"prompt": " and another", "temperature": 1.0, "seed": 7},
    {"prompt": " once more", "temperature": 0.8, "seed": 11},
)
MOST_TURNS = 2 * len(TURNS)
CREW = ("ada", "bob", "cy")

Begin = Callable[..., Awaitable[GpuConductor]]
_known: dict[str, list[tuple[int, ...]]] = {}


def write_large(directory: Path) -> dict[str, Path]:
    return {name: write_tiny_gguf(directory / f"{name}.gguf", **GEOMETRY | options) for name, options in KINDS.items()}


def begins(start: Start, models: dict[str, Path]) -> Begin:
    """`await begin(SMALL, "llama", …)`: a conductor on so much memory, and its models."""

    async def begin(host_bytes: str, *names: str, **options: Any) -> GpuConductor:
        its = {name: models[name] for name in names}
        device = {"kind": "host", "host_bytes": host_bytes}
        return await start(its, device=device, admission_percent=100, context=CONTEXT, **options)

    return begin


async def joins(conductor: GpuConductor, agent: str, model: str) -> None:
    await conductor.register(agent, model, window=512, service_class=BEST_EFFORT)


async def says(conductor: GpuConductor, agent: str, turn: int, **options: Any) -> tuple[int, ...]:
    asked = {"max_tokens": 16, **TURNS[turn % len(TURNS)], **options}
    return (await conductor.decode(agent, asked.pop("prompt"), **asked)).tokens


async def converses(conductor: GpuConductor, agent: str, turns: int = len(TURNS)) -> list[tuple[int, ...]]:
    return [await says(conductor, agent, turn) for turn in range(turns)]


async def alone(begin: Begin, model: str, turns: int = len(TURNS)) -> list[tuple[int, ...]]:
    """What an agent says where there is room for all of its model; asked once, for all models, and as often as any test wants."""
    if not _known:
        conductor = await begin(ROOMY, *KINDS)
        for kind in KINDS:
            await joins(conductor, "alone", kind)
            said = await converses(conductor, "alone", MOST_TURNS)
            assert (await residency(conductor, kind)).residency == "resident"
            assert len({*said}) == MOST_TURNS
            await conductor.unregister("alone")
            _known[kind] = said
    return _known[model][:turns]


async def recomputed(begin: Begin, model: str) -> tuple[int, ...]:
    """What it says in its second turn if it lost the KV of the first: sums round otherwise when many tokens are read at once."""
    conductor = await begin(ROOMY, model, host_budget=0)
    await joins(conductor, "alone", model)
    await says(conductor, "alone", 0)
    reservation = await conductor.reserve("trainer", 60 << 20)
    await conductor.release(reservation)
    result = await conductor.decode("alone", **{"max_tokens": 16, **TURNS[1]})
    assert result.recomputed_tokens > 0
    return result.tokens


async def residency(conductor: GpuConductor, model: str) -> ModelStatus:
    return next(it for it in (await conductor.status()).models if it.key == model)


def held_bytes(conductor: GpuConductor) -> int:
    """What is on the device: the buffers that weights are in, and what llama.cpp says that contexts take."""
    loaded = list(conductor._engine._models._loaded.values())
    windows = [it.model.weights._window for it in loaded if it.model.weights is not None]
    return sum(window.bytes for window in windows if window is not None) + conductor._engine._pools.used_bytes


@asynccontextmanager
async def watched(conductor: GpuConductor) -> Any:
    """While others are at work, the device never holds more than is booked."""
    looks = 0

    async def watch() -> None:
        nonlocal looks
        while True:
            held, by_account = held_bytes(conductor), conductor._engine.used_bytes()
            ledger = conductor._state.ledger
            assert max(held, by_account) <= ledger.allocated_bytes <= ledger.cap_bytes
            looks += 1
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    yield
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert looks > 5

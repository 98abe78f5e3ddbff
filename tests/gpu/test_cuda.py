"""The same paths as on the host, on a real GPU: run them on a machine that has one and a CUDA build of llama-cpp-python."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conductor.backend.llama import Llama
from conductor.config import Config, parse_config
from conductor.errors import AdmissionRefused
from conductor.gpu_conductor import GpuConductor
from conductor.types import DeviceKind, Kind, KvPlace
from conductor.units import MIB
from tests.support.bare_loop import bare_loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Llama.instance().supports_gpu, reason="this llama-cpp-python was built without CUDA"),
]

MODELS = Path(__file__).resolve().parents[2] / "models"
ROLES = ("coder", "reviewer", "documenter")


def configured(**options: object) -> Config:
    document = {
        "device": {"kind": "cuda", "limit": "8GiB"},
        "host_kv_budget": "256MiB",
        "models": {role: {"path": str(MODELS / f"{role}.gguf")} for role in ROLES},
        **options,
    }
    return parse_config(document, source="test", directory=MODELS)


def story(act: Callable[[GpuConductor], Awaitable[None]], config: Config) -> None:
    """Run a story in a conductor of its own and check the books at its end."""

    async def told() -> None:
        conductor = GpuConductor(config)
        await conductor.start()
        try:
            await act(conductor)
            conductor.check()
        finally:
            await conductor.close()

    asyncio.run(told())


def test_the_device_is_the_gpu_and_the_arena_is_page_locked() -> None:
    async def act(conductor: GpuConductor) -> None:
        status = await conductor.status()
        assert status.device.kind is DeviceKind.CUDA
        assert status.host_memory.pinned
        assert [r.kind for r in status.ledger.reservations] == [Kind.OVERHEAD]

    story(act, configured())


def test_swapped_conversations_go_on_with_the_tokens_of_uninterrupted_runs() -> None:
    chance = random.Random(7)
    order = [role for role in ROLES for _ in range(20)]
    chance.shuffle(order)
    prompts = {role: [f"def step_{i}({role}):\n" for i in range(20)] for role in ROLES}

    async def act(conductor: GpuConductor) -> None:
        made: dict[str, list[list[int]]] = {role: [] for role in ROLES}
        for role in ROLES:
            await conductor.register(role, role)
        for role in order:
            result = await conductor.decode(role, prompts[role][len(made[role])], max_tokens=16)
            made[role].append(list(result.tokens))
        for role in ROLES:
            expected = bare_loop(MODELS / f"{role}.gguf", prompts[role], max_tokens=16, window=2048, gpu=True)
            assert made[role] == expected

    story(act, configured())


def test_the_ledger_and_the_driver_agree_on_what_is_taken() -> None:
    async def act(conductor: GpuConductor) -> None:
        before = (await conductor.status()).device.free_bytes
        for role in ROLES:
            await conductor.register(role, role)
        await conductor.decode("coder", "import os\n", max_tokens=8)
        status = await conductor.status()
        booked = sum(r.bytes for r in status.ledger.reservations if r.kind in (Kind.WEIGHTS, Kind.CONTEXT))
        taken = before - status.device.free_bytes
        # The driver hands out 2 MiB at a time, and a context takes some MiB of temporary pool beside its buffers.
        assert booked <= taken + 2 * MIB * len(status.ledger.reservations)
        assert taken <= booked + 96 * MIB

    story(act, configured())


def test_kv_comes_back_from_page_locked_memory() -> None:
    async def act(conductor: GpuConductor) -> None:
        await conductor.register("a", "coder")
        await conductor.register("b", "reviewer")
        await conductor.decode("a", "import os\n", max_tokens=32)
        evicting = await conductor.decode("b", "import os\n", max_tokens=4)
        assert evicting.kv_swap_evicted == "a"
        assert [agent.kv for agent in await conductor.list()] == [KvPlace.HOST, KvPlace.SLOT]
        returned = await conductor.decode("a", "import sys\n", max_tokens=4)
        assert returned.kv_swap_restored
        assert returned.recomputed_tokens == 0

    story(act, configured())


def test_what_is_booked_at_admission_is_what_llama_takes_and_the_estimate_takes_nothing() -> None:
    async def act(conductor: GpuConductor) -> None:
        before = (await conductor.status()).device.free_bytes
        with pytest.raises(AdmissionRefused):
            await conductor.register("greedy", "coder", window=1_900_000)  # priced by a dry run, and refused
        assert (await conductor.status()).device.free_bytes >= before - 32 * MIB
        for role in ROLES:
            await conductor.register(role, role)
        booked = (await conductor.status()).ledger.allocated_bytes
        for role in ROLES:
            await conductor.decode(role, "import os\n", max_tokens=2)
        assert (await conductor.status()).ledger.allocated_bytes == booked

    story(act, configured())

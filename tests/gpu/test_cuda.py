"""The same paths as on the host, on a real GPU: run them on a machine that has one and a CUDA build of llama-cpp-python."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from conductor.backend.device import margins
from conductor.backend.llama import Llama
from conductor.config import Config, parse_config
from conductor.errors import AdmissionRefused, RefusalCode
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
        "host_budget": "256MiB",
        "live_contexts": 1,
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
        assert {r.kind for r in status.ledger.reservations} == {Kind.OVERHEAD}

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
    """Without a limit: on a limited card the reading is what is left of the limit by our own account."""

    async def act(conductor: GpuConductor) -> None:
        device = conductor._engine.device
        for role in ROLES:
            await conductor.register(role, role, service_class="guaranteed")
            await conductor.decode(role, "import os\n" * 100, max_tokens=8)
        status = await conductor.status()
        assert device.taken_bytes() <= status.ledger.allocated_bytes, "what the driver gave out is booked, all of it"
        kernels = sum(bytes for _, bytes in margins(DeviceKind.CUDA))
        assert device.taken_bytes() >= status.ledger.allocated_bytes - kernels - 32 * MIB

    story(act, configured(device={"kind": "cuda"}))


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
            await conductor.register("greedy", "coder", window=1_900_000, service_class="guaranteed")
        assert (await conductor.status()).device.free_bytes >= before - 32 * MIB
        for role in ROLES:
            await conductor.register(role, role)
        booked = (await conductor.status()).ledger.allocated_bytes
        for role in ROLES:
            await conductor.decode(role, "import os\n", max_tokens=2)
        assert (await conductor.status()).ledger.allocated_bytes == booked

    story(act, configured())


# --- windows that grow, classes, strangers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_window_that_grows_makes_the_tokens_of_a_run_with_the_whole_window(role: str) -> None:
    prompts = [f"def step_{i}(text):\n    return text\n" * 8 for i in range(4)]

    async def act(conductor: GpuConductor) -> None:
        await conductor.register(role, role)
        results = [await conductor.decode(role, prompt, max_tokens=64) for prompt in prompts]
        assert sum(result.window_growths for result in results) >= 2
        assert all(result.recomputed_tokens == 0 for result in results)
        expected = bare_loop(MODELS / f"{role}.gguf", prompts, max_tokens=64, window=2048, gpu=True)
        assert [list(result.tokens) for result in results] == expected

    story(act, configured(context={"first_window": 256}))


def test_a_guaranteed_agent_stays_while_others_take_turns() -> None:
    async def act(conductor: GpuConductor) -> None:
        await conductor.register("firm", "coder", service_class="guaranteed")
        await conductor.register("a", "reviewer", service_class="best_effort")
        await conductor.register("b", "documenter")
        for agent in ("firm", "a", "b", "firm", "a", "firm"):
            result = await conductor.decode(agent, "import os\n", max_tokens=4)
            assert agent != "firm" or not (result.kv_swap_restored or result.kv_swap_evicted or result.recomputed_tokens)

    story(act, configured())


STRANGER = """
import sys
from cupy.cuda import runtime
runtime.setDevice(0)
held = runtime.malloc(int(sys.argv[1]))
print("holds", flush=True)
sys.stdin.read()
"""


def test_a_stranger_lowers_the_cap_and_nobody_is_dropped() -> None:
    async def act(conductor: GpuConductor) -> None:
        await conductor.register("ada", "coder")
        await conductor.decode("ada", "import os\n", max_tokens=4)
        before = await conductor.status()
        share = before.ledger.max_bytes - before.ledger.allocated_bytes // 2
        stranger = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STRANGER, str(share), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert stranger.stdin is not None
        assert stranger.stdout is not None
        assert await stranger.stdout.readline() == b"holds\n"
        try:
            with pytest.raises(AdmissionRefused) as refused:
                await conductor.register("bob", "reviewer", service_class="guaranteed")
            assert refused.value.code is RefusalCode.DRIFT
            during = await conductor.status()
            assert during.ledger.max_bytes <= before.ledger.max_bytes - share
            assert (await conductor.decode("ada", "import re\n", max_tokens=4)).generated_tokens == 4
        finally:
            stranger.stdin.close()
            await stranger.wait()
        await conductor.register("bob", "reviewer", service_class="guaranteed")
        after = await conductor.status()
        assert after.ledger.max_bytes >= before.ledger.max_bytes - 32 * MIB

    story(act, configured(device={"kind": "cuda"}))


def test_parked_weights_are_back_on_the_device_for_somebody_else() -> None:
    """Room for one model's turn at a time: each best-effort turn parks the other's weights."""

    async def act(conductor: GpuConductor) -> None:
        for role in ROLES:
            await conductor.register(role, role, service_class="best_effort")
        largest = (await conductor.status()).ledger.allocated_bytes
        rest = (await conductor.status()).ledger.max_bytes - largest
        filler = await conductor.reserve("filler", rest)
        texts = {role: [await conductor.decode(role, "import os\n", max_tokens=8)] for role in ROLES}
        states = {model.key: model.state for model in (await conductor.status()).models}
        assert sorted(state.value for state in states.values()).count("resident") == 1
        for role in ROLES:
            texts[role].append(await conductor.decode(role, "import os\n", max_tokens=8, reset=True))
            assert texts[role][0].tokens == texts[role][1].tokens
        await conductor.release(filler)

    story(act, configured())

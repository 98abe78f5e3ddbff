"""A KV cache that leaves the device and comes back, at three levels: llama.cpp alone, the engine, the plain conductor.

Each level has `figures()`: one save and restore, in milliseconds. All three go to page-locked memory where there is a GPU.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import llama_cpp.llama_cpp as llama

from benchmarks.bare import BareModel
from conductor.backend.engine import Engine
from conductor.backend.llama import ByteArray
from conductor.backend.turn import TurnOrder
from conductor.config import Config
from conductor.core.estimate import ModelPlan
from conductor.gpu_conductor import GpuConductor
from conductor.types import AgentId, ContextSpec, DecodeRequest, DecodeResult, KvPlace, PoolId

#: what a turn that follows a swap says
_MORE = "\n"


class BareSwap:
    """llama.cpp's own save and restore of one sequence; close it."""

    def __init__(self, model: BareModel, spec: ContextSpec, *, n_threads: int) -> None:
        self._model = model
        self._context = model.context(replace(spec, slots=1), n_threads=n_threads)
        self._n_batch = spec.n_batch

    def close(self) -> None:
        llama.llama_free(self._context)

    def prefill_ms(self, text: str) -> float:
        """Read a text into the empty sequence: what it takes to compute the KV instead of keeping it."""
        tokens = self._model.tokenize(text)
        ids = (llama.llama_token * len(tokens))(*tokens)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        began = time.perf_counter()
        for start in range(0, len(tokens), self._n_batch):
            part = ctypes.cast(ctypes.byref(ids, 4 * start), ctypes.POINTER(llama.llama_token))
            batch = llama.llama_batch_get_one(part, min(self._n_batch, len(tokens) - start))
            assert llama.llama_decode(self._context, batch) == 0
        llama.llama_synchronize(self._context)
        return (time.perf_counter() - began) * 1000

    @property
    def bytes(self) -> int:
        return int(llama.llama_state_seq_get_size(self._context, 0))

    def figures(self, buffer: ByteArray) -> dict[str, float]:
        size = self.bytes
        to = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        began = time.perf_counter()
        assert llama.llama_state_seq_get_data(self._context, to, size, 0) == size
        saved = time.perf_counter()
        assert llama.llama_state_seq_set_data(self._context, to, size, 0) == size
        llama.llama_synchronize(self._context)
        return {"save_ms": (saved - began) * 1000, "restore_ms": (time.perf_counter() - saved) * 1000}


#: longer than the checksum of any KV measured here takes
_REST_S = 0.2


class EngineSwap:
    """The engine's: with the place it takes in the arena, its label and its checksum, in the pool's thread. Close it."""

    def __init__(self, config: Config, plan: ModelPlan, spec: ContextSpec) -> None:
        self._engine = Engine(config)
        self._plan, self._spec = plan, replace(spec, slots=1)
        self._pool, self._agent = PoolId("swap"), AgentId("swap")
        self._engine.load(plan)
        self._engine.open_pool(self._pool, plan.id, self._spec, for_agent=self._agent)

    def close(self) -> None:
        self._engine.close_pool(self._pool)
        self._engine.unload(self._plan.id)
        self._engine.close()

    def hold(self, text: str) -> int:
        """The conversation is that text from now on, and its KV in the seat. Returns its tokens."""
        self._engine.take_seat(self._agent, self._pool).result()
        window = self._spec.window
        request = DecodeRequest(prompt=text, max_tokens=1)
        self._engine.run_turn(TurnOrder(self._agent, request, window=window, room=window, context_shift=False)).result()
        return self._engine.tokens(self._agent)

    def let_go(self) -> None:
        self._engine.leave_seat(self._agent, to=KvPlace.TOKENS).result()
        self._engine.forget(self._agent)

    def figures(self) -> dict[str, float]:
        began = time.perf_counter()
        closed = self._engine.leave_seat(self._agent, to=KvPlace.HOST).result()
        saved = time.perf_counter() - began
        time.sleep(_REST_S)  # its checksum is made behind the copy; nobody comes back before that but a benchmark
        began = time.perf_counter()
        restored = self._engine.take_seat(self._agent, self._pool).result()
        taken = time.perf_counter() - began
        assert closed.place is KvPlace.HOST, "the KV was not saved"
        assert restored == closed.saved_bytes, "the KV was not restored"
        return {"save_ms": saved * 1000, "restore_ms": taken * 1000, "bytes": float(restored)}


class ConductorSwap:
    """Two agents that share one slot: each turn of the one saves the other's KV and restores its own. Close it."""

    def __init__(self, config: Config, model: str, *, window: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._model, self._window = model, window
        self._conductor = GpuConductor(config)
        self._agents: tuple[str, ...] = ()
        self._next = itertools.count()
        self._loop.run_until_complete(self._conductor.start())

    def close(self) -> None:
        self._loop.run_until_complete(self._conductor.close())
        self._loop.close()

    def hold(self, text: Callable[[], str]) -> None:
        """Two new agents, each with a conversation of one text."""
        for agent in self._agents:
            self._loop.run_until_complete(self._conductor.unregister(agent))
        self._agents = tuple(f"swap-{next(self._next)}" for _ in range(2))
        for agent in self._agents:
            self._loop.run_until_complete(self._conductor.register(agent, self._model, window=self._window))
            self._turn(agent, text())

    def figures(self) -> dict[str, float]:
        """A turn of the agent whose KV is away, and another one of it right after: the difference is what the swap cost."""
        away, seated = self._agents
        self._agents = (seated, away)
        time.sleep(_REST_S)  # the checksum of what left last is made behind the turn that it left for
        switched, result = self._turn(away, _MORE)
        assert result.kv_swap_restored, "nothing was swapped"
        assert result.kv_swap_evicted == seated, "nobody had to leave"
        stayed, result = self._turn(away, _MORE)
        assert not result.kv_swap_restored, "it was swapped again"
        return {"switched_ms": switched, "stayed_ms": stayed, "switch_ms": switched - stayed}

    def _turn(self, agent: str, text: str) -> tuple[float, DecodeResult]:
        began = time.perf_counter()
        result = self._loop.run_until_complete(self._conductor.decode(agent, text, max_tokens=1))
        return (time.perf_counter() - began) * 1000, result

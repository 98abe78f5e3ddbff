"""The plain class behind the actor: every public call, checked and turned into an event.

Knows nothing of Ray: `actors.conductor_actor` wraps it, tells it when an owner dies and mirrors `bookings()`. Does not
cover how actions are carried out (`executive`) or decided (`core.state`).
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from conductor import __version__, requests
from conductor.backend.catalog import Catalog
from conductor.backend.device import cap_bytes
from conductor.backend.engine import Engine
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.estimate import KV_BLOCKS, ModelPlan
from conductor.core.events import AgentSpec
from conductor.core.ledger import OverCap
from conductor.core.sessions import Phase, Stage
from conductor.core.state import State
from conductor.errors import ConfigError, ModelLoadFailed
from conductor.executive import Executive
from conductor.types import (
    Admission,
    AgentStatus,
    Chunk,
    ContextSpec,
    DecodeResult,
    DeviceStatus,
    Kind,
    LedgerStatus,
    MirrorState,
    MirrorStatus,
    ModelStatus,
    OwnerId,
    Reservation,
    ReservationId,
    Status,
)
from conductor.units import MIB, format_bytes


class GpuConductor:
    """Admission, residency and turns of many agents on one device. Create it, then `await start()`."""

    def __init__(self, config: Config, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self._on_change = on_change
        self._started_at = time.monotonic()
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take the device. Idempotent; every public call awaits it. Raises ConfigError."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        # A busy thread otherwise holds the interpreter 5 ms at a time, which a decode of 1 ms would wait for.
        sys.setswitchinterval(1e-4)
        self._loop = asyncio.get_running_loop()
        self._io_threads = ThreadPoolExecutor(4, thread_name_prefix="load")
        self._estimate_thread = ThreadPoolExecutor(1, thread_name_prefix="estimate")
        self._engine = await self._loop.run_in_executor(self._io_threads, Engine, self.config)
        self._catalog = Catalog(self.config)
        self._state = State(
            cap_bytes=cap_bytes(self._engine.device, self.config.admission_percent),
            live_contexts=self.config.live_contexts,
            waitlist_limit=self.config.waitlist_limit,
            id_prefix=f"{secrets.token_hex(2)}-",
        )
        self._book_overhead()
        self._executive = Executive(
            self.config, self._state, self._engine, io_threads=self._io_threads, on_change=self._on_change
        )

    def _book_overhead(self) -> None:
        overhead = self._engine.overhead_bytes
        try:
            self._state.books.book_overhead("process", overhead)
        except OverCap as excess:
            problem = f"the process itself takes {format_bytes(overhead)} there, and {format_bytes(excess.free_bytes)} are free"
            raise ConfigError(self.config.source, "device", problem) from None

    async def close(self) -> None:
        """Stop turns, unload everything, end the threads."""
        await self.start()
        self._executive.stop_turns()
        agents = [agent.id for agent in self._state.agents.values() if agent.stage is Stage.ADMITTED]
        await asyncio.gather(*(self.unregister(agent_id) for agent_id in agents), return_exceptions=True)
        self._executive.close()
        self._engine.close()
        self._io_threads.shutdown(wait=False)
        self._estimate_thread.shutdown(wait=False)

    # --- public calls -----------------------------------------------------------------------------------------------

    async def register(
        self,
        agent_id: str,
        model: str,
        *,
        window: int | None = None,
        priority: int = 0,
        wait_s: float = 0,
        owner: OwnerId | None = None,
    ) -> Admission:
        """Admit an agent, or refuse it with nothing changed. Raises InvalidRequest, ModelError, AdmissionRefused."""
        await self.start()
        arrived_at = time.monotonic()
        id, patience = requests.agent_id(agent_id), requests.wait_s(wait_s)
        asked = None if window is None else requests.window(window)
        rank = requests.priority(priority)
        plan = await self._plan(requests.text("model", model))
        context = self.config.context_spec(plan.key, asked or self.config.window(plan.key, plan.geometry.trained_window))
        _check_kv_type(plan, context)
        estimate = functools.partial(self._engine.estimator.estimate, plan, context, at_most=self.cap_bytes)
        footprint = await self._loop.run_in_executor(self._estimate_thread, estimate)
        plan = replace(plan, weights_bytes=footprint.weights_bytes)
        spec = AgentSpec(id, plan, context, footprint.context_bytes, rank, owner)
        request = self._executive.request()
        event = events.RegisterRequested(request, spec, may_wait=patience > 0)
        time_is_up = events.RegisterAbandoned(request, timed_out=True)
        deadline = self._loop.call_later(patience, self._executive.dispatch, time_is_up) if patience else None
        try:
            admitted: actions.Admit = await self._executive.ask(request, event)
        except asyncio.CancelledError:
            self._executive.dispatch(events.RegisterAbandoned(request))  # a grant that nobody receives is given back
            raise
        finally:
            if deadline is not None:
                deadline.cancel()
        return Admission(
            agent_id=id,
            model=plan.key,
            window=context.window,
            priority=rank,
            weights_bytes=admitted.weights_bytes,
            context_bytes=admitted.context_bytes,
            charged_bytes=admitted.charged_bytes,
            model_loaded=admitted.model_loaded,
            waited_s=time.monotonic() - arrived_at,
            warnings=_warnings(plan, context.window, footprint.kv_bytes, self.config.host_kv_budget),
        )

    async def _plan(self, model: str) -> ModelPlan:
        return await self._loop.run_in_executor(self._io_threads, self._catalog.plan, model, self._engine.device.kind)

    async def unregister(self, agent_id: str) -> None:
        """Let an agent go; when this returns, its bytes are back, and its model's if it was the last. Raises UnknownAgent."""
        await self.start()
        request = self._executive.request()
        await self._executive.ask(request, events.UnregisterRequested(request, requests.agent_id(agent_id)))

    async def decode(
        self,
        agent_id: str,
        prompt: str | None = None,
        *,
        messages: Any = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        stop: Any = (),
        reset: bool = False,
        context_shift: bool | None = None,
    ) -> DecodeResult:
        """One turn. Raises InvalidRequest, UnknownAgent, WindowFull, ModelError, DecodeFailed, TurnCancelled."""
        request = requests.decode_request(
            prompt, messages=messages, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, seed=seed, stop=stop, reset=reset, context_shift=context_shift,
        )  # fmt: skip
        await self.start()
        return await self._executive.turn(requests.agent_id(agent_id), request, emit=None)

    async def stream(self, agent_id: str, prompt: str | None = None, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        """`decode` with its text as it is made: chunks, and the result last. Leaving the iteration ends the turn."""
        defaults: dict[str, Any] = {
            name: value for name, value in (GpuConductor.decode.__kwdefaults__ or {}).items() if name not in options
        }
        request = requests.decode_request(prompt, **defaults, **options)
        await self.start()
        queue: asyncio.Queue[Chunk | None] = asyncio.Queue()

        def emit(chunk: Chunk) -> None:
            self._loop.call_soon_threadsafe(queue.put_nowait, chunk)

        turn = asyncio.create_task(self._executive.turn(requests.agent_id(agent_id), request, emit=emit))
        turn.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (chunk := await queue.get()) is not None:
                yield chunk
            yield turn.result()
        finally:
            turn.cancel()

    async def reserve(self, holder: str, bytes: int, *, owner: OwnerId | None = None) -> ReservationId:
        """Book device memory for anything that is no agent. Raises InvalidRequest, AdmissionRefused."""
        await self.start()
        request = self._executive.request()
        event = events.ReserveRequested(request, requests.holder(holder), requests.bytes_(bytes), owner)
        id: ReservationId = await self._executive.ask(request, event)
        return id

    async def release(self, reservation_id: str) -> int:
        """Give a reservation back; returns its bytes. Raises UnknownReservation."""
        await self.start()
        request = self._executive.request()
        id = ReservationId(requests.text("reservation_id", reservation_id))
        released: int = await self._executive.ask(request, events.ReleaseRequested(request, id))
        return released

    def owner_died(self, owner: OwnerId) -> None:
        """Take back everything that the dead process held."""
        self._executive.dispatch(events.OwnerDied(owner))

    # --- what it looks like -----------------------------------------------------------------------------------------

    def bookings(self) -> dict[ReservationId, tuple[str, int]]:
        """Label and bytes of everything booked, parts counted with the whole they were taken from."""
        ledger = self._state.ledger
        return {id: (_label(ledger.get(id)), size) for id, size in ledger.leases().items() if size}

    @property
    def cap_bytes(self) -> int:
        return self._state.ledger.cap_bytes

    async def status(self, mirror: MirrorStatus | None = None) -> Status:
        await self.start()
        state, ledger, device = self._state, self._state.ledger, self._engine.device
        reading = device.read()
        unmirrored = MirrorStatus(MirrorState.UNMIRRORED, "", 0, 0, ledger.allocated_bytes / MIB, "no Ray here")
        return Status(
            version=__version__,
            device=DeviceStatus(
                device.name, device.kind, reading.total_bytes, reading.free_bytes, device.others_bytes, device.chosen
            ),
            ledger=LedgerStatus(ledger.cap_bytes, ledger.allocated_bytes, ledger.snapshot()),
            live_contexts=state.rotation.live_contexts,
            models=tuple(
                ModelStatus(
                    model.plan.key,
                    model.plan.path,
                    model.state,
                    sum(agent.model_id == id for agent in state.agents.values()),
                    ledger.size(model.reservation),
                )
                for id, model in state.models.items()
            ),
            agents=await self.list(),
            waiting=len(state.waitlist),
            host_memory=self._engine.host_memory(),
            mirror=mirror or unmirrored,
            llama_cpp=self._engine.version,
            estimates=self._engine.estimator.how,
            threads=self._engine.threads,
            uptime_s=time.monotonic() - self._started_at,
        )

    async def list(self) -> tuple[AgentStatus, ...]:
        """The agents, in the order of their admission."""
        await self.start()
        return tuple(
            AgentStatus(
                id=agent.id,
                model=agent.spec.model.key,
                window=agent.spec.context.window,
                tokens=agent.tokens,
                kv=agent.place,
                priority=agent.spec.priority,
                context_bytes=agent.context_bytes,
                host_bytes=agent.host_bytes,
                busy=agent.phase is Phase.BUSY,
                turns=agent.turns,
            )
            for agent in self._state.agents.values()
        )

    def check(self) -> None:
        """Raise InternalError unless every invariant of the policy holds."""
        self._state.check()

def _label(booked: Reservation) -> str:
    return "turns" if booked.kind is Kind.HEADROOM else f"{booked.kind.value}:{booked.holder}"


def _check_kv_type(plan: ModelPlan, context: ContextSpec) -> None:
    """What llama.cpp would refuse only when the context is made, after the agent was admitted."""
    block, _ = KV_BLOCKS[context.kv_type]
    for size in (plan.geometry.head_dim_k, plan.geometry.head_dim_v):
        if size % block:
            problem = f"its head size of {size} cannot be cut into the blocks of {block} that {context.kv_type} has"
            raise ModelLoadFailed(plan.path, problem)


def _warnings(plan: ModelPlan, window: int, kv_bytes: int, host_kv_budget: int) -> tuple[str, ...]:
    warnings = []
    trained = plan.geometry.trained_window
    if window > trained:
        warnings.append(f"{window} tokens are more than the {trained} that {plan.key} was trained with; expect worse answers")
    if kv_bytes > host_kv_budget:
        warnings.append(
            f"a full window has {format_bytes(kv_bytes)} of KV, host_kv_budget is {format_bytes(host_kv_budget)}: what does not "
            "fit there is recomputed when the agent comes back, slower and with other rounding"
        )
    return tuple(warnings)

"""The plain class behind the actor: every public call, checked and turned into an event.

Knows nothing of Ray: `actors.conductor_actor` wraps it, tells it when an owner dies and mirrors `bookings()`. Does not
cover how actions are carried out (`executive`) or decided (`core.state`).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil

from conductor import requests
from conductor.backend.device import cap_bytes, margins
from conductor.backend.engine import Engine
from conductor.chunk_stream import ChunkStream
from conductor.config import Config
from conductor.core import actions, events
from conductor.core.events import AgentSpec
from conductor.core.ledger import OverCap
from conductor.core.state import Rules, State
from conductor.errors import ConfigError, ServiceFailed, UnknownAgent
from conductor.executive import Executive
from conductor.happenings import HistoryEntry
from conductor.quotes import Quotes
from conductor.status import Picture
from conductor.types import (
    Admission,
    AgentId,
    AgentStatus,
    Chunk,
    DecodeResult,
    Kind,
    LedgerEntry,
    MirrorStatus,
    OwnerId,
    Reservation,
    ReservationId,
    ServiceClass,
    Status,
)
from conductor.units import MIB, format_bytes

#: a driver's figures move by some MiB for reasons of their own, and Ray keeps a record of every change it is told
_STRANGERS_STEP_BYTES = 64 * MIB


class GpuConductor:
    """Admission, residency and turns of many agents on one device. Create it, then `await start()`."""

    def __init__(self, config: Config, *, on_change: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self._on_change = on_change
        self._started_at = time.monotonic()
        self._starting: asyncio.Task[None] | None = None
        self._closed = False
        #: owners whose death was told lately: a registration of theirs may still be on its way
        self._dead_owners: deque[OwnerId] = deque(maxlen=1024)

    async def start(self) -> None:
        """Take the device. Idempotent; every call awaits it. Raises ConfigError, and ServiceFailed once closed."""
        if self._closed:
            raise _closed()
        await self._started()

    async def _started(self) -> None:
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
        self._quotes = Quotes(self.config, self._engine)
        config, device = self.config, self._engine.device
        self._state = State(
            _rules(config, link_bytes_per_s=self._engine.link_bytes_per_s),
            cap_bytes=cap_bytes(device.read(), config.admission_percent),
            id_prefix=f"{secrets.token_hex(2)}-",
        )
        self._book_overhead()
        self._executive = Executive(config, self._state, self._engine, io_threads=self._io_threads, on_change=self._on_change)
        self._picture = Picture(self._state, self._engine, self._executive)
        self._watch = asyncio.create_task(self._watch_device())

    def _book_overhead(self) -> None:
        lines = (("process", self._engine.overhead_bytes), *margins(self._engine.device.kind))
        for holder, overhead in lines:
            try:
                self._state.books.book_overhead(holder, overhead)
            except OverCap as excess:
                problem = f"{holder} takes {format_bytes(overhead)} there, and {format_bytes(excess.free_bytes)} are free"
                raise ConfigError(self.config.source, "device", problem) from None

    async def _watch_device(self) -> None:
        """Read the device again and again: strangers come and go, and what idles is given back in its time."""
        while True:
            await asyncio.sleep(self.config.device.reread_s)
            try:
                await self._executive.read_device()
            except Exception:  # told in the log by whoever raised it; the next reading may succeed
                continue

    async def close(self) -> None:
        """Stop turns, refuse who waits, unload everything, end the threads. Every later call raises ServiceFailed."""
        if self._closed:
            return
        await self.start()
        self._closed = True
        self._watch.cancel()
        self._executive.dispatch(events.Closing(_closed()))
        await self._executive.idle()
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
        service_class: str = ServiceClass.SHARED.value,
        priority: int = 0,
        wait_s: float = 0,
        owner: OwnerId | None = None,
    ) -> Admission:
        """Admit an agent, or refuse it with nothing changed. Raises InvalidRequest, ModelError, AdmissionRefused."""
        await self.start()
        arrived_at = time.monotonic()
        id, patience = requests.agent_id(agent_id), requests.wait_s(wait_s)
        asked = None if window is None else requests.window(window)
        rank, promised = requests.priority(priority), requests.service_class(service_class)
        key = requests.text("model", model)
        plan = await self._loop.run_in_executor(self._io_threads, self._quotes.plan, key)
        unpriced = AgentSpec(id, plan, self._quotes.context(plan, asked), (), promised, rank, owner)
        spec = await self._loop.run_in_executor(self._estimate_thread, self._quotes.priced, unpriced)
        await self._executive.read_device()
        if owner in self._dead_owners:  # its death was told when there was nothing of it to give back yet
            raise UnknownAgent(id)
        admitted = await self._admit(spec, patience)
        return self._admission(admitted, arrived_at)

    def _admission(self, admitted: actions.Admit, arrived_at: float) -> Admission:
        spec = admitted.agent
        return Admission(
            agent_id=spec.id,
            model=spec.model.key,
            window=spec.context.window,
            service_class=spec.service_class,
            priority=spec.priority,
            weights_bytes=admitted.weights_bytes,
            first_window=spec.ladder[-1 if spec.service_class is ServiceClass.GUARANTEED else 0].window,
            context_bytes=admitted.context_bytes,
            charged_bytes=admitted.charged_bytes,
            model_loaded=admitted.model_loaded,
            waited_s=time.monotonic() - arrived_at,
            warnings=(*self._quotes.warnings(spec), *self._picture.window_warnings(spec)),
        )

    async def fork(self, agent_id: str, new_id: str, *, wait_s: float = 0, owner: OwnerId | None = None) -> Admission:
        """Admit an agent whose conversation begins where another's is, after the turns asked for so far; nothing is read again.

        It gets the model, the window, the class and the priority of the other. `wait_s` is for the admission; the turns before it
        take as long as they take. Raises what `register` raises, UnknownAgent, and WindowRefused, and TurnCancelled if `cancel`
        ends it with the turns before it.
        """
        await self.start()
        arrived_at = time.monotonic()
        source, id, patience = requests.agent_id(agent_id), requests.agent_id(new_id, argument="new_id"), requests.wait_s(wait_s)
        if source not in self._state.agents:
            raise UnknownAgent(source)
        agent = self._state.agents[source]
        spec = replace(agent.spec, id=id, owner=owner, ladder=agent.spec.ladder[agent.rung :])
        await self._executive.read_device()
        if owner in self._dead_owners:
            raise UnknownAgent(id)
        admitted = await self._admit(spec, patience)
        request = self._executive.request()
        try:
            await self._executive.ask(request, events.ForkRequested(request, self._executive.turns.id(), source, id))
        except BaseException:
            await self._give_up_fork(id)
            raise
        return self._admission(admitted, arrived_at)

    async def _give_up_fork(self, id: AgentId) -> None:
        """Nobody hears of the clone: let it go."""
        request = self._executive.request()
        with contextlib.suppress(UnknownAgent):
            await asyncio.shield(self._executive.ask(request, events.UnregisterRequested(request, id)))

    async def _admit(self, spec: AgentSpec, patience: float) -> actions.Admit:
        """Ask for admission, for as long as the caller is willing to wait for room."""
        request = self._executive.request()
        event = events.RegisterRequested(request, spec, may_wait=patience > 0)
        time_is_up = events.RegisterAbandoned(request, timed_out=True)
        deadline = self._loop.call_later(patience, self._executive.dispatch, time_is_up) if patience else None
        try:
            admitted: actions.Admit = await self._executive.ask(request, event, until=deadline)
            return admitted
        except asyncio.CancelledError:
            self._executive.dispatch(events.RegisterAbandoned(request))  # a grant that nobody receives is given back
            raise
        finally:
            if deadline is not None:
                deadline.cancel()

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
        wait_s: float | None = None,
        timeout_s: float | None = None,
    ) -> DecodeResult:
        """One turn. Raises InvalidRequest, UnknownAgent, WindowFull, WindowRefused, TurnTimedOut, TurnQueueFull, ModelError,
        DecodeFailed, TurnCancelled.

        `wait_s`: how long it may wait for its seat, and for room if its window must grow; None: as configured. `timeout_s`: how
        long the whole turn may take; then it ends with what it made, and `finish_reason` is timeout.
        """
        patience = None if wait_s is None else requests.wait_s(wait_s)
        limit = None if timeout_s is None else requests.timeout_s(timeout_s)
        request = requests.decode_request(
            prompt, messages=messages, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, seed=seed, stop=stop, reset=reset, context_shift=context_shift,
        )  # fmt: skip
        await self.start()
        return await self._executive.turns.turn(requests.agent_id(agent_id), request, wait_s=patience, timeout_s=limit)

    async def stream(self, agent_id: str, prompt: str | None = None, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        """`decode` with its text as it is made: chunks, and the result last. Leaving the iteration ends the turn.

        A reader that falls some chunks behind holds its own turn up, and nobody else's.
        """
        options = {**(GpuConductor.decode.__kwdefaults__ or {}), **options}
        wait_s, timeout_s = options.pop("wait_s"), options.pop("timeout_s")
        patience = None if wait_s is None else requests.wait_s(wait_s)
        limit = None if timeout_s is None else requests.timeout_s(timeout_s)
        request, id = requests.decode_request(prompt, **options), requests.agent_id(agent_id)
        await self.start()
        reader = ChunkStream()
        doing = self._executive.turns.turn(id, request, reader=reader, wait_s=patience, timeout_s=limit)
        turn = asyncio.create_task(doing)
        turn.add_done_callback(lambda _: reader.close())
        try:
            async for chunk in reader:
                yield chunk
            yield turn.result()
        finally:
            turn.cancel()

    async def cancel(self, agent_id: str) -> int:
        """End the agent's turns, running and waiting, with what they made; returns how many. Raises UnknownAgent.

        One that has made nothing raises TurnCancelled where it was asked for.
        """
        await self.start()
        request = self._executive.request()
        event = events.TurnsCancelled(request, requests.agent_id(agent_id))
        turns: int = await self._executive.ask(request, event)
        return turns

    async def reserve(self, holder: str, bytes: int, *, owner: OwnerId | None = None) -> ReservationId:
        """Book device memory for anything that is no agent. Raises InvalidRequest, AdmissionRefused."""
        await self.start()
        request = self._executive.request()
        event = events.ReserveRequested(request, requests.holder(holder), requests.bytes_(bytes), owner)
        try:
            id: ReservationId = await self._executive.ask(request, event)
            return id
        except asyncio.CancelledError:
            self._executive.dispatch(events.ReserveAbandoned(request))  # bytes that nobody knows the id of are given back
            raise

    async def release(self, reservation_id: str) -> int:
        """Give a reservation back; returns its bytes. Raises UnknownReservation."""
        await self.start()
        request = self._executive.request()
        id = ReservationId(requests.text("reservation_id", reservation_id))
        released: int = await self._executive.ask(request, events.ReleaseRequested(request, id))
        return released

    def owner_died(self, owner: OwnerId) -> None:
        """Take back everything that the dead process held."""
        self._dead_owners.append(owner)
        self._executive.dispatch(events.OwnerDied(owner))

    # --- what it looks like -----------------------------------------------------------------------------------------

    def bookings(self) -> dict[ReservationId, tuple[str, int]]:
        """Label and bytes of everything booked, parts counted with the whole they were taken from.

        What strangers took since the start is among it, in steps of 64 MiB: it is as little to be had as what is booked.
        """
        ledger = self._state.ledger
        booked = {id: (self._label(ledger.get(id)), size) for id, size in ledger.leases().items() if size}
        taken = min(self.best_cap_bytes - ledger.cap_bytes, self.best_cap_bytes - ledger.allocated_bytes)
        if taken >= _STRANGERS_STEP_BYTES:
            booked[ReservationId("strangers")] = ("strangers", taken // _STRANGERS_STEP_BYTES * _STRANGERS_STEP_BYTES)
        return booked

    def _label(self, booked: Reservation) -> str:
        if booked.kind is not Kind.HEADROOM:
            return f"{booked.kind.value}:{booked.holder}"
        agent = self._state.agents.get(AgentId(booked.holder))
        if agent is None or agent.guarantee != booked.id:
            return "turns"
        return f"{agent.id}:{agent.spec.model.key}"

    @property
    def cap_bytes(self) -> int:
        return self._state.ledger.cap_bytes

    @property
    def best_cap_bytes(self) -> int:
        """The most that could be booked at any time so far: with the fewest strangers."""
        return self._state.books.best_cap_bytes

    async def status(self, mirror: MirrorStatus | None = None) -> Status:
        await self._started()
        return self._picture.status(mirror, uptime_s=time.monotonic() - self._started_at)

    async def ledger_log(self) -> tuple[LedgerEntry, ...]:
        """What was booked after each change, oldest first; the last 16,384 changes."""
        await self._started()
        return tuple(self._executive.ledger_log)

    async def history(self, since: int = 0) -> tuple[HistoryEntry, ...]:
        """What was decided and done after the entry of that number, oldest first; the last 4,096 are kept."""
        await self._started()
        return self._executive.history.since(since)

    async def list(self) -> tuple[AgentStatus, ...]:
        """The agents, in the order of their admission."""
        await self._started()
        return self._picture.agents()

    def check(self) -> None:
        """Raise InternalError unless every invariant of the policy holds."""
        self._state.check()


def _closed() -> ServiceFailed:
    return ServiceFailed("the conductor was closed")


def _rules(config: Config, *, link_bytes_per_s: float) -> Rules:
    return Rules(
        live_contexts=config.live_contexts,
        min_turn_s=config.min_turn_ms / 1000,
        waitlist_limit=config.waitlist_limit,
        turn_queue_limit=config.turn_queue_limit,
        host_bytes=config.host_budget,
        disk_bytes=config.disk.budget if config.disk.directory else 0,
        ageing_s=config.ageing_s,
        idle_shrink_s=config.idle_shrink_s,
        idle_ttl_s=config.idle_ttl_s,
        home_bytes=min(config.home_budget, psutil.virtual_memory().available) if link_bytes_per_s else 0,
        link_bytes_per_s=link_bytes_per_s,
    )

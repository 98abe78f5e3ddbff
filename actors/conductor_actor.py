"""The actor around the plain conductor: what is Ray's about it, and nothing else.

An async actor: calls interleave on one loop, llama.cpp runs in threads, so `status` answers while others decode.
Detached, so that it outlives the program that made it and its placement groups vanish with it; named, so that others
find it. Ray restarts it if it dies; its books are empty then, as the device is.

Ray imports this module wherever somebody has the actor's handle, so it loads what the actor is made of only where one is made.
"""

from __future__ import annotations

import asyncio
import inspect
import secrets
from collections.abc import AsyncIterator
from typing import Any

import ray

from actors.deaths import DeathWatch, Owner
from actors.leases import Lease, LeaseMirror
from actors.logs import open_log
from actors.metrics import Metrics
from actors.ray_metrics import RayMetrics
from actors.streams import STREAM_BACKPRESSURE
from conductor.config import Config
from conductor.errors import InvalidRequest
from conductor.happenings import HistoryEntry
from conductor.types import (
    Admission,
    AgentStatus,
    Chunk,
    DecodeResult,
    LedgerEntry,
    MirrorState,
    MirrorStatus,
    OwnerId,
    ReservationId,
    ServiceClass,
    Status,
)
from conductor.units import MIB


class GpuConductorActor:
    """Owns the device of its node and admits agents to it. `ray.get(conductor.help.remote())` tells what can be called."""

    def __init__(self, config: Config) -> None:
        from conductor.gpu_conductor import GpuConductor as PlainConductor

        self._config = config
        self._log = open_log(config)
        self._conductor = PlainConductor(config, on_change=self._mirror_ledger)
        self._mirror = LeaseMirror(config.ray.resource, prefix=f"{secrets.token_hex(3)}-") if config.ray.mirror else None
        self._deaths = DeathWatch(self._owner_died)
        self._metrics = Metrics(RayMetrics(config.ray.name))
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        """Ray's views name the actor and its calls by it."""
        return self._config.ray.name

    async def ready(self) -> str:
        """Take the device; returns what was taken and why. Raises ConfigError."""
        await self._ready()
        device = (await self._conductor.status()).device
        return f"{device.name} ({device.chosen})"

    async def _ready(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        await self._conductor.start()
        if self._mirror is not None:
            await self._mirror.start(self._conductor.best_cap_bytes // MIB)
        self._mirror_ledger()
        self._watching = asyncio.create_task(self._deaths.run())
        self._telling = asyncio.create_task(self._metrics.run(self.status, self._conductor.history))

    def _mirror_ledger(self) -> None:
        if self._mirror is not None:
            self._mirror.raise_total(self._conductor.best_cap_bytes // MIB)
            bookings = self._conductor.bookings().items()
            self._mirror.want({id: Lease(label, size) for id, (label, size) in bookings})

    def _owner_died(self, owner: OwnerId, why: str) -> None:
        self._conductor.owner_died(owner)

    def _watch(self, owner: Owner | None) -> OwnerId | None:
        if owner is None:
            return None
        self._deaths.watch(owner)
        return owner.worker_id

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
        owner: Owner | None = None,
    ) -> Admission:
        """Admit an agent with up to `window` tokens of `model` (a configured key, or a path in an allowed directory).

        `window`: None is the configured one, else what the model was trained with. `priority`: higher goes first, 0 for most.

        `service_class`: guaranteed (weights and the whole window stay on the device), shared (weights stay, the window is
        there while decoding and grows as needed) or best_effort (a turn). With `wait_s` it waits so many seconds for room.
        `owner` (`Owner.current()`): the process it dies with; without one it stays until unregistered. Whoever cancels the call
        (`ray.cancel`) calls `unregister` after it: Ray may say "cancelled" of a call that was carried out.
        Raises InvalidRequest, ModelError, AdmissionRefused: nothing is booked then.
        """
        await self._ready()
        with self._metrics.errors_of("register"):
            admission = await self._conductor.register(
                agent_id, model, window=window, service_class=service_class, priority=priority, wait_s=wait_s,
                owner=self._watch(owner),
            )  # fmt: skip
        self._metrics.admitted(admission)
        self._watch(owner)  # again: a death told before the booking found nothing to give back, and is told once more
        return admission

    async def fork(self, agent_id: str, new_id: str, *, wait_s: float = 0, owner: Owner | None = None) -> Admission:
        """Admit `new_id` with the conversation of `agent_id` as it is after the turns asked for so far; nothing is read again.

        It gets the other's model, window, class and priority. Raises what `register` raises, UnknownAgent and WindowRefused.
        """
        await self._ready()
        with self._metrics.errors_of("register"):
            admission = await self._conductor.fork(agent_id, new_id, wait_s=wait_s, owner=self._watch(owner))
        self._metrics.admitted(admission)
        self._watch(owner)
        return admission

    async def unregister(self, agent_id: str) -> None:
        """Let an agent go; its bytes are back when this returns, its model's too if it was the last user. Raises UnknownAgent."""
        await self._ready()
        await self._conductor.unregister(agent_id)

    async def decode(self, agent_id: str, prompt: str | None = None, **options: Any) -> DecodeResult:
        """One turn of an agent's conversation: `prompt` continues it as raw text, `messages=[{role, content}, …]` as a chat.

        Options: max_tokens, temperature (0 is greedy), top_k, top_p, min_p, seed, stop, reset and context_shift are those of
        DecodeRequest. wait_s: how many seconds it may wait for its seat, and for room if its window must grow (None: as
        configured). timeout_s: after so many seconds it ends with what it made.
        Raises InvalidRequest, UnknownAgent, WindowFull, WindowRefused, TurnTimedOut, TurnQueueFull, TurnCancelled, ModelError,
        DecodeFailed.
        """
        await self._ready()
        with self._metrics.errors_of("turn"):
            result = await self._conductor.decode(agent_id, prompt, **_checked(options))
        self._metrics.ended(result)
        return result

    @ray.method(_generator_backpressure_num_objects=STREAM_BACKPRESSURE)
    async def stream(self, agent_id: str, prompt: str | None = None, **options: Any) -> AsyncIterator[Chunk | DecodeResult]:
        """`decode` as a streaming generator of references: to a `Chunk` of text as it is made, and to the DecodeResult last.

        Cancel it (`ray.cancel`) to end the turn early; `actors.stream` does so when its reader stops.
        """
        await self._ready()
        with self._metrics.errors_of("turn"):
            turn = self._conductor.stream(agent_id, prompt, **_checked(options))
            try:
                async for item in turn:
                    if isinstance(item, DecodeResult):
                        self._metrics.ended(item)
                    yield item
            finally:
                await turn.aclose()  # type: ignore[attr-defined]

    async def cancel(self, agent_id: str) -> int:
        """End the agent's turns, running and waiting, with what they made; returns how many. Raises UnknownAgent.

        Whoever asked for one gets its result with `finish_reason` cancelled, or TurnCancelled if it has made nothing.
        """
        await self._ready()
        return await self._conductor.cancel(agent_id)

    async def reserve(self, holder: str, bytes: int, *, owner: Owner | None = None) -> ReservationId:
        """Book device memory for any other task of this node; returns the id to release. Raises InvalidRequest, AdmissionRefused.

        `holder`: who it is for, as status and refusals say it. Nothing is allocated: the task does that, after this returns.
        """
        await self._ready()
        with self._metrics.errors_of("reserve"):
            return await self._conductor.reserve(holder, bytes, owner=self._watch(owner))

    async def release(self, reservation_id: str) -> int:
        """Give a reservation back; returns its bytes. Raises UnknownReservation."""
        await self._ready()
        return await self._conductor.release(reservation_id)

    async def status(self) -> Status:
        """Device, ledger, models, agents, waiting registrations, host memory and Ray's figures beside the ledger's."""
        await self._ready()
        return await self._conductor.status(await self._mirror_status())

    async def list(self) -> tuple[AgentStatus, ...]:
        """The agents, in the order of their admission."""
        await self._ready()
        return await self._conductor.list()

    async def ledger_log(self) -> tuple[LedgerEntry, ...]:
        """What was booked after each change of the ledger, oldest first; the last 16,384 changes."""
        await self._ready()
        return await self._conductor.ledger_log()

    async def history(self, since: int = 0) -> tuple[HistoryEntry, ...]:
        """What was decided and done after the entry numbered `since`, oldest first; the last 4,096 are kept."""
        await self._ready()
        return await self._conductor.history(since)

    async def mirrored(self, timeout_s: float = 2.0) -> MirrorStatus:
        """Wait until Ray's accounting equals the ledger, at most `timeout_s`; returns how they compare."""
        await self._ready()
        if self._mirror is not None:
            await self._mirror.settled(timeout_s)
        return await self._mirror_status()

    async def check(self) -> None:
        """Raise InternalError unless every byte and every state is accounted for."""
        await self._ready()
        self._conductor.check()

    async def help(self) -> str:
        """The calls and what they are for."""
        return "\n\n".join(_described(name, call) for name, call in _public_calls())

    async def close(self) -> None:
        """Let everything go, Ray's placement groups included; the actor may be killed then."""
        for task in (self._watching, self._telling):
            if task is not None:
                task.cancel()
        await self._conductor.close()
        if self._mirror is not None:
            await self._mirror.stop()
        if self._log is not None:
            await asyncio.to_thread(self._log.close)

    async def _mirror_status(self) -> MirrorStatus:
        if self._mirror is not None:
            return await self._mirror.status()
        booked = sum(size for _, size in self._conductor.bookings().values()) / MIB
        return MirrorStatus(MirrorState.UNMIRRORED, self._config.ray.resource, 0, 0, booked, "ray.mirror is false")


def _public_calls() -> list[tuple[str, Any]]:
    return [
        (name, call)
        for name, call in vars(GpuConductorActor).items()
        if not name.startswith("_") and (inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call))
    ]


def _described(name: str, call: Any) -> str:
    parameters = [p for name, p in inspect.signature(call).parameters.items() if name != "self" and not name.startswith("_")]
    return f"{name}({', '.join(map(str, parameters))})\n    {inspect.getdoc(call) or ''}".replace("\n\n", "\n")


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a turn; an unknown one is an InvalidRequest that names it, not a TypeError from within."""
    from conductor.gpu_conductor import GpuConductor as PlainConductor

    known = PlainConductor.decode.__kwdefaults__ or {}
    for name in options:
        if name not in known:
            raise InvalidRequest(name, f"is no option of decode; known: {', '.join(known)}")
    return options


#: All actor options are here. A call that failed with the actor is not run again: a turn or a booking would be done twice.
_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_concurrency": 1000}
#: The conductor as an actor; `connect` makes one where none runs.
GpuConductor: Any = ray.remote(**_OPTIONS)(GpuConductorActor)

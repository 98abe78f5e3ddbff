"""What the conductor looks like now: the state, the device and the engine as one picture of plain values."""

from __future__ import annotations

import time

from conductor import __version__
from conductor.backend.engine import Engine
from conductor.core.events import AgentSpec
from conductor.core.residency import Model
from conductor.core.sessions import Agent, Phase, Turn
from conductor.core.state import State
from conductor.core.waitlist import Waiting
from conductor.executive import Executive
from conductor.types import (
    AgentId,
    AgentStatus,
    DeviceStatus,
    LedgerStatus,
    MirrorState,
    MirrorStatus,
    ModelStatus,
    PoolId,
    PoolStatus,
    ServiceClass,
    Status,
    WaitingStatus,
)
from conductor.units import MIB, format_bytes


class Picture:
    """Reads, and changes nothing."""

    def __init__(self, state: State, engine: Engine, executive: Executive) -> None:
        self._state, self._engine, self._executive = state, engine, executive
        self._started_at = time.time()

    def status(self, mirror: MirrorStatus | None, *, uptime_s: float) -> Status:
        state, ledger, device = self._state, self._state.ledger, self._engine.device
        reading = device.read()
        unmirrored = MirrorStatus(MirrorState.UNMIRRORED, "", 0, 0, ledger.allocated_bytes / MIB, "no Ray here")
        return Status(
            version=__version__,
            device=DeviceStatus(
                device.name, device.kind, reading.total_bytes, reading.free_bytes, reading.others_bytes,
                ledger.overdrawn_bytes, device.chosen,
            ),
            ledger=LedgerStatus(ledger.cap_bytes, ledger.allocated_bytes, ledger.snapshot()),
            live_contexts=state.schedule.live_contexts,
            pools=self.pools(),
            models=self.models(),
            agents=self.agents(),
            waiting=self.waiting(),
            host_memory=self._engine.host_memory(),
            mirror=mirror or unmirrored,
            llama_cpp=self._engine.version,
            estimates=self._engine.estimator.how,
            threads=self._engine.threads,
            uptime_s=uptime_s,
            computed_tokens=self._executive.history.computed_tokens(self._engine.progress()),
            started_at=self._started_at,
        )  # fmt: skip

    def models(self) -> tuple[ModelStatus, ...]:
        state = self._state
        return tuple(
            ModelStatus(
                key=model.plan.key,
                path=model.plan.path,
                state=model.state,
                agents=sum(agent.model_id == id for agent in state.agents.values()),
                bytes=state.books.prices.held_bytes(model),
                estimated_bytes=model.plan.weights_bytes,
                estimate_error=model.estimate_error,
                residency=_residency(model),
                ring_bytes=state.ledger.size(model.ring) if model.ring else 0,
                weights=self._engine.weights(id),
            )
            for id, model in state.models.items()
        )

    def pools(self) -> tuple[PoolStatus, ...]:
        state = self._state
        seated: dict[PoolId, list[Agent]] = {id: [] for id in state.pools}
        for agent in state.agents.values():
            if agent.seat is not None:
                seated[agent.seat.pool].append(agent)
        return tuple(
            PoolStatus(
                id=id,
                model=state.models[pool.model_id].plan.key,
                owner=pool.owner,
                window=pool.context.window,
                slots=pool.context.slots,
                seated=len(seated[id]),
                running=sum(agent.phase is Phase.BUSY for agent in seated[id]),
                bytes=state.ledger.size(pool.reservation),
                phase=pool.phase.value,
            )
            for id, pool in state.pools.items()
        )

    def agents(self) -> tuple[AgentStatus, ...]:
        """In the order of their admission."""
        now = time.monotonic()
        taking_turns = {turn.agent_id for turn in self._state.rotation.turns.values()}
        return tuple(
            AgentStatus(
                id=agent.id,
                model=agent.spec.model.key,
                service_class=agent.service_class,
                window=agent.spec.context.window,
                window_in_use=agent.window_in_use,
                tokens=agent.tokens,
                kv=agent.place,
                priority=agent.spec.priority,
                context_bytes=agent.context_bytes,
                saved_bytes=self._state.kv_books.saved_bytes(agent),
                busy=agent.phase is Phase.BUSY,
                turns=agent.turns,
                served_tokens=agent.served,
                idle_s=0.0 if agent.id in taking_turns else now - agent.idle_since,
            )
            for agent in self._state.agents.values()
        )

    def waiting(self) -> tuple[WaitingStatus, ...]:
        """Registrations, then turns, each in the order in which they will be served."""
        now = time.monotonic()
        registrations = enumerate(self._state.waitlist.in_order(now))
        turns, heads = enumerate(self._state.rotation.in_order(now)), self._state.rotation.heads()
        return (
            *(self._registration(waiting, position, now) for position, waiting in registrations),
            *(self._turn(turn, position, now, heads) for position, turn in turns),
        )

    def _registration(self, waiting: Waiting, position: int, now: float) -> WaitingStatus:
        spec = waiting.request.agent
        requested = self._state.books.decide(spec).requested_bytes
        missing = max(0, requested - self._state.ledger.free_bytes)
        why = "strangers took memory: " if self._state.books.drifts else ""
        return WaitingStatus(
            what="register",
            agent_id=spec.id,
            model=spec.model.key,
            position=position,
            reason=f"{position} before it" if position else f"{why}{format_bytes(missing)} more must become free",
            priority=spec.priority,
            waited_s=now - waiting.since,
            expires_in_s=self._executive.answer_expires_in_s(waiting.request.request_id),
            requested_bytes=requested,
        )

    def _turn(self, turn: Turn, position: int, now: float, heads: dict[AgentId, Turn]) -> WaitingStatus:
        agent: Agent = self._state.agents[turn.agent_id]
        return WaitingStatus(
            what="turn",
            agent_id=agent.id,
            model=agent.spec.model.key,
            position=position,
            reason=self._state.schedule.reason(turn, heads),
            priority=agent.spec.priority,
            waited_s=now - turn.arrived_at,
            expires_in_s=self._executive.turns.expires_in_s(turn.id),
            requested_bytes=agent.context_bytes,
        )

    def window_warnings(self, spec: AgentSpec) -> tuple[str, ...]:
        """What of the window will never be had here, even alone."""
        if spec.service_class is ServiceClass.GUARANTEED:
            return ()
        room = self._state.books.room()
        alone = room.best_cap_bytes - room.fixed_bytes - self._state.books.prices.newcomer(spec).weights_bytes
        fitting = [rung.window for rung in spec.ladder if rung.context_bytes <= alone]
        if not fitting or fitting[-1] == spec.context.window:
            return ()
        return (f"of {spec.context.window} tokens no more than {fitting[-1]} can be live on this device, even alone",)


def _residency(model: Model) -> str:
    placement = model.placement
    if placement is None or not placement.streams:
        return model.state.value
    return f"streamed {placement.resident}+{placement.slots}/{model.plan.geometry.n_layer}"

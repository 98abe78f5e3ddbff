"""The ledger and the promise together: what admissions cost, and that the promise stays booked.

The promise to all agents' turns (`admission.promise_bytes`) is one reservation of headroom. A live context takes its
bytes out of it and returns them, so a switch can never be refused; agents who come, go or are measured resize it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from conductor.core import admission
from conductor.core.admission import Decision, Outcome
from conductor.core.estimate import context_bytes
from conductor.core.events import AgentSpec
from conductor.core.ledger import Ledger, OverCap
from conductor.core.sessions import Agent, LiveContext
from conductor.errors import AdmissionRefused, InternalError, Refusal, RefusalCode
from conductor.types import AgentId, ContextSpec, Kind, ModelId, OwnerId, ReservationId


class Books:
    """Who is in is the caller's knowledge (`agents`, shared and read only); what it costs is decided here."""

    def __init__(self, ledger: Ledger, agents: Mapping[AgentId, Agent], *, live_contexts: int) -> None:
        self.ledger = ledger
        self.live_contexts = live_contexts
        self._agents = agents
        self._headroom = ledger.reserve("conductor", Kind.HEADROOM, 0)
        self._overhead: list[ReservationId] = []
        #: what contexts really took, by model and parameters; replaces the estimate from then on
        self._measured: dict[tuple[ModelId, ContextSpec], int] = {}
        #: other tasks' reservations, and the process that each dies with
        self.external: dict[ReservationId, OwnerId | None] = {}

    # --- prices -----------------------------------------------------------------------------------------------------

    def price(self, spec: AgentSpec) -> int:
        """What a newcomer's context takes while it is live: measured if one like it ever was, else estimated."""
        return self._measured.get((spec.model.id, spec.context), spec.context_bytes)

    def promise(self) -> int:
        """Bytes promised to the agents."""
        return admission.promise_bytes(self._largest_contexts(), live_contexts=self.live_contexts)

    def _largest_contexts(self) -> dict[ModelId, int]:
        return admission.largest_contexts((agent.model_id, agent.context_bytes) for agent in self._agents.values())

    def book_overhead(self, holder: str, bytes: int) -> None:
        """Book what the process itself holds on the device, for as long as it lives. Raises OverCap."""
        self._overhead.append(self.ledger.reserve(holder, Kind.OVERHEAD, bytes))

    @property
    def overhead_bytes(self) -> int:
        return sum(map(self.ledger.size, self._overhead))

    # --- admission --------------------------------------------------------------------------------------------------

    def decide(self, spec: AgentSpec, *, weights_are_booked: bool) -> Decision:
        price, largest = self.price(spec), self._largest_contexts()
        promised = admission.promise_bytes(largest, live_contexts=self.live_contexts)
        largest[spec.model.id] = max(price, largest.get(spec.model.id, 0))
        return admission.decide(
            cap_bytes=self.ledger.cap_bytes,
            booked_bytes=self.ledger.allocated_bytes,
            fixed_bytes=self.overhead_bytes,
            promised_bytes=promised,
            promise_bytes=admission.promise_bytes(largest, live_contexts=self.live_contexts),
            context_bytes=price,
            weights_bytes=spec.model.weights_bytes,
            weights_are_booked=weights_are_booked,
        )

    def refuse(
        self, code: RefusalCode, requested_bytes: int, *, largest_window: int | None = None, waiting_ahead: int = 0
    ) -> AdmissionRefused:
        return AdmissionRefused(
            Refusal(
                code=code,
                requested_bytes=requested_bytes,
                cap_bytes=self.ledger.cap_bytes,
                booked_bytes=self.ledger.allocated_bytes,
                holders=self.ledger.snapshot(),
                largest_window=largest_window,
                waiting_ahead=waiting_ahead,
            )
        )

    def refuse_agent(
        self, code: RefusalCode, spec: AgentSpec, *, weights_are_booked: bool, waiting_ahead: int = 0
    ) -> AdmissionRefused:
        """The refusal of a newcomer, with the largest window of its model that would fit now, unless others go first."""

        def fits(window: int) -> bool:
            context = replace(spec.context, window=window)
            price = context_bytes(spec.model.geometry, context, device=spec.model.device)
            smaller = replace(spec, context=context, context_bytes=price)
            return self.decide(smaller, weights_are_booked=weights_are_booked).outcome is Outcome.FIT

        requested = self.decide(spec, weights_are_booked=weights_are_booked).requested_bytes
        window = None if waiting_ahead else admission.largest_window(fits, below=spec.context.window)
        return self.refuse(code, requested, largest_window=window, waiting_ahead=waiting_ahead)

    # --- the promise and the live contexts in it --------------------------------------------------------------------

    def keep_promise(self) -> None:
        """Size the headroom to the promise, less what live contexts use of it. Raises OverCap."""
        self.ledger.resize(self._headroom, self.promise() - self._in_use())

    def _in_use(self) -> int:
        return sum(self.ledger.size(agent.live.reservation) for agent in self._agents.values() if agent.live)

    def take(self, agent: Agent) -> ReservationId:
        """Hand the agent's context its bytes out of the headroom."""
        return self.ledger.split(self._headroom, agent.id, Kind.CONTEXT, agent.context_bytes)

    def give_back(self, live: LiveContext) -> None:
        self.ledger.join(live.reservation)

    def correct(self, agent: Agent, live: LiveContext, measured: int) -> None:
        """Book what the context really took and price the same parameters so from now on. Raises OverCap, unchanged."""
        part, before = live.reservation, agent.context_bytes
        promised = self.ledger.size(self._headroom) + self._in_use()
        self._reprice(agent, measured)
        growth = self.promise() - promised
        if growth > self.ledger.free_bytes:
            self._reprice(agent, before)
            raise OverCap(growth, self.ledger.free_bytes)
        headroom = self.promise() - (self._in_use() - self.ledger.size(part) + measured)
        changes = [(part, measured), (self._headroom, headroom)]
        for id, size in sorted(changes, key=lambda change: change[1] - self.ledger.size(change[0])):  # what shrinks goes first
            self.ledger.resize(id, size)

    def _reprice(self, agent: Agent, context_bytes: int) -> None:
        """For everybody whose context has the same model and parameters, now and later."""
        self._measured[agent.model_id, agent.spec.context] = context_bytes
        for other in self._agents.values():
            if other.model_id == agent.model_id and other.spec.context == agent.spec.context:
                other.context_bytes = context_bytes

    # --- other tasks' bytes -----------------------------------------------------------------------------------------

    def reserve(self, holder: str, bytes: int, owner: OwnerId | None) -> ReservationId:
        """Book bytes for somebody who is no agent. Raises AdmissionRefused."""
        try:
            id = self.ledger.reserve(holder, Kind.EXTERNAL, bytes)
        except OverCap:
            never = bytes > self.ledger.cap_bytes - self.overhead_bytes
            raise self.refuse(RefusalCode.NEVER if never else RefusalCode.CAP, bytes) from None
        self.external[id] = owner
        return id

    def release(self, id: ReservationId) -> int:
        del self.external[id]
        return self.ledger.release(id)

    # --- invariants -------------------------------------------------------------------------------------------------

    def check(self, weights: Iterable[ReservationId]) -> None:
        """Raise InternalError unless every booked byte is accounted for by the models, the promise or an outsider."""
        self.ledger.check()
        promised = self.ledger.size(self._headroom) + self._in_use()
        if promised != self.promise():
            raise InternalError(f"{promised} bytes of headroom and live contexts, {self.promise()} promised")
        known = sum(map(self.ledger.size, (*weights, *self.external))) + self.overhead_bytes + promised
        if known != self.ledger.allocated_bytes:
            raise InternalError(f"{self.ledger.allocated_bytes} bytes booked, {known} accounted for")

"""Refusals that explain themselves: the numbers behind a no, and what would be a yes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from conductor.core import admission
from conductor.core.admission import Outcome
from conductor.core.books import Books
from conductor.core.estimate import predicted
from conductor.core.events import AgentSpec, Rung
from conductor.core.pool import on_gpu, pool_bytes
from conductor.core.sessions import Agent
from conductor.errors import AdmissionRefused, Refusal, RefusalCode
from conductor.types import DeviceKind, ServiceClass

#: from the strongest promise to the weakest
_WEAKER = {
    ServiceClass.GUARANTEED: (ServiceClass.SHARED, ServiceClass.BEST_EFFORT),
    ServiceClass.SHARED: (ServiceClass.BEST_EFFORT,),
    ServiceClass.BEST_EFFORT: (),
}
#: when strangers may have gone: the device is read again about each second
_DRIFT_RETRY_S = 1.0


class Refusals:
    """Reads the books, changes nothing. `idle_ttl_s`: when the `idle` agents leave, if they do."""

    def __init__(self, books: Books, *, idle: Callable[[], Iterable[Agent]], idle_ttl_s: float | None) -> None:
        self._books, self._idle, self._idle_ttl_s = books, idle, idle_ttl_s

    def of_agent(self, code: RefusalCode, spec: AgentSpec, at: float, *, waiting_ahead: int = 0) -> AdmissionRefused:
        """The refusal of a newcomer, with what of it would be admitted now unless others go first."""
        refusal = self.of_bytes(code, self._books.decide(spec).requested_bytes, at).refusal
        if code is RefusalCode.CAP and self._would_fit_without_strangers(spec):
            refusal = replace(refusal, code=RefusalCode.DRIFT, retry_after_s=_DRIFT_RETRY_S)
        if waiting_ahead or refusal.code is RefusalCode.DRIFT:
            return AdmissionRefused(replace(refusal, waiting_ahead=waiting_ahead))
        weaker = next((kind for kind in _WEAKER[spec.service_class] if self._fits(replace(spec, service_class=kind))), None)
        streams = weaker is ServiceClass.BEST_EFFORT and not self._fits(_whole(spec))
        window = admission.largest_window(lambda window: self._fits(_smaller(spec, window)), below=_asked(spec))
        return AdmissionRefused(replace(refusal, largest_window=window, fitting_class=weaker, streaming_fits=streams))

    def of_bytes(self, code: RefusalCode, requested_bytes: int, at: float | None = None) -> AdmissionRefused:
        ledger = self._books.ledger
        return AdmissionRefused(
            Refusal(
                code=RefusalCode.DRIFT if code is RefusalCode.CAP and ledger.overdrawn_bytes else code,
                requested_bytes=requested_bytes,
                cap_bytes=ledger.cap_bytes,
                booked_bytes=ledger.allocated_bytes,
                holders=ledger.snapshot(),
                largest_window=None,
                evictable_bytes=self._books.evictable_bytes,
                retry_after_s=self._retry_after_s(at),
            )
        )

    def of_growth(self, agent: Agent, tokens: int) -> Refusal:
        """Why the agent's window cannot become so large now."""
        needed = agent.ladder[agent.rung_for(tokens)].context_bytes
        code = RefusalCode.NEVER if self.never_grows(agent, tokens) else RefusalCode.CAP
        return self.of_bytes(code, needed - agent.context_bytes).refusal

    def never_grows(self, agent: Agent, tokens: int) -> bool:
        """Whether the agent's window could not become so large even if everybody else left."""
        room = self._books.room()
        larger = replace(self._books.prices.tenant(agent), context_bytes=agent.ladder[agent.rung_for(tokens)].context_bytes)
        alone = larger.context_bytes + larger.weights_bytes
        return room.fixed_bytes + alone > room.best_cap_bytes

    def _fits(self, spec: AgentSpec) -> bool:
        return self._books.decide(spec).outcome >= Outcome.EVICT

    def _would_fit_without_strangers(self, spec: AgentSpec) -> bool:
        room = self._books.room()
        if not self._books.drifts:
            return False
        without = replace(room, cap_bytes=room.best_cap_bytes)
        return self._books.decide(spec, room=without).outcome >= Outcome.EVICT

    def _retry_after_s(self, at: float | None) -> float | None:
        """When room may come by itself: strangers leave, idle turns end, idle agents are unregistered."""
        if self._books.ledger.overdrawn_bytes:
            return _DRIFT_RETRY_S
        if self._idle_ttl_s is None or at is None:
            return None
        leave_in_s = [agent.idle_since + self._idle_ttl_s - at for agent in self._idle()]
        return max(0.0, min(leave_in_s)) if leave_in_s else None


def _asked(spec: AgentSpec) -> int:
    """The window that an admission is decided by."""
    return spec.ladder[-1 if spec.service_class is ServiceClass.GUARANTEED else 0].window


def _whole(spec: AgentSpec) -> AgentSpec:
    """As a best-effort agent of a model whose layers cannot stream."""
    return replace(spec, service_class=ServiceClass.BEST_EFFORT, model=replace(spec.model, blocks=None))


def _smaller(spec: AgentSpec, window: int) -> AgentSpec:
    """By the formula, which needs no dry run and is on the safe side."""
    context = replace(spec.context, window=window)
    took, geometry = predicted(spec.model, context), spec.model.geometry
    if spec.model.device is DeviceKind.CUDA:
        took = on_gpu(took, geometry)
    pool = pool_bytes(geometry, context) if spec.model.device is DeviceKind.CUDA else 0
    return replace(spec, ladder=(Rung(window, took.context_bytes + pool),))

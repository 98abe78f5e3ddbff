"""What things cost: contexts and weights as booked, else as measured where one like it ever was, else as estimated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from conductor.core.admission import Tenant
from conductor.core.estimate import ModelPlan
from conductor.core.events import AgentSpec, Rung
from conductor.core.homes import Homes
from conductor.core.ledger import Ledger
from conductor.core.residency import Model
from conductor.core.sessions import Agent
from conductor.types import ContextSpec, ModelId, ServiceClass


class Prices:
    """`models`: the state's own records, read only."""

    def __init__(self, ledger: Ledger, models: Mapping[ModelId, Model], homes: Homes) -> None:
        self._ledger, self._models, self._homes = ledger, models, homes
        #: what contexts really took, by model and parameters; replaces the estimate from then on
        self._measured: dict[tuple[ModelId, ContextSpec], int] = {}

    # --- contexts -----------------------------------------------------------------------------------------------------

    def ladder(self, spec: AgentSpec) -> list[Rung]:
        """The sizes of a newcomer's pools at what they cost."""
        return [self._priced(spec, rung) for rung in spec.ladder]

    def _priced(self, spec: AgentSpec, rung: Rung) -> Rung:
        def price(slots: int, estimated: int) -> int:
            context = replace(spec.context, window=rung.window, slots=slots)
            return self._measured.get((spec.model.id, context), estimated)

        return Rung(rung.window, price(1, rung.context_bytes), tuple((n, price(n, bytes)) for n, bytes in rung.wider))

    def reprice(self, key: tuple[ModelId, ContextSpec], bytes: int, agents: Iterable[Agent]) -> None:
        """For everybody whose pool has the same model and parameters, now and later; not for what is guaranteed already."""
        self._measured[key] = bytes
        for agent in agents:
            if agent.model_id == key[0] and agent.guarantee is None:
                agent.ladder = self.ladder(agent.spec)

    # --- weights ------------------------------------------------------------------------------------------------------

    def weights_bytes(self, plan: ModelPlan) -> int:
        """Of all of them."""
        model = self._models.get(plan.id)
        if model is not None and model.reservation is not None and not model.streams:
            return self._ledger.size(model.reservation)
        return plan.weights_bytes if model is None or model.measured_bytes is None else model.measured_bytes

    def least_bytes(self, plan: ModelPlan) -> int:
        """Of what a turn cannot do without: all of them or, if they have a home or a newcomer will have one, the least part."""
        model = self._models.get(plan.id)
        if plan.blocks is None:
            return self.weights_bytes(plan)
        found = self._homes.offers(plan) if model is None else model.offers
        return found[0].bytes if found else self.weights_bytes(plan)

    def held_bytes(self, model: Model) -> int:
        """Booked for what of them is on the device, the ring included."""
        return sum(self._ledger.size(part) for part in (model.reservation, model.ring) if part is not None)

    # --- agents -------------------------------------------------------------------------------------------------------

    def tenant(self, agent: Agent) -> Tenant:
        return agent.tenant(self._promised_weights_bytes(agent.spec))

    def newcomer(self, spec: AgentSpec) -> Tenant:
        """By the window that it begins with, or the whole one where that is guaranteed."""
        ladder = spec.ladder[-1:] if spec.service_class is ServiceClass.GUARANTEED else spec.ladder[:1]
        rung = self._priced(spec, ladder[0])
        return Tenant(spec.service_class, spec.model.id, self._promised_weights_bytes(spec), rung.context_bytes)

    def _promised_weights_bytes(self, spec: AgentSpec) -> int:
        best_effort = spec.service_class is ServiceClass.BEST_EFFORT
        return self.least_bytes(spec.model) if best_effort else self.weights_bytes(spec.model)

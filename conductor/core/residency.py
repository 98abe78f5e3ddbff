"""Models: where their weights are, as a table. A missing entry is the error."""

from __future__ import annotations

from dataclasses import dataclass, field

from conductor.core.estimate import ModelPlan
from conductor.core.events import RequestId
from conductor.errors import InternalError
from conductor.types import ModelState, ReservationId

#: (state, what happened) -> state. A model begins PARKED and is forgotten there. While LOADING nobody can stop the load, so a
#: model whose last agent left meanwhile is unloaded once it is there.
TRANSITIONS: dict[tuple[ModelState, str], ModelState] = {
    (ModelState.PARKED, "load"): ModelState.LOADING,
    (ModelState.LOADING, "loaded"): ModelState.RESIDENT,
    (ModelState.LOADING, "load failed"): ModelState.PARKED,
    (ModelState.RESIDENT, "unload"): ModelState.UNLOADING,
    (ModelState.UNLOADING, "unloaded"): ModelState.PARKED,
}


@dataclass(slots=True)
class Model:
    """One file in use. Who uses it is derived from the agents, never counted here."""

    plan: ModelPlan
    state: ModelState = ModelState.PARKED
    #: of its weights; None while PARKED
    reservation: ReservationId | None = None
    #: True: its weights stay while somebody uses it. False: they are in the room for turns, and leave it when others need it
    firm: bool = False
    #: what the weights really took the last time that they were loaded
    measured_bytes: int | None = None
    #: (measured - estimated) / estimated, of the last load
    estimate_error: float | None = None
    #: the last measurement of how long reading a prompt takes
    prefill_s_per_token: float | None = None
    #: unregister calls that are answered once the weights are gone
    leavers: list[RequestId] = field(default_factory=list)

    def become(self, happened: str) -> None:
        """Move by the table."""
        try:
            self.state = TRANSITIONS[self.state, happened]
        except KeyError:
            raise InternalError(f"model {self.plan.key} is {self.state.value}, yet {happened!r} happened") from None

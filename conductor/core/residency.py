"""Models: where their weights are, as a table. A missing entry is the error."""

from __future__ import annotations

from dataclasses import dataclass, field

from conductor.core.estimate import ModelPlan
from conductor.core.events import RequestId
from conductor.core.placing import Offer
from conductor.core.streaming import Placement
from conductor.errors import InternalError
from conductor.types import ModelState, ReservationId

#: (state, what happened) -> state. A model begins PARKED and is forgotten there. While LOADING nobody can stop the load, so a
#: model whose last agent left meanwhile is unloaded once it is there. Unloading one that is PARKED lets go of its home.
TRANSITIONS: dict[tuple[ModelState, str], ModelState] = {
    (ModelState.PARKED, "load"): ModelState.LOADING,
    (ModelState.LOADING, "loaded"): ModelState.RESIDENT,
    (ModelState.LOADING, "load failed"): ModelState.PARKED,
    (ModelState.RESIDENT, "unload"): ModelState.UNLOADING,
    (ModelState.PARKED, "unload"): ModelState.UNLOADING,
    (ModelState.UNLOADING, "unloaded"): ModelState.PARKED,
}


@dataclass(slots=True)
class Model:
    """One file in use. Who uses it is derived from the agents, never counted here."""

    plan: ModelPlan
    state: ModelState = ModelState.PARKED
    #: of its weights; None while PARKED
    reservation: ReservationId | None = None
    #: of the ring that its layers stream through; None where they do not
    ring: ReservationId | None = None
    #: of host memory for its weights, booked as soon as they may leave the device; None where they cannot, or it has no room
    home: ReservationId | None = None
    #: how much of its weights the device may have, with a home; the least first
    offers: tuple[Offer, ...] = ()
    #: which part of its weights is on the device, or on the way; None: nothing, or all of them as llama.cpp loads them
    placement: Placement | None = None
    #: its weights are at home, or may be
    at_home: bool = False
    #: it turned out that its weights do not move
    stays_whole: bool = False
    #: a step's computation, as measured while layers streamed
    step_s: float | None = None
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

    @property
    def streams(self) -> bool:
        return self.placement is not None and self.placement.streams

    def become(self, happened: str) -> None:
        """Move by the table."""
        try:
            self.state = TRANSITIONS[self.state, happened]
        except KeyError:
            raise InternalError(f"model {self.plan.key} is {self.state.value}, yet {happened!r} happened") from None

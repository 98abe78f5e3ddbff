"""Models: where their weights are, as a table. A missing entry is the error."""

from __future__ import annotations

from dataclasses import dataclass, field

from conductor.core.estimate import ModelPlan
from conductor.core.events import RequestId
from conductor.errors import InternalError
from conductor.types import ModelState, ReservationId

#: (state, what happened) -> state; a model begins LOADING, and None is its end. While LOADING nobody can stop the load, so
#: a model whose last agent left meanwhile is unloaded once it is there.
TRANSITIONS: dict[tuple[ModelState, str], ModelState | None] = {
    (ModelState.LOADING, "loaded"): ModelState.RESIDENT,
    (ModelState.LOADING, "load failed"): None,
    (ModelState.RESIDENT, "last agent left"): ModelState.UNLOADING,
    (ModelState.UNLOADING, "unloaded"): None,
}


@dataclass(slots=True)
class Model:
    """One loaded file. Who uses it is derived from the agents, never counted here."""

    plan: ModelPlan
    reservation: ReservationId
    state: ModelState
    #: unregister calls that are answered once the weights are gone
    leavers: list[RequestId] = field(default_factory=list)

    def become(self, happened: str) -> None:
        """Move by the table; the caller forgets a model that has come to its end."""
        try:
            state = TRANSITIONS[self.state, happened]
        except KeyError:
            raise InternalError(f"model {self.plan.key} is {self.state.value}, yet {happened!r} happened") from None
        if state is not None:
            self.state = state

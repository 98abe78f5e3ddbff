"""What is under way, for the history: the calls that are not answered yet, and the work that was ordered for them.

Numbers and times only: by them a line says how long something took, and for which call it was done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from conductor.core.events import RequestId, TurnId
from conductor.core.state import State
from conductor.types import AgentId, ModelKey, OwnerId

#: what was ordered, and of whom
Work: TypeAlias = "tuple[str, str | int]"


class Asked(NamedTuple):
    number: int  #: of the call
    at: float
    who: str
    model: ModelKey | None
    owner: OwnerId | None  #: with whose death it ends, unanswered


class Order(NamedTuple):
    at: float
    number: int | None  #: of the call that it was given for; None if it was given for none


class UnderWay:
    """`clock`: seconds. Belongs to the event loop."""

    def __init__(self, state: State, *, clock: Callable[[], float]) -> None:
        self._state, self._clock = state, clock
        self.requests: dict[RequestId, Asked] = {}
        #: those that are over are forgotten in time
        self.turns: dict[TurnId, Asked] = {}
        self._orders: dict[Work, Order] = {}

    def asked(self, number: int, who: str, model: ModelKey | None, owner: OwnerId | None) -> Asked:
        return Asked(number, self._clock(), who, model, owner)

    def take_of(self, owner: OwnerId) -> list[Asked]:
        """The requests that nobody waits for any more, its process being dead."""
        dead = [request for request, asked in self.requests.items() if asked.owner == owner]
        return [self.requests.pop(request) for request in dead]

    def ms_since(self, what: Asked | Order) -> float:
        return (self._clock() - what.at) * 1000

    def model_of(self, agent_id: AgentId) -> ModelKey | None:
        agent = self._state.agents.get(agent_id)
        return agent.spec.model.key if agent is not None else None

    # --- orders -----------------------------------------------------------------------------------------------------

    def ordered(self, work: Work) -> Order | None:
        return self._orders.get(work)

    def order(self, work: Work, *, of: AgentId | None = None, model: ModelKey | None = None) -> None:
        """`of`, `model`: whom or what it is done for, to find the call."""
        number = self._first_of(of) if of is not None else self._first_asked(model) if model is not None else None
        self._orders[work] = Order(self._clock(), number)

    def end(self, work: Work) -> Order | None:
        return self._orders.pop(work, None)

    def _first_of(self, agent_id: AgentId) -> int | None:
        """The agent's turn that came first, else its registration."""
        turns = (turn.id for turn in self._state.rotation.turns.values() if turn.agent_id == agent_id)
        return next(turns, next((asked.number for asked in self.requests.values() if asked.who == agent_id), None))

    def _first_asked(self, model: ModelKey) -> int | None:
        """The registration that waits longest for the model."""
        return next((asked.number for asked in self.requests.values() if asked.model == model), None)

    def forget_turns(self) -> None:
        """Some end without a word that would come by here."""
        known = self._state.rotation.turns
        if len(self.turns) > 2 * len(known) + 64:
            self.turns = {id: asked for id, asked in self.turns.items() if id in known}
            self._orders = {work: order for work, order in self._orders.items() if work[0] != "turn" or work[1] in known}

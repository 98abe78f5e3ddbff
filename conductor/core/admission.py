"""Who may come in: one pure decision over numbers, ordered from worst to best, with the numbers that explain it.

The promise kept at admission (`promise`): together with everything else that is booked, under the cap fit

- the weights of every model that a guaranteed or shared agent uses,
- the whole window of every guaranteed agent,
- one turn of any other agent: the largest context among them, with its model's weights if nothing else keeps those.

Whoever was admitted can therefore always have its turn, whatever the order of turns: those of shared and best-effort
agents may have to wait for each other, those of guaranteed agents for nobody.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from conductor.types import ModelId, ServiceClass


class Outcome(enum.IntEnum):
    """Ordered: a larger one is better for the newcomer."""

    NEVER_FITS = 0  #: not on this device, even with nobody else on it
    WAIT = 1  #: not now
    EVICT = 2  #: as soon as what is idle has gone to host memory, and turns that run beyond the promise have ended
    FIT = 3


@dataclass(frozen=True, slots=True)
class Tenant:
    """What an agent's promise is made of."""

    service_class: ServiceClass
    model_id: ModelId
    weights_bytes: int
    context_bytes: int  #: of its window in use


@dataclass(frozen=True, slots=True)
class Promise:
    """What some tenants were promised together."""

    weights: Mapping[ModelId, int] = field(default_factory=dict)  #: that stay on the device
    guaranteed_bytes: int = 0  #: of contexts that stay on the device
    shared_turn_bytes: int = 0  #: the largest turn of a shared agent
    #: of each model that best-effort agents use: its weights, and the largest context of those agents
    best_effort: Mapping[ModelId, tuple[int, int]] = field(default_factory=dict)

    @property
    def firm_bytes(self) -> int:
        """What stays on the device whoever's turn it is."""
        return sum(self.weights.values()) + self.guaranteed_bytes

    @property
    def turn_bytes(self) -> int:
        """The largest turn of anybody who is not guaranteed. Best-effort agents bring their weights, if nothing keeps those."""
        best_effort = (
            context + (0 if model in self.weights else weights) for model, (weights, context) in self.best_effort.items()
        )
        return max(self.shared_turn_bytes, *best_effort, 0)

    @property
    def total_bytes(self) -> int:
        return self.firm_bytes + self.turn_bytes

    def plus(self, tenant: Tenant) -> Promise:
        """The promise with one tenant more."""
        model, context = tenant.model_id, tenant.context_bytes
        if tenant.service_class is ServiceClass.BEST_EFFORT:
            _, largest = self.best_effort.get(model, (0, 0))
            turns = {**self.best_effort, model: (tenant.weights_bytes, max(context, largest))}
            return replace(self, best_effort=turns)
        weights = self.weights if model in self.weights else {**self.weights, model: tenant.weights_bytes}
        if tenant.service_class is ServiceClass.GUARANTEED:
            return replace(self, weights=weights, guaranteed_bytes=self.guaranteed_bytes + context)
        return replace(self, weights=weights, shared_turn_bytes=max(self.shared_turn_bytes, context))


def promise(tenants: Iterable[Tenant]) -> Promise:
    """What these tenants were promised together. The admission test and the ledger's room for turns both come from here."""
    return functools.reduce(Promise.plus, tenants, Promise())


@dataclass(frozen=True, slots=True)
class Room:
    """The cap and what is under it, at the moment of a decision."""

    cap_bytes: int
    best_cap_bytes: int  #: the cap without the strangers that came since the start
    fixed_bytes: int  #: booked, and nobody can give it back
    firm_bytes: int  #: booked, but for the turns
    turn_room_bytes: int  #: booked for the turns: at least what is promised, more while more is in use
    in_use_bytes: int  #: of the room for turns


@dataclass(frozen=True, slots=True)
class Decision:
    outcome: Outcome
    requested_bytes: int  #: what the newcomer adds to the promise
    #: of it, what stays on the device whoever's turn it is, less what of that is in the room for turns already
    firm_bytes: int = 0


def decide(room: Room, *, before: Promise, after: Promise, alone: Promise, moved_bytes: int = 0) -> Decision:
    """Decide on a newcomer, given the promise without it, with it, and to it `alone`.

    `moved_bytes`: weights in the room for turns that would stay on the device from now on.

    1. What strangers took is booked here (the cap fell below the books): WAIT, whatever it asks for.
    2. It fits beside all that is booked: FIT.
    3. It fits beside all that is promised: EVICT.
    4. Alone on the device it does not fit: NEVER_FITS.
    5. Otherwise: WAIT.
    """
    requested, firm = after.total_bytes - before.total_bytes, after.firm_bytes - before.firm_bytes
    left = room.cap_bytes - room.firm_bytes - firm  # for the turns
    if room.firm_bytes + room.turn_room_bytes > room.cap_bytes:  # (1)
        outcome = Outcome.WAIT
    elif max(after.turn_bytes, room.in_use_bytes - moved_bytes) <= left:  # (2)
        outcome = Outcome.FIT
    elif after.turn_bytes <= left:  # (3)
        outcome = Outcome.EVICT
    elif room.fixed_bytes + alone.total_bytes > room.best_cap_bytes:  # (4)
        outcome = Outcome.NEVER_FITS
    else:  # (5)
        outcome = Outcome.WAIT
    return Decision(outcome, requested, firm - moved_bytes)


def largest_window(fits: Callable[[int], bool], *, below: int, granularity: int = 256) -> int | None:
    """The longest window shorter than `below` that `fits`, in llama.cpp's steps of 256 tokens; None if none does.

    `fits` must be monotone: what fits a window fits any shorter one.
    """
    low, high = 0, max(0, (below - 1) // granularity)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * granularity) else (low, middle - 1)
    return low * granularity or None

"""Who sits in which slot of a context, and keeping those who decode side by side.

llama.cpp decodes a batch in one pass over the weights only if the slots in it follow each other without a gap; each run of
neighbours takes a pass of its own. So a gap costs a pass a step, and closing it a copy: it is closed when it has cost as
much as the copy would, so that in all no more than about twice the least is paid, whatever comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from conductor.backend.conversation import Conversation
from conductor.backend.llama import ByteArray, Context, Form, LlamaError
from conductor.backend.seat import Seat
from conductor.errors import InternalError
from conductor.types import AgentId

#: On a GPU a byte that goes by way of host memory takes so many times as long as one that stays on the device.
_LINK_TIMES = 32


class Seating:
    """Used by the pool's thread. `weights_bytes`: what a pass reads; `slot_bytes`: what a whole slot holds."""

    def __init__(self, context: Context, *, weights_bytes: int, slot_bytes: int) -> None:
        self._context, self._weights_bytes, self._slot_bytes = context, weights_bytes, slot_bytes
        self.seats: dict[AgentId, Seat] = {}
        self._left: list[int] = []  #: free slots that hold what nobody needs any more
        self._slots: Sequence[int] = ()  #: of the last step
        self._gaps = 0  #: between those
        self._lost_bytes = 0  #: that passes read because of gaps, since there was none
        self._price_bytes = 0  #: of closing them

    def take(self, agent_id: AgentId, conversation: Conversation) -> Seat:
        """The lowest free slot, empty. Raises InternalError if there is none, or the agent has one."""
        self.sweep()
        free = self._free()
        if agent_id in self.seats or not free:
            raise InternalError(f"no seat for {agent_id}: {len(self.seats)} of {self._context.n_slots} are taken")
        seat = self.seats[agent_id] = Seat(agent_id, conversation, self._context.sequence(free[0]))
        return seat

    def leave(self, seat: Seat) -> None:
        """Free the slot. `sweep` before anything is decoded."""
        self.seats.pop(seat.agent_id)
        self._left.append(seat.sequence.slot)

    def sweep(self) -> None:
        """Empty the slots that were left: thousands of cells take a millisecond, for which whoever is told need not wait."""
        while self._left:
            self._context.empty(self._left.pop())

    def purge(self, seat: Seat) -> None:
        """Wipe what a slot was given in error. Clearing it is not enough: a NaN in a cell that is free, or a position below
        zero, goes on to count. So all memory is wiped, and what the others hold goes by way of the host's.
        """
        others = [other for other in self.seats.values() if other is not seat and other.conversation.held]
        states = [_state_if_any(other) for other in others]
        self._context.wipe()
        for other, state in zip(others, states, strict=True):
            if state is None or not other.sequence.restore(*state):
                other.drop_cache()  # it is computed again

    def _free(self) -> list[int]:
        taken = {seat.sequence.slot for seat in self.seats.values()}
        return [slot for slot in range(self._context.n_slots) if slot not in taken]

    def has_to_close(self, slots: Sequence[int]) -> bool:
        """Whether gaps between these slots, ascending and about to decode, have cost enough. Asked once a step."""
        if slots != self._slots:
            self._slots = slots
            self._gaps = sum(b - a > 1 for a, b in itertools.pairwise(slots))
            self._price_bytes = self._price(slots) if self._gaps else 0
        if not self._gaps:
            self._lost_bytes = 0
            return False
        self._lost_bytes += self._gaps * self._weights_bytes
        # What was moved and not decoded since cannot be saved, as an exchange has to.
        return self._lost_bytes >= self._price_bytes and not self._context.pending

    def close_gaps(self, slots: Sequence[int]) -> None:
        """Move their seats side by side, and whoever is in between out of the way. Nobody can tell afterwards."""
        by_slot = {seat.sequence.slot: seat for seat in self.seats.values()}
        first, outside = _window(slots, self._context.n_slots)
        holes = [slot for slot in range(first, first + len(slots)) if slot not in slots]
        holes.sort(key=by_slot.__contains__)  # free ones first: whoever is in the way must not be put where another goes then
        for source, hole in zip(outside, holes, strict=True):
            self._move(by_slot[source], hole, by_slot.get(hole))
        self._slots, self._lost_bytes = (), 0

    def _move(self, seat: Seat, to: int, idle: Seat | None) -> None:
        if idle is None:
            self._copy(seat, to)
        elif free := self._free():
            self._copy(idle, free[0])
            self._copy(seat, to)
        else:
            self._exchange(seat, idle)

    def _copy(self, seat: Seat, to: int) -> None:
        source = seat.sequence.slot
        self._context.copy(source, to)
        self._context.empty(source)
        seat.sequence.slot = to

    def _exchange(self, a: Seat, b: Seat) -> None:
        """By way of host memory: there is no slot to put one of them into meanwhile."""
        states = [_state_if_any(seat) for seat in (a, b)]
        a.sequence.slot, b.sequence.slot = b.sequence.slot, a.sequence.slot
        for seat, state in zip((a, b), states, strict=True):
            if state is None or not seat.sequence.restore(*state):
                seat.drop_cache()  # it is computed again

    def _price(self, slots: Sequence[int]) -> int:
        """Bytes that closing the gaps would read and write, as if all were on the device."""
        _, outside = _window(slots, self._context.n_slots)
        if self._free():
            return len(outside) * 2 * 2 * self._slot_bytes
        held = max((seat.conversation.held for seat in self.seats.values()), default=0)
        one = self._slot_bytes * held // self._context.window
        return len(outside) * 4 * one * (_LINK_TIMES if self._context.works_on else 1)


def _window(slots: Sequence[int], n_slots: int) -> tuple[int, list[int]]:
    """Where so many neighbouring slots have the most of these among them: (the first, those of these that are outside)."""
    count, members = len(slots), set(slots)
    best = inside = sum(slot < count for slot in slots)
    first = 0
    for start in range(1, n_slots - count + 1):
        inside += (start + count - 1 in members) - (start - 1 in members)
        if inside > best:
            best, first = inside, start
    return first, [slot for slot in slots if not first <= slot < first + count]


def _state_if_any(seat: Seat) -> tuple[ByteArray, Form | None] | None:
    """None: it has none, or it cannot be had."""
    if not seat.conversation.held:
        return None
    try:
        state = np.empty(seat.sequence.state_bytes(), np.uint8)
        form = seat.sequence.save(state)
    except (LlamaError, MemoryError):
        return None
    return state, form.packed(state) if form else None

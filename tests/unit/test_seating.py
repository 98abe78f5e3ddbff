"""Who sits where, and when a gap between those who decode is worth closing. On a context of paper: a list of what is where."""

from __future__ import annotations

import random
from typing import Any

import pytest

from conductor.backend.conversation import Conversation
from conductor.backend.seat import Seat
from conductor.backend.seating import Seating
from conductor.errors import InternalError
from conductor.types import AgentId


class PaperSequence:
    def __init__(self, context: PaperContext, slot: int) -> None:
        self.context, self.slot = context, slot

    def clear(self) -> None:
        self.context.empty(self.slot)

    def state_bytes(self) -> int:
        return 1

    def save(self, buffer: Any) -> None:
        buffer[0] = self.context.held[self.slot]

    def restore(self, buffer: Any, form: None) -> bool:
        self.context.held[self.slot] = int(buffer[0])
        return self.context.restores


class PaperContext:
    """`held[slot]`: whose KV is there, 0 for nobody's."""

    def __init__(self, slots: int, *, works_on: bool = False) -> None:
        self.n_slots, self.window, self.works_on, self.restores = slots, 100, works_on, True
        self.pending = False
        self.held = [0] * slots
        self.copies = 0

    def sequence(self, slot: int) -> PaperSequence:
        return PaperSequence(self, slot)

    def copy(self, source: int, target: int) -> None:
        assert self.held[target] == 0, "somebody was there"
        self.held[target] = self.held[source]
        self.copies += 1

    def empty(self, slot: int) -> None:
        self.held[slot] = 0

    def wipe(self) -> None:
        self.held = [0] * self.n_slots


class Table:
    """Agents 1, 2, ... in the slots 0, 1, ..., each with ten tokens of KV."""

    def __init__(self, slots: int, agents: int, *, weights: int = 10, slot: int = 100, works_on: bool = False) -> None:
        self.context = PaperContext(slots, works_on=works_on)
        self.seating = Seating(self.context, weights_bytes=weights, slot_bytes=slot)  # type: ignore[arg-type]
        self.seats = [self.takes(n + 1) for n in range(agents)]

    def takes(self, n: int) -> Seat:
        seat = self.seating.take(AgentId(str(n)), Conversation())
        seat.conversation.has_decoded(10)
        self.context.held[seat.sequence.slot] = n
        return seat

    def leaves(self, *agents: int) -> None:
        for n in agents:
            self.seating.leave(self.seating.seats[AgentId(str(n))])
        self.seating.sweep()

    def slots(self, *agents: int) -> list[int]:
        return sorted(self.seating.seats[AgentId(str(n))].sequence.slot for n in agents)

    def check(self) -> None:
        """Everybody's KV is where it sits, and nowhere else."""
        found = {seat.sequence.slot: int(seat.agent_id) for seat in self.seating.seats.values()}
        assert len(found) == len(self.seating.seats)
        assert self.context.held == [found.get(slot, 0) for slot in range(self.context.n_slots)]


def test_the_lowest_free_slot_is_taken_and_a_slot_that_was_left_is_empty() -> None:
    table = Table(4, 3)
    assert table.slots(1, 2, 3) == [0, 1, 2]
    table.leaves(2)
    assert table.context.held == [1, 0, 3, 0]
    assert table.takes(4).sequence.slot == 1
    table.check()


def test_whoever_takes_a_slot_before_it_was_swept_finds_it_empty() -> None:
    table = Table(2, 2)
    table.seating.leave(table.seats[0])
    assert table.context.held == [1, 2]
    seat = table.seating.take(AgentId("3"), Conversation())
    assert (seat.sequence.slot, table.context.held) == (0, [0, 2])
    table.seating.sweep()
    assert table.context.held == [0, 2]


def test_nobody_sits_twice_and_nobody_on_anothers_lap() -> None:
    table = Table(2, 2)
    for agent in ("1", "3"):
        with pytest.raises(InternalError, match="no seat"):
            table.seating.take(AgentId(agent), Conversation())


def test_neighbours_have_no_gap_to_close() -> None:
    table = Table(4, 4)
    assert not any(table.seating.has_to_close(slots) for slots in ([0, 1, 2], [2, 3], [1], [0, 1, 2, 3]) for _ in range(100))


def test_a_gap_is_closed_when_it_has_cost_as_much_as_the_copy() -> None:
    """A pass reads 10 bytes. A free slot is there: the one outside is copied, and so may be who is in its way: 400 bytes."""
    table = Table(4, 3)
    assert [table.seating.has_to_close([0, 2]) for _ in range(40)] == [False] * 39 + [True]
    table.seating.close_gaps([0, 2])
    assert table.slots(1, 3) in ([0, 1], [1, 2])
    table.check()


def test_by_way_of_the_host_a_gap_on_a_gpu_has_to_cost_more() -> None:
    """All slots are taken, with a tenth of them in use: 40 bytes, 32 times as slow on a GPU's link."""
    for works_on, steps in ((False, 4), (True, 128)):
        table = Table(3, 3, works_on=works_on)
        asked = [table.seating.has_to_close([0, 2]) for _ in range(steps)]
        assert asked == [False] * (steps - 1) + [True]


def test_what_gaps_have_cost_is_forgotten_once_there_is_none() -> None:
    table = Table(4, 3)
    assert not any(table.seating.has_to_close([0, 2]) for _ in range(39))
    assert not table.seating.has_to_close([0, 1])
    assert not table.seating.has_to_close([0, 2])


def test_while_something_was_moved_and_not_decoded_since_gaps_stay_as_they_are() -> None:
    """It cannot be saved, and so not exchanged: the step after the next decode sees to it."""
    table = Table(3, 3)
    table.context.pending = True
    assert not any(table.seating.has_to_close([0, 2]) for _ in range(100))
    table.context.pending = False
    assert table.seating.has_to_close([0, 2])


def test_whoever_is_in_the_way_is_not_put_where_another_goes_next() -> None:
    """In the slots 0 to 6: 1 talks, 2 idles, 3 talks, nobody twice, 6 and 7 talk."""
    table = Table(8, 7)
    table.leaves(4, 5)
    table.seating.close_gaps(table.slots(1, 3, 6, 7))
    assert table.slots(1, 3, 6, 7) == [0, 1, 2, 3]
    table.check()


def test_at_random_those_who_decode_sit_side_by_side_and_everybody_keeps_what_is_theirs() -> None:
    chance = random.Random(5)
    for _ in range(1000):
        slots = chance.randint(1, 16)
        table = Table(slots, slots)
        table.leaves(*chance.sample(range(1, slots + 1), chance.randint(0, slots - 1)))
        here = [int(agent) for agent in table.seating.seats]
        talking = chance.sample(here, chance.randint(1, len(here)))
        table.seating.close_gaps(table.slots(*talking))
        together = table.slots(*talking)
        assert together == list(range(together[0], together[0] + len(talking)))
        table.check()


def test_who_cannot_be_brought_back_after_an_exchange_is_computed_again() -> None:
    table = Table(3, 3)
    table.context.restores = False
    table.seating.close_gaps([0, 2])
    assert sorted(seat.conversation.held for seat in table.seats) == [0, 0, 10]


def test_a_slot_is_purged_and_the_others_keep_what_is_theirs() -> None:
    table = Table(4, 3)
    table.context.held[1] = 99
    table.seating.purge(table.seats[1])
    assert table.context.held == [1, 0, 3, 0]
    assert [seat.conversation.held for seat in table.seats[::2]] == [10, 10]

"""The ledger: exact, under its cap however that moves, nothing clamped, nothing anonymous.

See also: `test_ledger_at_random.py`, for all of it at once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core.ledger import Ledger, OverCap
from conductor.errors import InternalError, UnknownReservation
from conductor.types import Kind, Reservation, ReservationId

STRANGER = ReservationId("r999")


def picture(ledger: Ledger) -> object:
    return ledger.snapshot(), ledger.leases(), ledger.allocated_bytes, ledger.revision


def test_a_new_ledger_has_all_of_its_cap_to_give() -> None:
    ledger = Ledger(100)
    assert (ledger.cap_bytes, ledger.allocated_bytes, ledger.free_bytes, ledger.snapshot()) == (100, 0, 100, ())


def test_a_reservation_says_who_holds_how_much_of_what() -> None:
    ledger = Ledger(100, prefix="x")
    id = ledger.reserve("coder", Kind.WEIGHTS, 60)
    assert ledger.get(id) == Reservation(id, "coder", Kind.WEIGHTS, 60)
    assert id.startswith("x")
    assert (ledger.allocated_bytes, ledger.free_bytes) == (60, 40)


def test_the_last_byte_can_be_booked_and_the_next_one_cannot() -> None:
    ledger = Ledger(100)
    ledger.reserve("a", Kind.EXTERNAL, 100)
    before = picture(ledger)
    with pytest.raises(OverCap) as excess:
        ledger.reserve("b", Kind.EXTERNAL, 1)
    assert (excess.value.requested_bytes, excess.value.free_bytes) == (1, 0)
    assert picture(ledger) == before


def test_a_reservation_of_nothing_fits_a_full_ledger_and_is_not_listed() -> None:
    ledger = Ledger(0)
    id = ledger.reserve("conductor", Kind.HEADROOM, 0)
    assert ledger.size(id) == 0
    assert ledger.snapshot() == ()


def test_resizing_up_and_down_moves_the_sum_by_the_difference() -> None:
    ledger = Ledger(100)
    id = ledger.reserve("a", Kind.WEIGHTS, 50)
    ledger.resize(id, 100)
    assert ledger.free_bytes == 0
    ledger.resize(id, 30)
    assert ledger.free_bytes == 70


def test_growth_beyond_the_cap_is_refused_with_nothing_changed() -> None:
    ledger = Ledger(100)
    id, _ = ledger.reserve("a", Kind.WEIGHTS, 50), ledger.reserve("b", Kind.WEIGHTS, 40)
    before = picture(ledger)
    with pytest.raises(OverCap) as excess:
        ledger.resize(id, 61)
    assert (excess.value.requested_bytes, excess.value.free_bytes) == (11, 10)
    assert picture(ledger) == before


def test_release_returns_the_bytes_it_gave_back() -> None:
    ledger = Ledger(100)
    id = ledger.reserve("a", Kind.EXTERNAL, 70)
    assert ledger.release(id) == 70
    assert ledger.allocated_bytes == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda ledger, id: ledger.release(id),
        lambda ledger, id: ledger.resize(id, 1),
        lambda ledger, id: ledger.split(id, "a", Kind.CONTEXT, 0),
        lambda ledger, id: ledger.join(id),
        lambda ledger, id: ledger.size(id),
        lambda ledger, id: ledger.get(id),
    ],
    ids=["release", "resize", "split", "join", "size", "get"],
)
@pytest.mark.parametrize("never_made", [True, False], ids=["never made", "released"])
def test_what_is_not_booked_is_an_error_whatever_is_asked_of_it(
    call: Callable[[Ledger, ReservationId], object], never_made: bool
) -> None:
    ledger = Ledger(100)
    kept, gone = ledger.reserve("a", Kind.EXTERNAL, 10), ledger.reserve("a", Kind.EXTERNAL, 10)
    ledger.release(gone)
    before = picture(ledger)
    with pytest.raises(UnknownReservation):
        call(ledger, STRANGER if never_made else gone)
    assert picture(ledger) == before
    assert ledger.size(kept) == 10


def test_an_id_is_never_used_again() -> None:
    ledger = Ledger(100)
    first = ledger.reserve("a", Kind.EXTERNAL, 10)
    ledger.release(first)
    assert ledger.reserve("a", Kind.EXTERNAL, 10) != first


def test_a_split_changes_holders_and_not_the_sum_even_when_the_ledger_is_full() -> None:
    ledger = Ledger(100)
    whole = ledger.reserve("conductor", Kind.HEADROOM, 100)
    part = ledger.split(whole, "a", Kind.CONTEXT, 60)
    assert ledger.snapshot() == (
        Reservation(whole, "conductor", Kind.HEADROOM, 40),
        Reservation(part, "a", Kind.CONTEXT, 60),
    )
    assert ledger.leases() == {whole: 100}
    assert ledger.free_bytes == 0


def test_a_part_that_grew_returns_all_of_it() -> None:
    ledger = Ledger(100)
    whole = ledger.reserve("conductor", Kind.HEADROOM, 50)
    part = ledger.split(whole, "a", Kind.CONTEXT, 30)
    ledger.resize(part, 45)
    assert ledger.join(part) == 45
    assert ledger.size(whole) == 65
    ledger.check()


def test_parts_are_joined_and_wholes_released_never_the_other_way_round() -> None:
    ledger = Ledger(100)
    whole = ledger.reserve("conductor", Kind.HEADROOM, 50)
    part = ledger.split(whole, "a", Kind.CONTEXT, 30)
    before = picture(ledger)
    with pytest.raises(InternalError, match="join it instead"):
        ledger.release(part)
    with pytest.raises(InternalError, match="while parts of it are in use"):
        ledger.release(whole)
    with pytest.raises(InternalError, match="was not split"):
        ledger.join(whole)
    assert picture(ledger) == before


def test_a_part_is_not_split_again() -> None:
    ledger = Ledger(100)
    part = ledger.split(ledger.reserve("conductor", Kind.HEADROOM, 50), "a", Kind.CONTEXT, 30)
    before = picture(ledger)
    with pytest.raises(InternalError):
        ledger.split(part, "b", Kind.CONTEXT, 10)
    assert picture(ledger) == before
    ledger.check()


def test_more_than_there_is_cannot_be_split_off() -> None:
    ledger = Ledger(100)
    whole = ledger.reserve("conductor", Kind.HEADROOM, 50)
    before = picture(ledger)
    with pytest.raises(InternalError):
        ledger.split(whole, "a", Kind.CONTEXT, 51)
    assert picture(ledger) == before


def test_a_reservation_that_is_attached_is_a_part_and_one_that_is_detached_is_whole_again() -> None:
    ledger = Ledger(100)
    room, weights = ledger.reserve("conductor", Kind.HEADROOM, 50), ledger.reserve("alpha", Kind.WEIGHTS, 30)
    ledger.attach(weights, room)
    assert (ledger.leases(), ledger.parts_bytes(room), ledger.allocated_bytes) == ({room: 80}, 30, 80)
    ledger.check()
    ledger.detach(weights)
    assert (ledger.leases(), ledger.parts_bytes(room), ledger.allocated_bytes) == ({room: 50, weights: 30}, 0, 80)
    ledger.attach(weights, room)
    assert ledger.join(weights) == 30
    assert (ledger.leases(), ledger.size(room)) == ({room: 80}, 80)
    ledger.check()


def test_a_part_that_is_detached_takes_its_bytes_along() -> None:
    ledger = Ledger(100)
    room = ledger.reserve("conductor", Kind.HEADROOM, 50)
    part = ledger.split(room, "alpha", Kind.WEIGHTS, 30)
    ledger.detach(part)
    assert ledger.leases() == {room: 20, part: 30}
    assert ledger.release(part) == 30
    assert ledger.release(room) == 20


def test_parts_of_parts_and_parts_of_nothing_are_our_bug() -> None:
    ledger = Ledger(100)
    room, other = ledger.reserve("conductor", Kind.HEADROOM, 50), ledger.reserve("alpha", Kind.WEIGHTS, 10)
    part = ledger.split(room, "a", Kind.CONTEXT, 20)
    before = picture(ledger)
    illegal: tuple[Callable[[], None], ...] = (
        lambda: ledger.attach(part, other),  # it is a part already
        lambda: ledger.attach(other, part),  # its origin would be one
        lambda: ledger.attach(room, other),  # it has parts of its own
        lambda: ledger.attach(STRANGER, room),
        lambda: ledger.attach(other, STRANGER),
        lambda: ledger.detach(other),
        lambda: ledger.detach(STRANGER),
    )
    for call in illegal:
        with pytest.raises(InternalError):
            call()
    assert picture(ledger) == before
    ledger.check()


def test_nothing_is_a_part_of_itself() -> None:
    ledger = Ledger(100)
    room = ledger.reserve("conductor", Kind.HEADROOM, 50)
    with pytest.raises(InternalError):
        ledger.attach(room, room)


# --- a cap that moves -------------------------------------------------------------------------------------------------


def test_a_cap_that_falls_below_what_is_booked_takes_nothing_and_gives_nothing() -> None:
    ledger = Ledger(100)
    room = ledger.reserve("conductor", Kind.HEADROOM, 80)
    ledger.set_cap(60)
    ledger.check()
    assert (ledger.allocated_bytes, ledger.overdrawn_bytes, ledger.free_bytes) == (80, 20, -20)
    before = picture(ledger)
    with pytest.raises(OverCap) as excess:
        ledger.reserve("b", Kind.EXTERNAL, 1)
    assert (excess.value.requested_bytes, excess.value.free_bytes) == (1, -20)
    with pytest.raises(OverCap):
        ledger.resize(room, 81)
    assert picture(ledger) == before


def test_beyond_the_cap_bytes_still_change_hands_and_come_back() -> None:
    ledger = Ledger(100)
    room = ledger.reserve("conductor", Kind.HEADROOM, 80)
    ledger.set_cap(0)
    part = ledger.split(room, "a", Kind.CONTEXT, 30)
    assert ledger.reserve("b", Kind.EXTERNAL, 0)
    ledger.detach(part)
    ledger.resize(room, 20)
    assert ledger.release(part) == 30
    assert ledger.overdrawn_bytes == 20
    ledger.check()


def test_what_was_given_back_beyond_the_cap_is_not_had_again() -> None:
    ledger = Ledger(100)
    room = ledger.reserve("conductor", Kind.HEADROOM, 80)
    ledger.set_cap(60)
    ledger.resize(room, 70)
    with pytest.raises(OverCap):
        ledger.resize(room, 71)
    ledger.resize(room, 60)
    assert ledger.overdrawn_bytes == 0
    ledger.set_cap(100)
    ledger.resize(room, 100)
    ledger.check()


def test_a_cap_that_is_set_to_what_it_is_changes_nothing() -> None:
    ledger = Ledger(100)
    before = picture(ledger)
    ledger.set_cap(100)
    assert picture(ledger) == before
    with pytest.raises(InternalError):
        ledger.set_cap(-1)
    assert picture(ledger) == before


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bytes", [-1, -(2**63)])
def test_negative_bytes_are_our_bug_and_change_nothing(bytes: int) -> None:
    ledger = Ledger(100)
    id = ledger.reserve("a", Kind.EXTERNAL, 10)
    before = picture(ledger)
    for call in (
        lambda: ledger.reserve("a", Kind.EXTERNAL, bytes),
        lambda: ledger.resize(id, bytes),
        lambda: ledger.split(id, "a", Kind.CONTEXT, bytes),
    ):
        with pytest.raises(InternalError):
            call()
    assert picture(ledger) == before
    with pytest.raises(InternalError):
        Ledger(bytes)


def test_no_byte_without_a_holder() -> None:
    ledger = Ledger(100)
    whole = ledger.reserve("conductor", Kind.HEADROOM, 50)
    before = picture(ledger)
    with pytest.raises(InternalError):
        ledger.reserve("", Kind.EXTERNAL, 10)
    with pytest.raises(InternalError):
        ledger.split(whole, "", Kind.CONTEXT, 10)
    assert picture(ledger) == before

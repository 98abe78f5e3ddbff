"""The ledger: exact, under its cap, nothing clamped, nothing anonymous."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule, run_state_machine_as_test

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


class LedgerAgainstADict(RuleBasedStateMachine):
    """The model: sizes by id, parts by id, plain arithmetic. Sizes are drawn far beyond the cap on purpose."""

    CAP = 1000
    operations = 0

    wholes = Bundle("wholes")
    parts = Bundle("parts")
    sizes = st.integers(0, 400) | st.integers(0, 2 * CAP)

    @initialize()
    def open_the_books(self) -> None:
        self.ledger = Ledger(self.CAP)
        self.model: dict[ReservationId, int] = {}
        self.origins: dict[ReservationId, ReservationId] = {}

    def expect(self, error: type[Exception] | None, call: Callable[[], object]) -> object:
        type(self).operations += 1
        before = picture(self.ledger)
        if error is None:
            return call()
        with pytest.raises(error):
            call()
        assert picture(self.ledger) == before
        return None

    @property
    def free(self) -> int:
        return self.CAP - sum(self.model.values())

    @rule(target=wholes, holder=st.sampled_from("abc"), kind=st.sampled_from(Kind), bytes=sizes)
    def reserve(self, holder: str, kind: Kind, bytes: int) -> object:
        fits = bytes <= self.free
        id = self.expect(None if fits else OverCap, lambda: self.ledger.reserve(holder, kind, bytes))
        if id is None:
            return STRANGER
        assert id not in self.model
        self.model[id] = bytes
        return id

    @rule(id=wholes | parts, bytes=sizes)
    def resize(self, id: ReservationId, bytes: int) -> None:
        if id not in self.model:
            self.expect(UnknownReservation, lambda: self.ledger.resize(id, bytes))
        elif bytes - self.model[id] > max(0, self.free):
            self.expect(OverCap, lambda: self.ledger.resize(id, bytes))
        else:
            self.expect(None, lambda: self.ledger.resize(id, bytes))
            self.model[id] = bytes

    @rule(id=wholes | parts)
    def release(self, id: ReservationId) -> None:
        if id not in self.model:
            self.expect(UnknownReservation, lambda: self.ledger.release(id))
        elif id in self.origins or id in self.origins.values():
            self.expect(InternalError, lambda: self.ledger.release(id))
        else:
            assert self.expect(None, lambda: self.ledger.release(id)) == self.model.pop(id)

    @rule(target=parts, id=wholes | parts, holder=st.sampled_from("abc"), share=st.integers(0, 120))
    def split(self, id: ReservationId, holder: str, share: int) -> object:
        bytes = self.model.get(id, 0) * share // 100
        error = UnknownReservation if id not in self.model else None
        if error is None and (bytes > self.model[id] or id in self.origins):
            error = InternalError
        part = self.expect(error, lambda: self.ledger.split(id, holder, Kind.CONTEXT, bytes))
        if part is None:
            return STRANGER
        self.model[id] -= bytes
        self.model[part] = bytes
        self.origins[part] = id
        return part

    @rule(id=consumes(parts) | wholes)
    def join(self, id: ReservationId) -> None:
        if id not in self.model:
            self.expect(UnknownReservation, lambda: self.ledger.join(id))
        elif id not in self.origins:
            self.expect(InternalError, lambda: self.ledger.join(id))
        else:
            assert self.expect(None, lambda: self.ledger.join(id)) == self.model[id]
            self.model[self.origins.pop(id)] += self.model.pop(id)

    @invariant()
    def they_agree(self) -> None:
        self.ledger.check()
        assert self.ledger.allocated_bytes == sum(self.model.values()) <= self.CAP
        assert {r.id: r.bytes for r in self.ledger.snapshot()} == {id: size for id, size in self.model.items() if size}
        leases = {id: size for id, size in self.model.items() if id not in self.origins}
        for part, origin in self.origins.items():
            leases[origin] += self.model[part]
        assert self.ledger.leases() == leases


def test_ten_thousand_random_operations_agree_with_a_dict() -> None:
    LedgerAgainstADict.operations = 0
    run_state_machine_as_test(
        LedgerAgainstADict,
        settings=settings(max_examples=125, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)),
    )
    assert LedgerAgainstADict.operations >= 10_000

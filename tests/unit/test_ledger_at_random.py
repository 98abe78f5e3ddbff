"""The ledger against a dict: random operations, legal or not, under a cap that moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule, run_state_machine_as_test

from conductor.core.ledger import Ledger, OverCap
from conductor.errors import InternalError, UnknownReservation
from conductor.types import Kind, ReservationId

STRANGER = ReservationId("r999")
T = TypeVar("T")


def picture(ledger: Ledger) -> object:
    return ledger.snapshot(), ledger.leases(), ledger.allocated_bytes, ledger.cap_bytes, ledger.revision


class LedgerAgainstADict(RuleBasedStateMachine):
    """The model: sizes by id, parts by id, plain arithmetic. Sizes are drawn far beyond the cap on purpose."""

    CAP = 1000
    operations = 0

    wholes = Bundle("wholes")
    parts = Bundle("parts")
    sizes = st.integers(0, 400) | st.integers(0, 2 * CAP)

    @initialize()
    def open_the_books(self) -> None:
        self.ledger, self.cap, self.tolerated = Ledger(self.CAP), self.CAP, 0
        self.model: dict[ReservationId, int] = {}
        self.origins: dict[ReservationId, ReservationId] = {}

    def expect(self, error: type[Exception] | None, call: Callable[[], T]) -> T | None:
        """Its value, or None where the error was due and came, with nothing changed."""
        type(self).operations += 1
        if error is None:
            return call()
        before = picture(self.ledger)
        with pytest.raises(error):
            call()
        assert picture(self.ledger) == before
        return None

    @property
    def free(self) -> int:
        return self.cap - sum(self.model.values())

    @rule(cap=sizes)
    def set_cap(self, cap: int) -> None:
        self.expect(None, lambda: self.ledger.set_cap(cap))
        if cap != self.cap:
            self.cap, self.tolerated = cap, sum(self.model.values())

    @rule(target=wholes, holder=st.sampled_from("abc"), kind=st.sampled_from(Kind), bytes=sizes)
    def reserve(self, holder: str, kind: Kind, bytes: int) -> ReservationId:
        fits = bytes <= max(0, self.free)
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
    def split(self, id: ReservationId, holder: str, share: int) -> ReservationId:
        bytes = self.model.get(id, 0) * share // 100
        error: type[Exception] | None = UnknownReservation if id not in self.model else None
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

    @rule(id=wholes | parts, to=wholes | parts)
    def attach(self, id: ReservationId, to: ReservationId) -> None:
        known, apart = {id, to} <= self.model.keys(), not {id, to} & self.origins.keys()
        legal = known and apart and id != to and id not in self.origins.values()
        self.expect(None if legal else InternalError, lambda: self.ledger.attach(id, to))
        if legal:
            self.origins[id] = to

    @rule(id=wholes | parts)
    def detach(self, id: ReservationId) -> None:
        self.expect(None if id in self.origins else InternalError, lambda: self.ledger.detach(id))
        self.origins.pop(id, None)

    @invariant()
    def they_agree(self) -> None:
        self.ledger.check()
        assert self.ledger.allocated_bytes == sum(self.model.values()) <= max(self.cap, self.tolerated)
        assert self.ledger.overdrawn_bytes == max(0, -self.free)
        assert {r.id: r.bytes for r in self.ledger.snapshot()} == {id: size for id, size in self.model.items() if size}
        leases = {id: size for id, size in self.model.items() if id not in self.origins}
        for part, origin in self.origins.items():
            leases[origin] += self.model[part]
        assert self.ledger.leases() == leases
        for id in leases:
            assert self.ledger.parts_bytes(id) == leases[id] - self.model[id]


@pytest.mark.slow
def test_ten_thousand_random_operations_agree_with_a_dict() -> None:
    LedgerAgainstADict.operations = 0
    run_state_machine_as_test(
        LedgerAgainstADict,
        settings=settings(max_examples=110, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck)),
    )
    assert LedgerAgainstADict.operations >= 10_000

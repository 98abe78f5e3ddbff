"""Whose the device's bytes are: a card that a test fills, with our models on it, our temporary buffers, and strangers."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.backend.device import Device, Reading, Unreadable, cap_bytes, margins, physical_bytes
from conductor.types import DeviceKind
from conductor.units import GIB, MIB

DRIVER = 300 * MIB
MARGIN = 100 * MIB


@dataclass
class Card:
    """8 GiB as a driver would tell of them. What we hold is what we account for, plus what nobody can account for."""

    total: int = 8 * GIB
    overhead: int = 0
    models: int = 0  #: accounted for
    temporary: int = 0  #: ours, and in nobody's account
    strangers: int = 0
    answers: bool = True
    margin: int = MARGIN

    def memory(self) -> tuple[int, int]:
        if not self.answers:
            raise Unreadable("gone")
        return self.total, self.total - DRIVER - self.overhead - self.models - self.temporary - self.strangers

    def device(self, *, limit: int | None = None, kind: DeviceKind = DeviceKind.CUDA) -> Device:
        """Opened, with a CUDA context of 500 MiB made and claimed."""
        device = Device(
            kind, "a card", "by the test", self.memory,
            used_bytes=lambda: self.models, margin_bytes=lambda: self.margin, limit=limit,
        )  # fmt: skip
        self.overhead = 500 * MIB
        device.claim(device.taken_bytes())
        return device


def test_before_we_take_anything_all_that_is_not_free_is_others() -> None:
    card = Card(strangers=GIB)
    assert card.device().read() == Reading(8 * GIB, 8 * GIB - DRIVER - GIB - 500 * MIB, DRIVER + GIB)


def test_the_cuda_context_is_measured_and_then_ours() -> None:
    card = Card()
    device = card.device()
    assert device.taken_bytes() == 500 * MIB
    assert device.read().others_bytes == DRIVER


def test_our_own_loads_do_not_look_like_strangers() -> None:
    card = Card()
    device = card.device()
    card.models = 3 * GIB
    assert device.read().others_bytes == DRIVER
    assert device.taken_bytes() == 3 * GIB + 500 * MIB
    card.models = 0
    assert device.read() == Reading(8 * GIB, 8 * GIB - DRIVER - 500 * MIB, DRIVER)


def test_strangers_that_come_lower_the_cap_at_once() -> None:
    card = Card()
    device = card.device()
    before = cap_bytes(device.read(), 90)
    card.strangers = 2 * GIB
    assert before - cap_bytes(device.read(), 90) == 2 * GIB - MARGIN  # what might have been ours is booked as the margin


def test_strangers_that_leave_raise_the_cap_again() -> None:
    card = Card()
    device = card.device()
    before = cap_bytes(device.read(), 90)
    card.strangers = 2 * GIB
    device.read()
    card.strangers = 0
    assert cap_bytes(device.read(), 90) == before


def test_strangers_that_were_there_first_raise_the_cap_when_they_leave() -> None:
    card = Card(strangers=3 * GIB)
    device = card.device()
    card.strangers = 0
    assert device.read().others_bytes == DRIVER


def test_growth_within_the_margin_is_ours() -> None:
    card = Card()
    device = card.device()
    card.temporary = MARGIN
    assert device.read() == Reading(8 * GIB, 8 * GIB - DRIVER - 500 * MIB - MARGIN, DRIVER)


def test_growth_beyond_the_margin_is_others() -> None:
    card = Card()
    device = card.device()
    card.temporary = MARGIN + 7 * MIB
    assert device.read().others_bytes == DRIVER + 7 * MIB


def test_a_larger_margin_covers_more_of_what_is_unexplained() -> None:
    card = Card()
    device = card.device()
    card.temporary = MARGIN + 16 * MIB
    assert device.read().others_bytes == DRIVER + 16 * MIB
    card.margin += 16 * MIB  # a context opened, and its pool is booked
    assert device.read().others_bytes == DRIVER


def test_freed_memory_that_does_not_come_back_counts_as_others() -> None:
    card = Card()
    device = card.device()
    card.models = 2 * GIB
    device.read()
    card.models, card.strangers = 0, 2 * GIB  # given back by our account, and the driver does not say so
    assert device.read().others_bytes == DRIVER + 2 * GIB - MARGIN


def test_a_limit_below_what_is_free_leaves_the_rest_of_the_card_alone() -> None:
    card = Card(total=80 * GIB)
    device = card.device(limit=8 * GIB)
    assert device.read() == Reading(8 * GIB, 8 * GIB - 500 * MIB, 0)
    card.strangers = 60 * GIB
    assert device.read().others_bytes == 0
    card.models, card.strangers = GIB, 75 * GIB  # 5 GiB are left of the card, less the driver's
    assert device.read().others_bytes == 3 * GIB + DRIVER - MARGIN


def test_under_a_limit_temporary_buffers_still_lower_what_is_free() -> None:
    card = Card(total=80 * GIB)
    device = card.device(limit=8 * GIB)
    card.models, card.temporary = GIB, 70 * MIB
    assert device.read() == Reading(8 * GIB, 7 * GIB - 570 * MIB, 0)


def test_a_limit_beyond_the_card_changes_nothing() -> None:
    assert Card().device(limit=80 * GIB).read() == Card().device().read()


def test_a_limit_beyond_what_is_free_counts_strangers() -> None:
    card = Card(strangers=3 * GIB)
    assert card.device(limit=6 * GIB).read().others_bytes == GIB + DRIVER


def test_a_driver_that_does_not_answer_leaves_the_last_reading_and_is_mentioned_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    card = Card()
    device = card.device()
    last = device.read()
    card.answers, card.models = False, GIB
    with caplog.at_level(logging.WARNING):
        assert [device.read(), device.read()] == [last, last]
        assert device.taken_bytes() == 500 * MIB
        card.answers = True
        assert device.read().free_bytes == last.free_bytes - GIB
        card.answers = False
        device.read()
    assert [record.getMessage() for record in caplog.records] == [
        "the device does not answer, so its last reading stands: gone"
    ] * 2


def test_while_buffers_move_the_last_reading_stands() -> None:
    card = Card()
    device = card.device()
    last = device.read()
    with device.moving():
        card.strangers = 2 * GIB  # allocated for our model, which is not in our account yet
        with device.moving():
            assert device.read() == last
        assert device.read() == last
        card.models, card.strangers = 2 * GIB, 0
    assert device.read().others_bytes == DRIVER


def test_a_failed_move_ends_too() -> None:
    card = Card()
    device = card.device()
    with pytest.raises(MemoryError), device.moving():
        raise MemoryError
    card.strangers = 2 * GIB
    assert device.read().others_bytes > DRIVER


def test_an_account_that_changes_during_the_reading_is_read_again_later() -> None:
    card = Card()
    accounts = iter([0, 2 * GIB, 2 * GIB, 2 * GIB])
    device = Device(DeviceKind.CUDA, "a card", "by the test", card.memory, used_bytes=lambda: next(accounts))
    first = device.read()
    assert first.others_bytes == DRIVER  # the model was not on the card yet when the driver was asked
    card.models = 2 * GIB
    assert device.read().others_bytes == DRIVER


def test_a_read_in_another_thread_waits_for_nobody_that_moves_buffers() -> None:
    device = Card().device()
    with device.moving():
        thread = threading.Thread(target=device.read)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive()


@given(
    strangers=st.lists(st.integers(0, 4 * GIB), min_size=1),
    temporary=st.lists(st.integers(0, MARGIN), min_size=1),
    models=st.integers(0, 3 * GIB),
)
def test_whatever_comes_and_goes_the_books_that_fit_the_cap_fit_the_card(
    strangers: list[int], temporary: list[int], models: int
) -> None:
    card = Card()
    device = card.device()
    for who, ours in zip(strangers, temporary, strict=False):
        card.strangers, card.temporary, card.models = who, ours, models
        reading = device.read()
        # The margin is booked whole: what of it is not used yet makes up for what of others it hid.
        assert physical_bytes(reading) - 500 * MIB - MARGIN <= card.total - DRIVER - who - 500 * MIB - ours
        assert DRIVER <= reading.others_bytes <= DRIVER + who + ours


@pytest.mark.parametrize(
    ("percent", "others", "cap"),
    [(90, 0, 8 * GIB * 9 // 10 // MIB * MIB), (100, MIB + 1, 8 * GIB - 2 * MIB), (90, 8 * GIB, 0), (1, GIB, 0)],
)
def test_the_cap_is_a_share_of_the_device_less_others_in_whole_mib(percent: int, others: int, cap: int) -> None:
    assert cap_bytes(Reading(8 * GIB, 0, others), percent) == cap


def test_a_gpu_has_a_margin_and_the_host_has_none() -> None:
    assert [name for name, _ in margins(DeviceKind.CUDA)] == ["kernels and libraries"]
    assert margins(DeviceKind.HOST) == ()

"""Admission by plain numbers: the rows of the decision in their order, and the window that would fit.

See also: `test_promise.py`, for what is decided about; `test_refusals.py`, for what a refusal tells.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.core.admission import Decision, Outcome, Promise, Room, decide, largest_window
from conductor.types import ModelId

M = ModelId("m")


def promised(*, firm: int = 0, turn: int = 0) -> Promise:
    return Promise(weights={M: firm}, shared_turn_bytes=turn)


def decision(
    *,
    cap: int = 1000,
    best_cap: int | None = None,
    fixed: int = 0,
    firm: int = 0,
    turn_room: int = 0,
    in_use: int = 0,
    before: Promise | None = None,
    after: Promise | None = None,
    alone: Promise | None = None,
    moved: int = 0,
) -> Decision:
    """By default: an empty device of 1000 bytes, and a newcomer that asks for weights of 100 and a turn of 50."""
    room = Room(cap, cap if best_cap is None else best_cap, fixed, firm, turn_room, in_use)
    asked = after or promised(firm=100, turn=50)
    return decide(room, before=before or promised(), after=asked, alone=alone or asked, moved_bytes=moved)


def test_outcomes_are_ordered_from_worst_to_best() -> None:
    assert sorted(Outcome) == [Outcome.NEVER_FITS, Outcome.WAIT, Outcome.EVICT, Outcome.FIT]


def test_what_is_requested_is_what_the_promise_grows_by_and_the_firm_part_of_it_is_told_apart() -> None:
    told = decision(firm=100, turn_room=60, before=promised(firm=100, turn=60), after=promised(firm=250, turn=80))
    assert told == Decision(Outcome.FIT, requested_bytes=150 + 20, firm_bytes=150)


# --- 1: what strangers took is booked here ----------------------------------------------------------------------------


def test_1_where_strangers_took_what_is_booked_everybody_waits_even_whoever_asks_for_nothing() -> None:
    nothing = promised(firm=100, turn=50)
    assert decision(cap=149, firm=100, turn_room=50, before=nothing, after=nothing).outcome is Outcome.WAIT
    assert decision(cap=150, firm=100, turn_room=50, before=nothing, after=nothing).outcome is Outcome.FIT


def test_1_comes_before_4_whoever_could_never_fit_is_not_told_so_while_the_device_drifts() -> None:
    huge = promised(firm=5000, turn=50)
    assert decision(cap=99, best_cap=1000, firm=100, after=huge).outcome is Outcome.WAIT
    assert decision(cap=100, best_cap=1000, firm=100, after=huge).outcome is Outcome.NEVER_FITS


# --- 2: it fits beside all that is booked -----------------------------------------------------------------------------


def test_2_the_last_byte_can_be_had() -> None:
    assert decision(cap=150).outcome is Outcome.FIT
    assert decision(cap=149).outcome < Outcome.FIT


def test_2_whoever_adds_nothing_fits_a_full_device() -> None:
    full = promised(firm=950, turn=50)
    assert decision(firm=950, turn_room=50, in_use=50, before=full, after=full) == Decision(Outcome.FIT, 0, 0)


def test_2_the_room_for_turns_is_shared_not_added_up() -> None:
    assert decision(cap=250, firm=100, turn_room=50, before=promised(firm=100, turn=50), after=promised(firm=200, turn=50)) == (
        Decision(Outcome.FIT, 100, 100)
    )


def test_2_room_for_turns_that_is_booked_beyond_the_promise_and_not_in_use_is_nobodys() -> None:
    assert decision(cap=150, turn_room=150, in_use=50).outcome is Outcome.FIT


def test_2_weights_in_use_that_become_firm_are_not_counted_twice() -> None:
    before, after = promised(turn=150), promised(firm=100, turn=50)

    def outcome(moved: int) -> Outcome:
        return decision(cap=150, turn_room=150, in_use=150, before=before, after=after, moved=moved).outcome

    assert (outcome(100), outcome(99)) == (Outcome.FIT, Outcome.EVICT)


# --- 3: it fits beside all that is promised ---------------------------------------------------------------------------


def test_3_what_is_in_use_beyond_the_promise_can_be_cleared() -> None:
    assert decision(cap=200, turn_room=101, in_use=101).outcome is Outcome.EVICT
    assert decision(cap=200, turn_room=100, in_use=100).outcome is Outcome.FIT


def test_3_the_promise_itself_is_cleared_for_nobody() -> None:
    before, after = promised(turn=100), promised(firm=100, turn=100)
    assert decision(cap=200, turn_room=100, in_use=100, before=before, after=after).outcome is Outcome.FIT
    alone = promised(firm=100, turn=50)
    assert decision(cap=199, turn_room=100, in_use=100, before=before, after=after, alone=alone).outcome is Outcome.WAIT


# --- 4: alone on the device it does not fit ---------------------------------------------------------------------------


def test_4_what_an_empty_device_could_not_hold_never_fits() -> None:
    assert decision(cap=149).outcome is Outcome.NEVER_FITS


def test_4_what_nobody_can_give_back_counts_against_the_device() -> None:
    assert decision(cap=150, fixed=1, firm=1).outcome is Outcome.NEVER_FITS


def test_4_the_device_is_what_it_is_without_strangers() -> None:
    assert decision(cap=149, best_cap=150).outcome is Outcome.WAIT
    assert decision(cap=149, best_cap=149).outcome is Outcome.NEVER_FITS


def test_4_what_it_would_take_alone_counts_not_what_it_adds_to_others() -> None:
    before, after = promised(firm=950, turn=50), promised(firm=951, turn=50)
    alone = promised(firm=100, turn=50)
    assert decision(firm=950, turn_room=50, before=before, after=after, alone=alone).outcome is Outcome.WAIT


def test_4_comes_after_2_whoever_fits_now_fits_even_if_the_estimate_says_otherwise() -> None:
    adds_nothing = promised(firm=100, turn=50)
    assert decision(
        cap=150, firm=80, turn_room=50, before=adds_nothing, after=adds_nothing, alone=promised(firm=101, turn=50)
    ) == (Decision(Outcome.FIT, 0, 0))


# --- 5: otherwise -----------------------------------------------------------------------------------------------------


def test_5_otherwise_it_waits_for_a_single_byte_if_need_be() -> None:
    before, after = promised(firm=800, turn=50), promised(firm=951, turn=50)
    alone = promised(firm=151, turn=50)
    assert decision(firm=800, turn_room=50, before=before, after=after, alone=alone) == Decision(Outcome.WAIT, 151, 151)


sizes = st.integers(0, 300)


@given(cap=st.integers(0, 600), fixed=sizes, firm=sizes, in_use=sizes, before=sizes, weights=sizes, turn=sizes)
def test_more_room_never_makes_the_outcome_worse(
    cap: int, fixed: int, firm: int, in_use: int, before: int, weights: int, turn: int
) -> None:
    def outcome(cap: int) -> Outcome:
        return decision(
            cap=cap,
            fixed=fixed,
            firm=fixed + firm,
            turn_room=max(before, in_use),
            in_use=in_use,
            before=promised(firm=firm, turn=before),
            after=promised(firm=firm + weights, turn=max(before, turn)),
            alone=promised(firm=weights, turn=turn),
        ).outcome

    if fixed + firm + max(before, in_use) <= cap:  # in a drift all wait, whatever they ask for
        assert outcome(cap) <= outcome(cap + 1)


@given(cap=st.integers(0, 600), firm=sizes, in_use=sizes, less=sizes, before=sizes, weights=sizes)
def test_a_smaller_newcomer_never_fares_worse(cap: int, firm: int, in_use: int, less: int, before: int, weights: int) -> None:
    def outcome(weights: int) -> Outcome:
        return decision(
            cap=cap,
            firm=firm,
            turn_room=max(before, in_use),
            in_use=in_use,
            before=promised(firm=firm, turn=before),
            after=promised(firm=firm + weights, turn=before),
            alone=promised(firm=weights),
        ).outcome

    assert outcome(weights + less) <= outcome(weights)


# --- the largest window -----------------------------------------------------------------------------------------------


@given(limit=st.integers(0, 20_000), below=st.integers(1, 20_000))
def test_the_largest_window_is_the_largest_multiple_of_256_that_fits_and_is_shorter(limit: int, below: int) -> None:
    fitting = [window for window in range(256, below, 256) if window <= limit]
    assert largest_window(lambda window: window <= limit, below=below) == max(fitting, default=None)


def test_the_search_halves_and_never_asks_for_zero_tokens() -> None:
    asked: list[int] = []

    def fits(window: int) -> bool:
        asked.append(window)
        return window <= 1_000_000

    assert largest_window(fits, below=2**31 - 1) == 999_936
    assert len(asked) <= 23
    assert min(asked) >= 256


@pytest.mark.parametrize("below", [1, 2, 255, 256])
def test_there_is_no_window_shorter_than_the_shortest(below: int) -> None:
    assert largest_window(lambda _: True, below=below) is None


def test_the_granularity_is_llama_cpps() -> None:
    windows = [largest_window(lambda _: True, below=below) for below in itertools.islice(itertools.count(257, 997), 40)]
    assert all(window is not None and window % 256 == 0 for window in windows)

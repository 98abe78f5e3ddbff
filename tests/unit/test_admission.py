"""Admission by plain numbers: the decision tree in its order, the promise against brute force, the window that would fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.core import admission
from conductor.core.admission import Decision, Outcome, decide, largest_contexts, largest_window, promise_bytes
from conductor.core.estimate import context_bytes
from conductor.core.events import AgentSpec
from conductor.core.state import State
from conductor.errors import RefusalCode
from conductor.types import AgentId, ContextSpec, DeviceKind, ModelId
from tests.support.stories import ALPHA, GEOMETRY

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")


def decision(
    *,
    cap: int = 1000,
    booked: int = 0,
    fixed: int = 0,
    promised: int = 0,
    promise: int = 50,
    context: int = 50,
    weights: int = 100,
    loaded: bool = False,
) -> Decision:
    return decide(
        cap_bytes=cap,
        booked_bytes=booked,
        fixed_bytes=fixed,
        promised_bytes=promised,
        promise_bytes=promise,
        context_bytes=context,
        weights_bytes=weights,
        weights_are_booked=loaded,
    )


# --- the decision tree ------------------------------------------------------------------------------------------------


def test_outcomes_are_ordered_from_worst_to_best() -> None:
    assert Outcome.NEVER_FITS < Outcome.WAIT < Outcome.FIT
    assert sorted(Outcome) == [Outcome.NEVER_FITS, Outcome.WAIT, Outcome.FIT]


def test_1_what_it_adds_must_be_free_to_the_byte() -> None:
    assert decision(booked=850) == Decision(Outcome.FIT, weights_bytes=100, requested_bytes=150)


def test_1_only_what_it_adds_counts_weights_are_booked_once() -> None:
    assert decision(booked=950, loaded=True) == Decision(Outcome.FIT, weights_bytes=0, requested_bytes=50)


def test_1_only_the_growth_of_the_promise_is_requested() -> None:
    assert decision(booked=980, promised=30, promise=50, loaded=True) == Decision(Outcome.FIT, 0, requested_bytes=20)


def test_1_whoever_adds_nothing_fits_a_full_ledger() -> None:
    assert decision(booked=1000, loaded=True, promised=50) == Decision(Outcome.FIT, weights_bytes=0, requested_bytes=0)


def test_1_comes_before_2_whoever_fits_now_fits_even_if_the_weights_estimate_says_otherwise() -> None:
    assert decision(cap=149, booked=80, loaded=True).outcome is Outcome.FIT


def test_2_alone_on_the_device_weights_and_context_must_fit() -> None:
    assert decision(cap=149).outcome is Outcome.NEVER_FITS


def test_2_what_nobody_can_give_back_counts_against_the_device() -> None:
    assert decision(cap=150, booked=1, fixed=1).outcome is Outcome.NEVER_FITS


def test_2_comes_before_3_a_newcomer_too_large_for_the_device_is_not_told_to_wait() -> None:
    assert decision(cap=149, booked=149).outcome is Outcome.NEVER_FITS


def test_2_is_not_softened_by_weights_that_are_booked_already() -> None:
    assert decision(cap=149, booked=100, loaded=True).outcome is Outcome.NEVER_FITS


def test_3_otherwise_it_waits_for_a_single_byte_if_need_be() -> None:
    assert decision(booked=851) == Decision(Outcome.WAIT, weights_bytes=100, requested_bytes=150)


sizes = st.integers(0, 300)


@given(cap=st.integers(0, 600), booked=sizes, fixed=sizes, context=sizes, weights=sizes, loaded=st.booleans())
def test_more_room_never_makes_the_outcome_worse(
    cap: int, booked: int, fixed: int, context: int, weights: int, loaded: bool
) -> None:
    def outcome(cap: int) -> Outcome:
        return decision(
            cap=cap, booked=booked, fixed=fixed, promise=context, context=context, weights=weights, loaded=loaded
        ).outcome

    assert outcome(cap) <= outcome(cap + 1)


# --- the promise ------------------------------------------------------------------------------------------------------


def test_nobody_is_promised_nothing() -> None:
    assert promise_bytes({}, live_contexts=3) == 0


def test_agents_of_one_model_take_turns_so_only_the_largest_counts() -> None:
    assert promise_bytes(largest_contexts([(A, 10), (A, 30), (A, 20)]), live_contexts=3) == 30


def test_as_many_models_count_as_may_be_live_the_largest_first() -> None:
    contexts = [(A, 10), (B, 30), (C, 20)]
    assert [promise_bytes(largest_contexts(contexts), live_contexts=n) for n in (1, 2, 3, 4)] == [30, 50, 60, 60]


contexts = st.lists(st.tuples(st.sampled_from([A, B, C, ModelId("d")]), st.integers(0, 10**12)), max_size=7)


@given(contexts, st.integers(1, 5))
@settings(deadline=None)
def test_the_promise_is_the_worst_case_over_all_sets_of_live_contexts(
    contexts: list[tuple[ModelId, int]], live_contexts: int
) -> None:
    def may_be_live(chosen: tuple[tuple[ModelId, int], ...]) -> bool:
        return len({model for model, _ in chosen}) == len(chosen)

    worst = max(
        sum(size for _, size in chosen)
        for count in range(live_contexts + 1)
        for chosen in itertools.combinations(contexts, count)
        if may_be_live(chosen)
    )
    assert promise_bytes(largest_contexts(contexts), live_contexts=live_contexts) == worst


@given(contexts, contexts, st.integers(1, 5))
def test_a_newcomer_never_lowers_the_promise(
    contexts: list[tuple[ModelId, int]], newcomers: list[tuple[ModelId, int]], live_contexts: int
) -> None:
    without = promise_bytes(largest_contexts(contexts), live_contexts=live_contexts)
    assert promise_bytes(largest_contexts([*contexts, *newcomers]), live_contexts=live_contexts) >= without


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


def test_a_refusal_names_a_window_that_is_then_admitted_and_the_next_longer_one_is_not() -> None:
    def spec(window: int) -> AgentSpec:
        context = ContextSpec(window=window)
        return AgentSpec(AgentId("a"), ALPHA, context, context_bytes(GEOMETRY, context, device=DeviceKind.HOST))

    state = State(cap_bytes=100 + spec(1500).context_bytes, live_contexts=1)
    refusal = state.books.refuse_agent(RefusalCode.NEVER, spec(4096), weights_are_booked=False).refusal
    assert refusal.largest_window is not None

    def outcome(window: int) -> Outcome:
        return state.books.decide(spec(window), weights_are_booked=False).outcome

    assert outcome(refusal.largest_window) is Outcome.FIT
    assert outcome(refusal.largest_window + 256) is not Outcome.FIT


def test_a_refusal_names_no_window_where_not_even_the_weights_fit() -> None:
    state = State(cap_bytes=99, live_contexts=1)
    spec = AgentSpec(AgentId("a"), ALPHA, ContextSpec(window=4096), 10**6)
    refused = state.books.refuse_agent(RefusalCode.NEVER, spec, weights_are_booked=False)
    assert refused.refusal.largest_window is None
    assert replace(refused.refusal, holders=()) == refused.refusal, "nobody holds a byte of it"


def test_the_granularity_is_llama_cpps() -> None:
    window = admission.largest_window(lambda _: True, below=10_000)
    assert window is not None
    assert window % 256 == 0

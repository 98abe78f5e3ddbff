"""Refusals that explain themselves: each number in them is one that the next request can rely on.

Windows have the prices of the formula here, so a story's bytes are those of a small model. See also: `test_state_drift.py`,
`test_state_growth.py`, and `test_state_waitlist.py` for the codes that belong there.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import assume, settings
from hypothesis import given as given_any
from hypothesis import strategies as st

from conductor.core.estimate import ModelPlan, context_bytes
from conductor.core.events import AgentSpec, RegisterRequested, Rung
from conductor.errors import AdmissionRefused, RefusalCode
from conductor.types import AgentId, ContextSpec, DeviceKind, ServiceClass
from tests.support.calls import Call
from tests.support.stories import ALPHA, BETA, GAMMA, GEOMETRY, Stage, model

HEAVY = model("heavy", weights=1 << 20)


def price(window: int) -> int:
    return context_bytes(GEOMETRY, ContextSpec(window=window), device=DeviceKind.HOST)


def asks_for(
    stage: Stage,
    window: int,
    *,
    agent: str = "newcomer",
    on: ModelPlan = HEAVY,
    first: int | None = None,
    kind: str = "shared",
    may_wait: bool = False,
) -> Call:
    """A registration at the formula's prices; `first`: the window that it begins with, if that is a smaller one."""
    windows = (window,) if first is None else (first, window)
    ladder = tuple(Rung(it, price(it)) for it in windows)
    spec = AgentSpec(AgentId(agent), on, ContextSpec(window=window), ladder, ServiceClass(kind))
    return stage.request(lambda id: RegisterRequested(id, spec, may_wait))


def is_admitted(stage: Stage, call: Call) -> bool:
    stage.settle()
    return call.is_admitted


# --- a window that would fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shared", "guaranteed"])
def test_it_names_a_window_that_is_then_admitted_and_the_next_longer_one_is_not(given: Callable[..., Stage], kind: str) -> None:
    stage = given(cap=HEAVY.weights_bytes + price(1500))
    refusal = asks_for(stage, 4096, kind=kind).refusal
    assert refusal.code is RefusalCode.NEVER
    assert refusal.largest_window is not None
    assert asks_for(stage, refusal.largest_window + 256, kind=kind).is_refused
    assert is_admitted(stage, asks_for(stage, refusal.largest_window, kind=kind))


def test_of_a_shared_agent_it_is_the_first_window_that_counts(given: Callable[..., Stage]) -> None:
    stage = given(cap=HEAVY.weights_bytes + price(1500))
    refusal = asks_for(stage, 172_032, first=2048).refusal
    assert refusal.largest_window == asks_for(stage, 2048).refusal.largest_window
    assert is_admitted(stage, asks_for(stage, 172_032, first=refusal.largest_window))


def test_of_a_guaranteed_agent_it_is_the_whole_window(given: Callable[..., Stage]) -> None:
    stage = given(cap=HEAVY.weights_bytes + price(1500))
    refusal = asks_for(stage, 4096, first=512, kind="guaranteed").refusal
    assert refusal.largest_window == asks_for(stage, 4096).refusal.largest_window


def test_it_is_shorter_than_what_was_asked_for(given: Callable[..., Stage]) -> None:
    stage = given(cap=HEAVY.weights_bytes + price(256) - 1)
    assert asks_for(stage, 256).refusal.largest_window is None


def test_it_names_none_where_not_even_the_weights_fit(given: Callable[..., Stage]) -> None:
    stage = given(cap=HEAVY.weights_bytes - 1)
    refusal = asks_for(stage, 4096).refusal
    assert (refusal.largest_window, refusal.fitting_class, refusal.holders) == (None, None, ())


def test_a_window_counts_as_fitting_if_only_what_is_idle_is_in_its_way(given: Callable[..., Stage]) -> None:
    stage = given(cap=2 * HEAVY.weights_bytes + 2 * price(1024), live_contexts=2)
    other = model("other", weights=HEAVY.weights_bytes // 2)
    for agent, plan in (("a", HEAVY), ("b", other)):
        assert is_admitted(stage, asks_for(stage, 1024, agent=agent, on=plan))
        stage.converses(agent)
    third = model("third", weights=HEAVY.weights_bytes // 2)
    refusal = asks_for(stage, 8192, on=third, kind="guaranteed").refusal
    assert refusal.largest_window is not None
    call = asks_for(stage, refusal.largest_window, on=third, kind="guaranteed")
    assert call.waits, "for a context that closes"
    assert is_admitted(stage, call)


# --- a class that would fit -------------------------------------------------------------------------------------------


@pytest.fixture
def taken(given: Callable[..., Stage]) -> Stage:
    """350 bytes: two models with one turn of 100 bytes between them, and 50 bytes to give."""
    stage = given(cap=350)
    stage.has("a", ALPHA, context=100)
    stage.has("b", BETA, context=100)
    return stage


def test_it_says_when_the_weaker_class_would_have_its_layers_streamed(given: Callable[..., Stage]) -> None:
    stage = given(cap=100, home_bytes=1000)
    larger, smaller = model("larger", weights=200, layers=9), model("smaller", weights=90, layers=9)
    refused = stage.registers("a", larger, context=20).refusal
    assert (refused.code, refused.fitting_class, refused.streaming_fits) == (RefusalCode.NEVER, ServiceClass.BEST_EFFORT, True)
    assert "best_effort, with its layers streamed, would fit now" in str(AdmissionRefused(refused))
    assert stage.registers("a", larger, context=20, kind="best_effort").waits_or_is_in
    stage.settle()
    taken = given(cap=120, home_bytes=1000)
    taken.registers("b", ALPHA, context=10)
    taken.settle()
    whole = taken.registers("c", smaller, context=10).refusal
    assert (whole.fitting_class, whole.streaming_fits) == (None, False), "not even a part of it fits"


@pytest.mark.parametrize(
    ("plan", "kind", "context", "fitting"),
    [
        (ALPHA, "guaranteed", 51, ServiceClass.SHARED),
        (GAMMA, "guaranteed", 51, None),
        (model("light", weights=51), "guaranteed", 20, ServiceClass.BEST_EFFORT),
        (model("light", weights=51), "shared", 20, ServiceClass.BEST_EFFORT),
        (model("light", weights=100), "shared", 51, None),
        (model("light", weights=100), "best_effort", 51, None),
    ],
)
def test_it_names_the_strongest_weaker_class_that_is_then_admitted(
    taken: Stage, plan: ModelPlan, kind: str, context: int, fitting: ServiceClass | None
) -> None:
    assert taken.registers("c", plan, context=context, kind=kind).refusal.fitting_class is fitting
    weaker = {"guaranteed": ["shared", "best_effort"], "shared": ["best_effort"], "best_effort": []}[kind]
    admitted = [it for it in weaker if taken.registers(f"as {it}", plan, context=context, kind=it).waits_or_is_in]
    assert admitted[:1] == ([fitting.value] if fitting else [])
    taken.settle()


def test_it_says_so_in_words(taken: Stage) -> None:
    error = taken.registers("c", model("light", weights=51), context=20).failed_with(AdmissionRefused)
    assert "best_effort would fit now" in str(error)


def test_where_others_wait_it_counts_them_and_promises_nothing(taken: Stage) -> None:
    for agent in "cd":
        taken.registers(agent, GAMMA, may_wait=True)
    refusal = taken.registers("e", model("light", weights=51), context=20).refusal
    assert (refusal.waiting_ahead, refusal.fitting_class, refusal.largest_window) == (2, None, None)
    urgent = taken.registers("f", model("light", weights=51), context=20, priority=1).refusal
    assert (urgent.waiting_ahead, urgent.fitting_class) == (0, ServiceClass.BEST_EFFORT)


# --- what idles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy(given: Callable[..., Stage]) -> Stage:
    """Contexts of 50 and 70 bytes may be live; 70 are promised. 330 bytes."""
    stage = given(cap=330, live_contexts=2)
    stage.has("a", ALPHA, context=50)
    stage.has("b", BETA, context=70)
    return stage


def evictable(stage: Stage) -> int:
    return stage.registers("c", GAMMA).refusal.evictable_bytes


def test_what_idles_beyond_the_promise_could_be_had(roomy: Stage) -> None:
    assert evictable(roomy) == 0
    roomy.converses("a")
    assert evictable(roomy) == 0, "its context is part of what is promised"
    roomy.converses("b")
    assert evictable(roomy) == 50
    running = roomy.asks("b")
    assert evictable(roomy) == 50
    also_running = roomy.asks("a")
    assert evictable(roomy) == 0
    roomy.finished(running)
    assert evictable(roomy) == 50, "70 of 120 bytes are promised all the same"
    roomy.finished(also_running)


def test_so_could_idle_weights_of_best_effort_agents(given: Callable[..., Stage]) -> None:
    stage = given(cap=330, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50, kind="best_effort")
        stage.converses(agent)
    refusal = stage.registers("c", model("heavy", weights=200)).refusal
    assert refusal.evictable_bytes == 150
    assert stage.reserves("trainer", 200).refusal.evictable_bytes == 150
    stage.reserves("trainer", 180)
    stage.settle()
    assert stage.booked == 330, "300 - 150 + 180"


# --- when to come back ------------------------------------------------------------------------------------------------


def test_it_does_not_guess_where_nothing_comes_by_itself(taken: Stage) -> None:
    assert taken.registers("c", GAMMA).refusal.retry_after_s is None


def test_it_knows_when_the_first_idle_agent_leaves(given: Callable[..., Stage]) -> None:
    stage = given(cap=250, idle_ttl_s=60.0)
    stage.has("a", ALPHA)
    stage.passes(20.0)
    stage.has("b", ALPHA)
    stage.passes(15.0)
    assert stage.registers("c", BETA, context=60).refusal.retry_after_s == 25.0
    assert stage.reserves("trainer", 101).refusal.retry_after_s == 25.0
    stage.at += 1000.0
    assert stage.registers("c", BETA, context=60).refusal.retry_after_s == 0.0, "as soon as somebody looks"


def test_an_agent_in_use_is_not_about_to_leave(given: Callable[..., Stage]) -> None:
    stage = given(cap=250, idle_ttl_s=60.0)
    stage.has("a", ALPHA)
    stage.at += 40.0
    stage.has("b", ALPHA)
    running = stage.asks("a")
    stage.opened("a")
    assert stage.registers("c", BETA, context=60).refusal.retry_after_s == 60.0, "b's"
    stage.unregisters("b")
    assert stage.registers("c", BETA, context=60).refusal.retry_after_s is None
    stage.finished(running)


def test_where_nobody_idles_it_does_not_guess_either(given: Callable[..., Stage]) -> None:
    stage = given(cap=200, idle_ttl_s=60.0)
    stage.reserves("trainer", 100)
    assert stage.registers("a", ALPHA).refusal.retry_after_s is None


# --- all of it at once ------------------------------------------------------------------------------------------------

fleets = st.lists(
    st.tuples(st.sampled_from(["shared", "best_effort", "guaranteed"]), st.integers(0, 2), st.integers(1, 8)), max_size=5
)
PLANS = [model("one", weights=1 << 18), model("two", weights=1 << 19), model("three", weights=1 << 20)]


@settings(max_examples=60, deadline=None)
@given_any(
    cap=st.integers(1 << 18, 5 << 20),
    fleet=fleets,
    kind=st.sampled_from(["shared", "guaranteed", "best_effort"]),
    plan=st.integers(0, 2),
    steps=st.integers(1, 64),
)
def test_what_a_refusal_says_would_fit_is_admitted(
    cap: int, fleet: list[tuple[str, int, int]], kind: str, plan: int, steps: int
) -> None:
    stage = Stage(cap=cap, live_contexts=2)
    for i, (service_class, on, windows) in enumerate(fleet):
        asks_for(stage, 256 * windows, agent=f"agent-{i}", on=PLANS[on], kind=service_class)
        stage.settle()
        if f"agent-{i}" in stage.agents:
            stage.converses(f"agent-{i}")
    call = asks_for(stage, 256 * steps, on=PLANS[plan], kind=kind)
    stage.settle()
    assume(not call.is_admitted)
    refusal, offers = call.refusal, list[tuple[int, str]]()
    if refusal.largest_window is not None:
        offers.append((refusal.largest_window, kind))
    if refusal.fitting_class is not None:
        offers.append((256 * steps, refusal.fitting_class.value))
    for window, service_class in offers:
        assert is_admitted(stage, asks_for(stage, window, on=PLANS[plan], kind=service_class))
        stage.unregisters("newcomer")
        stage.settle()
    stage.wind_up()

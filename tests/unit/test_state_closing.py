"""The conductor's end as a story: whoever waits is told, everybody leaves, every byte comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import NotRunning, TurnCancelled
from conductor.types import AgentId, KvPlace
from tests.support.stories import ALPHA, BETA, GAMMA, Stage


def test_everybody_leaves_and_every_byte_comes_back(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    stage.has("b", BETA, kind="best_effort")
    stage.has("g", GAMMA, kind="guaranteed")
    for agent in "abg":
        stage.converses(agent)
    stage.closes_down()
    stage.settle()
    assert (stage.agents, stage.booked) == ([], 0)


def test_a_turn_that_runs_is_asked_to_stop_and_those_that_wait_are_over(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    stage.has("b", BETA)
    running, waiting = stage.asks("a"), stage.asks("b")
    stage.opened("a")
    stage.closes_down()
    assert running.stopped
    waiting.failed_with(TurnCancelled)
    stage.finished(running)
    assert actions.LeaveSeat(AgentId("a"), KvPlace.TOKENS) in stage.engine.todo
    stage.settle()
    assert stage.agents == []


@pytest.mark.parametrize("moment", ["waiting", "deferred", "loading", "opening"])
def test_a_registration_that_waits_for_whatever_it_is_is_told(given: Callable[..., Stage], moment: str) -> None:
    stage = given(cap=150)
    if moment in ("waiting", "deferred"):
        stage.has("x", ALPHA)
    if moment == "deferred":
        stage.unregisters("x")
    kind = "guaranteed" if moment == "opening" else "shared"
    call = stage.registers("a", BETA if moment == "waiting" else ALPHA, may_wait=True, kind=kind)
    if moment == "opening":
        stage.loaded(ALPHA)
    assert call.waits
    stage.closes_down()
    call.failed_with(NotRunning)
    stage.settle()
    assert (stage.agents, stage.booked) == ([], 0)


def test_another_task_whose_room_is_being_cleared_is_told(given: Callable[..., Stage]) -> None:
    stage = given(cap=350, live_contexts=2)
    for agent, plan in (("a", ALPHA), ("b", BETA)):
        stage.has(agent, plan, context=50)
        stage.converses(agent)
    call = stage.reserves("trainer", 80)
    stage.closes_down()
    call.failed_with(NotRunning)


def test_whoever_was_leaving_already_is_answered(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000)
    stage.has("a", ALPHA)
    leaving = stage.unregisters("a")
    stage.closes_down()
    stage.settle()
    assert leaving.is_done

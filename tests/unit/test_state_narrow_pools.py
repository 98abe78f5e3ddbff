"""A pool that could not be made with as many slots as wanted: when more are tried again. See also: `test_state_pools.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import DecodeFailed
from conductor.types import AgentId
from tests.support.stories import ALPHA, BETA, Stage

NO_MEMORY = DecodeFailed(AgentId("a"), "no memory")


@pytest.fixture
def rivals(given: Callable[..., Stage]) -> Stage:
    """Two agents, and one of another model; one pool is live at a time. The two's could not be made with two slots."""
    stage = given(cap=1000, live_contexts=1)
    for agent in "ab":
        stage.has(agent, ALPHA, context=50, slots=2)
    stage.has("r", BETA, context=50)
    stage.asks("a")
    stage.open_failed("a", NO_MEMORY)
    stage.settle()
    assert slots(stage) == 1
    return stage


def slots(stage: Stage) -> int:
    return stage.state.pools[stage.pool_of("a")].context.slots


def makes_the_pool_anew(stage: Stage) -> None:
    """As far as the engine is asked for it."""
    stage.converses("r")
    with stage.at_once():
        stage.asks("a")
        stage.asks("b")
    while not stage.engine.is_asked(actions.OpenPool, stage.pool_of("a")):
        stage.does(stage.engine.todo[0])


def test_after_a_while_more_slots_are_tried_again_and_after_another_failure_later(rivals: Stage) -> None:
    for retried_after_s in (60, 120, 240):
        rivals.passes(retried_after_s - 1)
        makes_the_pool_anew(rivals)
        assert slots(rivals) == 1, "it is too soon"
        rivals.settle()
        rivals.passes(1)
        makes_the_pool_anew(rivals)
        assert slots(rivals) == 2
        rivals.open_failed("a", NO_MEMORY)
        rivals.settle()
        assert slots(rivals) == 1


def test_once_they_were_had_nothing_is_left_of_the_failures(rivals: Stage) -> None:
    rivals.passes(60)
    for _ in range(2):
        makes_the_pool_anew(rivals)
        assert slots(rivals) == 2
        rivals.settle()

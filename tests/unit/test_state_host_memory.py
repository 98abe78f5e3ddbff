"""Host memory as stories: a saved KV has its place booked before it is saved; what is coldest leaves, to disk or for good.

A token's KV is 2 bytes here, so a conversation of 10 tokens is 20 bytes. Before a disk was measured, a file is worth it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conductor.core import actions
from conductor.errors import DecodeFailed, TurnTimedOut
from conductor.types import AgentId, KvPlace
from tests.support.stories import Stage, model

A, B, C, D = (AgentId(name) for name in "abcd")
PLANS = {name: model(f"model of {name}", weights=10) for name in "abcdef"}


def crew(given: Callable[..., Stage], *, host: int, disk: int = 0, agents: str = "abcd") -> Stage:
    """Agents on a model each, with one live context between them."""
    stage = given(cap=1000, live_contexts=1, host_bytes=host, disk_bytes=disk)
    for agent in agents:
        stage.has(agent, PLANS[agent], context=100)
    return stage


def places(stage: Stage) -> dict[str, KvPlace]:
    return {agent.id: agent.place for agent in stage.state.agents.values()}


def booked(stage: Stage) -> tuple[int, int]:
    """Bytes in host memory and on disk."""
    return stage.state.kv_books.host.allocated_bytes, stage.state.kv_books.disk.allocated_bytes


# --- to disk ----------------------------------------------------------------------------------------------------------


def test_the_place_is_booked_before_the_context_closes(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=100)
    stage.converses("a", tokens=10)
    stage.asks("b")
    assert stage.engine.todo == [actions.LeaveSeat(A, KvPlace.HOST)]
    assert booked(stage) == (20, 0)
    stage.settle()


def test_when_host_memory_is_full_those_away_longest_go_to_disk(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=40, disk=100)
    for agent in "abcd":
        stage.converses(agent, tokens=10)
    assert places(stage) == {"a": KvPlace.DISK, "b": KvPlace.HOST, "c": KvPlace.HOST, "d": KvPlace.SLOT}
    assert booked(stage) == (40, 20)


def test_a_context_is_not_closed_before_there_is_room_for_its_kv(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=40, disk=100)
    for agent in "abc":
        stage.converses(agent, tokens=10)
    turn = stage.asks("d")
    assert stage.engine.todo == [actions.MoveKv(A)]
    assert booked(stage) == (40, 20), "the file is booked, and so are the bytes until it is written"
    stage.moved("a")
    assert booked(stage) == (40, 20)
    assert stage.engine.todo == [actions.LeaveSeat(C, KvPlace.HOST)]
    stage.settle()
    assert turn.evidence == ("c", False, 20), "a's move is not this turn's"


def test_as_many_leave_as_it_takes_and_no_more(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=60, disk=100, agents="abcde")
    for agent, tokens in (("a", 10), ("b", 10), ("c", 10), ("d", 15)):
        stage.converses(agent, tokens=tokens)
    stage.asks("e")
    assert stage.engine.todo == [actions.MoveKv(A), actions.MoveKv(B)]
    stage.moved("b")
    stage.moved("a")
    stage.settle()
    assert booked(stage) == (50, 40)


def test_two_that_close_at_once_have_one_leave_for_each(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2, host_bytes=40, disk_bytes=100)
    for agent in "abcdef":
        stage.has(agent, PLANS[agent], context=100)
    for agent in "abcd":
        stage.converses(agent, tokens=10)
    assert booked(stage) == (40, 0)
    stage.asks("e")
    assert stage.engine.todo == [actions.MoveKv(A)]
    stage.asks("f")
    assert stage.engine.todo == [actions.MoveKv(A), actions.MoveKv(B)]
    stage.moved("b")
    assert stage.engine.todo[1:] == [actions.LeaveSeat(C, KvPlace.HOST)]
    stage.settle()
    assert booked(stage) == (40, 40)


def test_it_comes_back_from_disk_as_from_host_memory(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    for agent in "abc":
        stage.converses(agent, tokens=10)
    assert places(stage)["a"] is KvPlace.DISK
    assert stage.converses("a", tokens=12).evidence == ("c", True, 20 + 20)
    assert booked(stage)[1] <= 20, "its file is gone"


def test_what_is_larger_than_all_of_host_memory_goes_to_disk_at_once_and_moves_nobody(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=40, disk=100)
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=21)
    stage.asks("c")
    assert stage.engine.todo == [actions.LeaveSeat(B, KvPlace.DISK)]
    assert booked(stage) == (20, 42)
    stage.settle()


# --- for good ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disk", [0, 19])
def test_without_room_on_disk_it_is_dropped_at_once_and_computed_again(given: Callable[..., Stage], disk: int) -> None:
    stage = crew(given, host=40, disk=disk)
    for agent in "abc":
        stage.converses(agent, tokens=10)
    stage.asks("d")
    assert stage.engine.todo == [actions.LeaveSeat(C, KvPlace.HOST)], "nothing to wait for"
    assert places(stage)["a"] is KvPlace.TOKENS
    stage.settle()
    assert stage.state.agents[A].tokens == 10, "the conversation is kept"
    assert not stage.converses("a", tokens=12).evidence[1]


def test_when_the_disk_is_full_the_next_one_is_dropped(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=20)
    for agent in "abcd":
        stage.converses(agent, tokens=10)
    assert places(stage) == {"a": KvPlace.DISK, "b": KvPlace.TOKENS, "c": KvPlace.HOST, "d": KvPlace.SLOT}


def test_of_two_that_have_to_leave_the_disk_takes_as_many_as_it_has_room_for(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=40, disk=20)
    for agent, tokens in (("a", 10), ("b", 10), ("c", 20), ("d", 1)):
        stage.converses(agent, tokens=tokens)
    assert places(stage) == {"a": KvPlace.DISK, "b": KvPlace.TOKENS, "c": KvPlace.HOST, "d": KvPlace.SLOT}


def test_a_disk_that_was_slow_once_is_tried_again_after_a_while(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=1000)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    stage.asks("c")
    stage.moved("a", takes_s=600.0)
    stage.settle()
    seen = set[KvPlace]()
    for agent in 50 * "bcd":
        stage.converses(agent, tokens=10)
        seen |= {place for agent, place in places(stage).items() if agent in "bcd"}
        if KvPlace.DISK in seen:
            break
    assert seen == {KvPlace.TOKENS, KvPlace.HOST, KvPlace.SLOT, KvPlace.DISK}, "dropped for a while, then moved again"


def test_what_is_larger_than_both_is_dropped_and_moves_nobody(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=40, disk=41)
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=21)
    stage.asks("c")
    assert stage.engine.todo == [actions.LeaveSeat(B, KvPlace.TOKENS)]
    assert booked(stage) == (20, 0)
    stage.settle()


def test_after_a_slow_disk_was_measured_computing_again_is_cheaper(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=1000)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    stage.asks("c")
    stage.moved("a", takes_s=60.0)
    stage.settle()
    stage.converses("d", tokens=10)
    assert places(stage) == {"a": KvPlace.DISK, "b": KvPlace.TOKENS, "c": KvPlace.HOST, "d": KvPlace.SLOT}


def test_so_it_is_for_a_model_that_reads_prompts_fast(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=1000)
    turn = stage.asks("a")
    stage.opened("a")
    stage.finished(turn, tokens=10, prefill_s_per_token=1e-12)
    stage.converses("b", tokens=10)
    stage.converses("c", tokens=10)
    assert places(stage)["a"] is KvPlace.TOKENS
    stage.converses("d", tokens=10)
    assert places(stage)["b"] is KvPlace.DISK, "its model was not measured"


def test_a_move_that_fails_costs_time_and_nothing_else(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    stage.asks("c")
    stage.moved("a", fails=True)
    stage.settle()
    assert places(stage)["a"] is KvPlace.TOKENS
    assert booked(stage) == (20, 0)
    assert not stage.converses("a", tokens=12).evidence[1]


def test_a_close_that_could_not_save_gives_its_place_back(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=100)
    stage.converses("a", tokens=10)
    turn = stage.asks("b")
    stage.closed("a", save_fails=True)
    assert booked(stage) == (0, 0)
    assert places(stage)["a"] is KvPlace.TOKENS
    stage.settle()
    assert turn.endings


# --- whose turn is next -----------------------------------------------------------------------------------------------


def test_whoever_has_a_turn_waiting_keeps_its_kv_and_the_one_that_leaves_goes_elsewhere(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=10)
    turn = stage.asks("a")
    assert stage.engine.todo == [actions.LeaveSeat(B, KvPlace.DISK)], "not a's KV for b's, only to want it back"
    stage.settle()
    assert turn.evidence[1]


def test_a_turn_whose_kv_is_being_moved_waits_for_it(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    stage.asks("c")
    turn, impatient = stage.asks("a"), stage.asks("a")
    assert stage.engine.todo == [actions.MoveKv(A)]
    stage.runs_out_of_time(turn)
    assert turn.failed_with(TurnTimedOut).reason == "its KV is on its way"
    stage.settle()
    assert impatient.evidence[1]


def test_it_waits_for_it_even_with_a_place_free(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2, host_bytes=20, disk_bytes=100)
    for agent, plan in (("a", "a"), ("a2", "a"), ("b", "b"), ("b2", "b")):
        stage.has(agent, PLANS[plan], context=100)
    for agent, tokens in (("a", 10), ("a2", 0), ("b", 10)):
        stage.converses(agent, tokens=tokens)
    stage.unregisters("a2")
    stage.settle()
    rival, turn = stage.asks("b2"), stage.asks("a")
    assert stage.engine.todo == [actions.MoveKv(A)], "for b's, who makes way for b2"
    stage.moved("a")
    stage.settle()
    assert turn.evidence[1]
    assert rival.endings


def test_whoever_comes_back_leaves_its_place_to_the_one_that_goes(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2, host_bytes=20, disk_bytes=0)
    for agent in "abc":
        stage.has(agent, PLANS[agent], context=100)
    stage.converses("a", tokens=10)
    stage.has("a2", PLANS["a"], context=100)
    stage.converses("a2", tokens=0)
    assert places(stage)["a"] is KvPlace.HOST
    stage.unregisters("a2")
    stage.settle()
    stage.converses("b", tokens=10)
    back, leads_to_close = stage.asks("a"), stage.asks("c")
    assert [type(work) for work in stage.engine.todo] == [actions.TakeSeat], "b waits for the place that a gives up"
    stage.opened("a")
    assert actions.LeaveSeat(B, KvPlace.HOST) in stage.engine.todo
    stage.settle()
    assert back.evidence[1]
    assert leads_to_close.evidence[0] == "b"


def test_nobody_else_leaves_for_the_place_that_somebody_gives_up(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2, host_bytes=40, disk_bytes=100)
    for agent in "abcde":
        stage.has(agent, PLANS[agent], context=100)
    for agent in "abcd":
        stage.converses(agent, tokens=10)
    stage.unregisters("c")
    stage.settle()
    back = stage.asks("a")
    stage.pool_opened(stage.pool_of("a"))
    other = stage.asks("e")
    assert [type(work) for work in stage.engine.todo] == [actions.TakeSeat], "d waits for a's place, and b stays"
    stage.settle()
    assert back.evidence[1]
    assert other.evidence[0] == "d"
    assert places(stage)["b"] is KvPlace.HOST


def test_if_it_does_not_come_back_after_all_the_other_goes_elsewhere(given: Callable[..., Stage]) -> None:
    stage = given(cap=1000, live_contexts=2, host_bytes=20, disk_bytes=0)
    for agent in "abc":
        stage.has(agent, PLANS[agent], context=100)
    stage.has("a2", PLANS["a"], context=100)
    stage.converses("a", tokens=10)
    stage.converses("a2", tokens=0)
    stage.unregisters("a2")
    stage.settle()
    stage.converses("b", tokens=10)
    back, other = stage.asks("a"), stage.asks("c")
    stage.open_failed("a", DecodeFailed(A, "no memory"))
    back.failed_with(DecodeFailed)
    stage.settle()
    assert other.endings


# --- leaving ----------------------------------------------------------------------------------------------------------


def test_an_agent_that_leaves_while_its_kv_moves_is_gone_when_the_move_is_over(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    stage.asks("c")
    leaving = stage.unregisters("a")
    assert leaving.waits
    stage.moved("a")
    assert booked(stage) == (20, 0), "b's; a's file is booked no more"
    stage.settle()
    assert leaving.is_done


def test_an_agent_that_leaves_while_its_context_waits_for_room_takes_its_kv_along(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=100)
    for agent in "ab":
        stage.converses(agent, tokens=10)
    turn = stage.asks("c")
    leaving = stage.unregisters("b")
    assert stage.engine.todo == [actions.MoveKv(A), actions.LeaveSeat(B, KvPlace.TOKENS)]
    stage.settle()
    assert leaving.is_done
    assert turn.endings


def test_an_agent_that_leaves_gives_its_place_to_whoever_waits_for_it(given: Callable[..., Stage]) -> None:
    stage = crew(given, host=20, disk=0)
    stage.converses("a", tokens=10)
    stage.converses("b", tokens=10)
    stage.unregisters("a")
    stage.settle()
    assert booked(stage) == (0, 0)
    stage.converses("c", tokens=10)
    assert places(stage)["b"] is KvPlace.HOST

"""Turns that are paused, held, stopped or ended from outside, in company."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from conductor.backend.turn import Outgrown, Paused, TurnOutcome
from conductor.errors import TurnCancelled
from conductor.types import Chunk, FinishReason, KvPlace, PoolId
from tests.support.company import alone, prompt, same
from tests.support.growing import WITHIN_S, Stage, Talker

pytestmark = pytest.mark.usefixtures("samplers_are_closed")


def test_a_turn_paused_in_its_prompt_goes_on_with_the_rest_of_it(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    text = prompt(3) * 2
    [expected] = alone(stage, {"agent": text}, max_tokens=20).values()
    agent = stage.sits("agent", pool)
    request = agent.request(text, max_tokens=20)
    agent.in_step(2, agent.pauses)
    paused = agent.step(request)
    assert paused == Paused(64, has_made=False)
    assert agent.engine.suspended_text(agent.id) == ""
    agent.closes()
    agent.opens()
    outcome = agent.finishes(request)
    assert same(stage, agent, outcome.tokens, expected)
    assert outcome.recomputed_tokens == 0
    assert outcome.prompt_tokens == agent.tokens - 20


def test_what_a_paused_turn_had_read_and_lost_is_recomputed(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    agent = stage.sits("agent", pool)
    request = agent.request(prompt(3) * 2, max_tokens=20)
    agent.in_step(2, agent.pauses)
    assert agent.step(request) == Paused(64, has_made=False)
    agent.closes(KvPlace.TOKENS)
    agent.opens()
    outcome = agent.finishes(request)
    assert (outcome.recomputed_tokens, outcome.prompt_tokens) == (64, agent.tokens - 20)


def test_a_paused_turn_that_is_dropped_leaves_no_trace(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    agent, witness = stage.sits("agent", pool), stage.sits("witness", pool)
    for talker in (agent, witness):
        talker.says("hello agent ", max_tokens=10)
    agent.in_step(2, agent.pauses)
    assert isinstance(agent.step(agent.request(prompt(3), max_tokens=20)), Paused)
    assert agent.engine.drop_turn(agent.id) == witness.tokens
    assert agent.says("and ", max_tokens=20).tokens == witness.says("and ", max_tokens=20).tokens


def test_a_turn_that_stands_still_can_be_ended_with_what_it_made(polly: Callable[..., Talker]) -> None:
    agent, chunks = polly(window=64, room=64), list[Chunk]()
    agent.in_step(5, agent.pauses)
    assert isinstance(agent.step(agent.request("x", max_tokens=30), emit=chunks.append), Paused)
    ended = agent.engine.end_turn(agent.id, FinishReason.TIMEOUT)
    assert ended is not None
    assert (ended.text, ended.finish_reason) == ("abcde", FinishReason.TIMEOUT)
    assert "".join(chunk.text for chunk in chunks) == "abcde"
    assert agent.engine.end_turn(agent.id, FinishReason.TIMEOUT) is None
    assert agent.says(max_tokens=3).text == "fgh"


def test_a_turn_that_had_made_nothing_ends_as_if_it_had_not_been(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    agent = stage.sits("agent", pool)
    agent.in_step(1, agent.pauses)
    assert isinstance(agent.step(agent.request(prompt(3), max_tokens=20)), Paused)
    assert agent.engine.end_turn(agent.id, FinishReason.CANCELLED) is None
    assert agent.tokens == 0


def test_a_running_turn_is_stopped_with_the_reason_that_was_given_first(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=64)
    agent.in_step(4, lambda: [agent.stops(FinishReason.TIMEOUT), agent.stops(FinishReason.CANCELLED)])
    ended = agent.step(agent.request("x", max_tokens=30))
    assert isinstance(ended, TurnOutcome)
    assert (ended.text, ended.finish_reason) == ("abcd", FinishReason.TIMEOUT)


def test_a_stop_is_not_forgotten_while_a_turn_grows(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 6, max_tokens=30)
    agent.step(request)
    agent.grows(32)
    ended = agent.begins_and(agent.stops, request).result(WITHIN_S)
    assert isinstance(ended, TurnOutcome)
    assert (ended.text, ended.finish_reason) == ("abcdefghij", FinishReason.CANCELLED)


def test_a_held_turn_takes_part_in_no_step_and_hears_all_the_same(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    held, other = stage.sits("held", pool), stage.sits("other", pool)
    turn = held.begins_and(lambda: stage.engine.hold_turn(held.id, True), held.request("hello ", max_tokens=30))
    other.says("hello ", max_tokens=50)
    assert not turn.done()
    assert stage.engine.progress() == {held.id: 0}
    stage.engine.hold_turn(held.id, False)
    released = turn.result(WITHIN_S)
    assert isinstance(released, TurnOutcome)
    assert len(released.tokens) == 30
    again = held.begins_and(lambda: stage.engine.hold_turn(held.id, True), held.request("hello ", max_tokens=30))
    held.stops()
    with pytest.raises(TurnCancelled):
        again.result(WITHIN_S)


def test_time_held_is_no_stall(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=64)

    def hold() -> None:
        agent.engine.hold_turn(agent.id, True)
        threading.Timer(0.2, agent.engine.hold_turn, (agent.id, False)).start()

    agent.in_step(4, hold)
    ended = agent.step(agent.request("x", max_tokens=30))
    assert isinstance(ended, TurnOutcome)
    assert 0 < ended.longest_stall_s < 0.15


def test_a_turn_outgrows_its_slot_while_others_go_on(together: Callable[..., tuple[Stage, PoolId]]) -> None:
    stage, pool = together()
    small, other = stage.sits("small", pool), stage.sits("other", pool)
    small.room = 64
    turns = [agent.begins(agent.request("hello ", max_tokens=200)) for agent in (small, other)]
    outgrown, whole = (turn.result(WITHIN_S) for turn in turns)
    assert isinstance(outgrown, Outgrown)
    assert isinstance(whole, TurnOutcome)
    stage.engine.drop_turn(small.id)

"""Turns that stand still for want of room and go on no more, or fail: the session is what it was, or keeps what was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conductor.backend.turn import Outgrown, TurnOutcome
from conductor.errors import InvalidRequest, TurnCancelled
from conductor.types import Chunk, KvPlace
from tests.support.growing import WITHIN_S, Stage, Talker

pytestmark = pytest.mark.usefixtures("samplers_are_closed")


def cost(outcome: TurnOutcome) -> tuple[int, int, int]:
    return outcome.prompt_tokens, outcome.prompt_tokens_reused, outcome.recomputed_tokens


def in_its_prompt(agent: Talker) -> None:
    agent.outgrows("and the world " * 30, max_tokens=8)


def in_its_answer(agent: Talker) -> None:
    agent.outgrows("world ", max_tokens=300)


def after_growing_once(agent: Talker) -> None:
    request = agent.request("world ", max_tokens=300)
    outgrown = agent.step(request)
    assert isinstance(outgrown, Outgrown)
    agent.grows(outgrown.required_tokens)
    assert isinstance(agent.step(request), Outgrown)


def in_an_answer_to_another_conversation(agent: Talker) -> None:
    agent.outgrows("world, hello ", max_tokens=300, reset=True)


WHERE = [in_its_prompt, in_its_answer, after_growing_once, in_an_answer_to_another_conversation]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "mamba"])
def test_a_dropped_turn_leaves_no_trace(
    tiny: Callable[..., Stage], architecture: str, where: Callable[[Talker], None], moved: bool
) -> None:
    """Where the architecture cannot cut its cache the session is recomputed, so the witness is one that is recomputed too."""
    stage = tiny(architecture)
    agent, witness = (stage.talker(name, window=1024, room=128) for name in ("agent", "witness"))
    opening = [talker.says("hello agent ", max_tokens=40).tokens for talker in (agent, witness)]
    assert opening[0] == opening[1]
    before = agent.tokens
    where(agent)
    assert agent.engine.drop_turn(agent.id) == agent.tokens == before
    if moved:
        agent.closes()
        agent.opens()
    answer = agent.says("the model ", max_tokens=40)
    if answer.recomputed_tokens:
        witness.closes(KvPlace.TOKENS)
        witness.opens()
    assert answer.tokens == witness.says("the model ", max_tokens=40).tokens
    may_lose_its_cache = architecture in ("gemma3", "mamba") or where is in_an_answer_to_another_conversation
    assert may_lose_its_cache or not answer.recomputed_tokens


def test_a_turn_dropped_inside_a_character_leaves_the_one_before_unfinished(polly: Callable[..., Talker]) -> None:
    agent = polly("é🙂→!", window=256, room=16)
    assert agent.says("x", max_tokens=4).text == "é"
    agent.outgrows(max_tokens=100)
    agent.engine.drop_turn(agent.id)
    assert agent.says(max_tokens=5).text == "🙂→"


def test_dropping_a_turn_that_is_not_there_changes_nothing(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=32)
    assert agent.engine.drop_turn(agent.id) == 0
    agent.says("x", max_tokens=5)
    assert agent.engine.drop_turn(agent.id) == agent.tokens == 6


def test_an_agent_may_leave_while_its_turn_stands_still(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    agent.outgrows("x", max_tokens=30)
    agent.leaves()
    assert agent.tokens == 0
    assert agent.engine.suspended_text(agent.id) == ""


def test_another_turn_takes_back_the_one_that_stands_still(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    agent.says("x", max_tokens=3)
    agent.outgrows(max_tokens=30)
    assert agent.tokens == 16
    assert agent.says(max_tokens=3).text == "def"


def test_an_error_ends_a_turn_that_had_grown_and_keeps_what_was_made(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 6, max_tokens=50)
    agent.step(request)
    agent.grows(17)

    def broken(chunk: Chunk) -> None:
        raise OSError("nobody listens")

    with pytest.raises(OSError, match="nobody listens"):
        agent.step(request, emit=broken)
    assert agent.says(max_tokens=10).text == "bcdefghija"


def test_an_error_in_an_answer_leaves_no_character_behind_that_it_had_finished(polly: Callable[..., Talker]) -> None:
    agent = polly("é🙂→!", window=64, room=64)
    assert agent.says("x", max_tokens=4).text == "é"

    def broken(chunk: Chunk) -> None:
        raise OSError(f"nobody listens to {chunk.text}")

    with pytest.raises(OSError, match="🙂"):
        agent.says(max_tokens=9, emit=broken)
    assert agent.says(max_tokens=3).text == "→"


def test_errors_before_the_first_token_leave_nothing_standing(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    with pytest.raises(InvalidRequest):
        agent.step(agent.request())
    request = agent.request("x" * 20)
    agent.step(request)
    agent.grows(21)
    with pytest.raises(TurnCancelled):
        agent.begins_and(agent.stops, request).result(WITHIN_S)
    assert agent.tokens == 0
    assert not agent.engine._turns.standing


MOMENTS = ["before it is saved", "while it is saved", "in host memory", "on disk", "while it is restored"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mamba"])
def test_a_turn_may_be_dropped_wherever_its_kv_is(
    tiny: Callable[..., Stage], architecture: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KV then holds more than is the session's; what is too much is cut off, or all of it computed anew."""
    stage = tiny(architecture)
    agent, witness = stage.talker("agent", window=512, room=128), stage.talker("witness", window=512, room=128)
    for talker in (agent, witness):
        talker.says("hello agent ", max_tokens=40)
    agent.outgrows("world ", max_tokens=300)

    def drop(now: str) -> None:
        if now == moment:
            assert agent.engine.drop_turn(agent.id) == witness.tokens

    def dropping(method: str, now: str) -> None:
        """As an event loop might, while a worker is in the store."""
        store = agent.engine._saved._store
        inner = getattr(store, method)

        def outer(*arguments: Any, **options: Any) -> Any:
            drop(now)
            return inner(*arguments, **options)

        monkeypatch.setattr(store, method, outer)

    dropping("begin", "while it is saved")
    dropping("read", "while it is restored")
    drop("before it is saved")
    agent.closes()
    drop("in host memory")
    if moment == "on disk":
        agent.engine.move_kv(agent.id)
        drop("on disk")
    agent.opens()
    assert agent.tokens == witness.tokens
    answer = agent.says("the model ", max_tokens=40)
    if answer.recomputed_tokens:
        witness.closes(KvPlace.TOKENS)
        witness.opens()
    assert answer.tokens == witness.says("the model ", max_tokens=40).tokens
    assert stage.memory.damaged == 0

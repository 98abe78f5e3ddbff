"""Windows that grow: a turn that outgrows its context goes on in a larger one, and nobody can tell from its tokens.

At the engine's level, where a test can be the policy: when a context grows, how far, and what happens in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from conductor.backend.turn import Outgrown, TurnOutcome
from conductor.errors import WindowFull
from conductor.types import Chunk, DecodeRequest, FinishReason, KvPlace, Message
from tests.support.growing import WITHIN_S, Stage, Talker
from tests.support.talk import SHIPPED

pytestmark = pytest.mark.usefixtures("samplers_are_closed")

SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "seeded": {"temperature": 1.0, "seed": 3}}


def cost(outcome: TurnOutcome) -> tuple[int, int, int]:
    return outcome.prompt_tokens, outcome.prompt_tokens_reused, outcome.recomputed_tokens


def asked(outgrown: Outgrown) -> tuple[int, int]:
    return outgrown.required_tokens, outgrown.desired_tokens


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_conversation_that_grows_says_what_it_says_in_its_full_window(
    on_stage: Callable[..., Stage], name: str, sampling: str
) -> None:
    stage = on_stage(SHIPPED[name])
    grows, full = stage.talker("grows", window=1024, room=128), stage.talker("full", window=1024)
    for turn in range(5):
        prompt = f'\n\ndef task_{turn}(x):\n    """Return x + {turn}."""\n' * 4
        first, second = (agent.says(prompt, max_tokens=64, **SAMPLING[sampling]) for agent in (grows, full))
        assert first.tokens == second.tokens
        assert first.text == second.text
        assert cost(first) == cost(second)
    assert (grows.room, grows.growths) == (1024, 3)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(
    ("architecture", "n_batch"),
    [("llama", 512), ("llama", 16), ("qwen2", 512), ("qwen2", 16), ("mamba", 512), ("mamba", 16), ("gemma3", 512)],
)
def test_every_architecture_grows_without_a_trace(
    tiny: Callable[..., Stage], architecture: str, n_batch: int, sampling: str
) -> None:
    """mamba has a state that cannot be cut, gemma3 outgrows its sliding window, though not the cache for it: see below."""
    stage = tiny(architecture)
    grows = stage.talker("grows", window=1024, room=64, n_batch=n_batch, n_ubatch=n_batch)
    full = stage.talker("full", window=1024, n_batch=n_batch, n_ubatch=n_batch)
    for turn in range(7):
        prompt = f"say hello to the world {turn}"
        first, second = (agent.says(prompt, max_tokens=80, **SAMPLING[sampling]) for agent in (grows, full))
        assert first.tokens == second.tokens
        assert cost(first) == cost(second)
    assert grows.growths >= 2


def test_a_sliding_cache_that_has_begun_anew_goes_on_within_its_rounding(tiny: Callable[..., Stage]) -> None:
    """llama.cpp writes a sliding cache in a circle, here of 256 cells, and restores it into other cells.

    From then on sums round in another order, as they do after any swap (see test_swap_is_invisible). Before that all is exact.
    """
    stage, differ = tiny("gemma3"), 0
    for n in range(3):
        grows = stage.talker(f"grows-{n}", window=1024, room=64, n_batch=16, n_ubatch=16)
        full = stage.talker(f"full-{n}", window=1024, n_batch=16, n_ubatch=16)
        same = True
        for turn in range(7):
            first, second = (agent.says(f"agent {n}, say hello {turn}", max_tokens=80) for agent in (grows, full))
            same = same and first.tokens == second.tokens
            assert same or full.tokens > 256
        assert grows.growths == 4
        differ += not same
    assert differ <= 1


def test_an_answer_may_outgrow_several_contexts(polly: Callable[..., Talker]) -> None:
    agent = polly(window=512, room=16)
    answer = agent.says("x" * 5, max_tokens=300)
    assert (answer.text, answer.finish_reason) == ("abcdefghij" * 30, FinishReason.LENGTH)
    assert cost(answer) == (5, 0, 0)
    assert (agent.room, agent.growths, agent.tokens) == (512, 5, 305)


def test_a_prompt_that_does_not_fit_is_known_before_any_of_it_is_decoded(polly: Callable[..., Talker]) -> None:
    agent = polly(window=256, room=32)
    agent.says("x", max_tokens=10)
    outgrown = agent.outgrows("y" * 50, max_tokens=20)
    assert asked(outgrown) == (11 + 50 + 1, 11 + 50 + 20)
    assert (outgrown.computed_tokens, outgrown.has_made) == (0, False)
    assert (agent.tokens, agent.cached) == (11, 10)
    agent.grows(64)
    answer = agent.finishes(agent.request("y" * 50, max_tokens=20))
    assert answer.text == "abcdefghij" * 2
    assert cost(answer) == (51, 10, 0)


def test_room_is_needed_for_the_prompt_and_one_token_more(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=20)
    assert asked(agent.outgrows("x" * 20, max_tokens=1)) == (21, 21)
    assert agent.says("x" * 19, max_tokens=1).text == "a"
    assert agent.growths == 0


def test_a_turn_never_wants_more_than_its_window(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=32)
    assert asked(agent.outgrows("x" * 40, max_tokens=2**31 - 1)) == (41, 64)
    with pytest.raises(WindowFull):  # of the window that was admitted, however small the room
        agent.step(agent.request("x" * 64))


def test_a_turn_goes_on_in_any_room_and_asks_again_where_that_is_too_small(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 5, max_tokens=30)
    first, second = agent.step(request), agent.step(request)
    assert first == second == Outgrown(17, 35, computed_tokens=15, has_made=True)
    agent.grows(20)
    assert agent.finishes(request).text == "abcdefghij" * 3


@pytest.mark.parametrize("shift", [False, True])
def test_the_windows_end_is_where_it_was_admitted(polly: Callable[..., Talker], shift: bool) -> None:
    agent = polly(window=50, room=16)
    answer = agent.says("x" * 5, max_tokens=100, context_shift=shift)
    expected = ("abcdefghij" * 10, FinishReason.LENGTH) if shift else (("abcdefghij" * 5)[:45], FinishReason.WINDOW)
    assert (answer.text, answer.finish_reason) == expected
    assert agent.room == 50


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_prompt_that_shifts_the_context_is_shifted_where_it_has_grown(tiny: Callable[..., Stage], architecture: str) -> None:
    stage = tiny(architecture)
    grows, full = stage.talker("grows", window=200, room=100), stage.talker("full", window=200)
    for agent in (grows, full):
        agent.says("hello agent " * 12, max_tokens=12)
    long = grows.request("and the world " * 14, max_tokens=12, context_shift=True)
    before = grows.tokens, grows.cached
    outgrown = grows.step(long)
    assert isinstance(outgrown, Outgrown)
    assert (grows.tokens, grows.cached) == before
    grows.grows(outgrown.required_tokens)
    first, second = grows.finishes(long), full.finishes(long)
    assert (first.tokens, cost(first), grows.tokens) == (second.tokens, cost(second), full.tokens)


def test_messages_grow_as_prompts_do(tiny: Callable[..., Stage]) -> None:
    stage = tiny()
    agents = stage.talker("grows", window=1024, room=64), stage.talker("full", window=1024)
    chat: list[Message] = []
    for turn in range(4):
        chat.append(Message("user", f"hello {turn}"))
        first, second = (agent.finishes(DecodeRequest(messages=tuple(chat), max_tokens=60)) for agent in agents)
        assert (first.tokens, cost(first)) == (second.tokens, cost(second))
        chat.append(Message("assistant", first.text))
    assert agents[0].growths >= 2


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", range(8, 20))
def test_no_character_is_cut_where_the_room_ends(polly: Callable[..., Talker], room: int) -> None:
    """Every token is one byte, so each room ends somewhere else in one of the characters."""
    agent, chunks = polly("é🙂→!", window=256, room=room), list[Chunk]()
    answer = agent.says("x", max_tokens=60, emit=chunks.append)
    assert answer.text == "é🙂→!" * 6
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert sum(chunk.tokens for chunk in chunks) == 60
    assert agent.growths >= 2


@pytest.mark.parametrize("stop", ["hij", "jabc", "ja"])
@pytest.mark.parametrize("room", range(8, 13))
def test_a_stop_string_is_found_across_the_end_of_a_room(polly: Callable[..., Talker], stop: str, room: int) -> None:
    agent, chunks = polly(window=64, room=room), list[Chunk]()
    answer = agent.says("x", max_tokens=40, stop=(stop,), emit=chunks.append)
    assert (answer.text, answer.finish_reason) == (("abcdefghij" * 2)[: ("abcdefghij" * 2).index(stop)], FinishReason.STOP)
    assert "".join(chunk.text for chunk in chunks) == answer.text


def test_what_was_made_is_shown_before_the_turn_stands_still(polly: Callable[..., Talker]) -> None:
    agent, chunks = polly(window=64, room=16), list[Chunk]()
    request = agent.request("x" * 6, max_tokens=20)
    agent.step(request, emit=chunks.append, chunk_interval_s=3600)
    assert "".join(chunk.text for chunk in chunks) == agent.engine.suspended_text(agent.id) == "abcdefghij"
    assert agent.finishes(request, emit=chunks.append).text == "abcdefghij" * 2
    assert "".join(chunk.text for chunk in chunks) == "abcdefghij" * 2
    assert agent.engine.suspended_text(agent.id) == ""


def test_a_first_token_is_first_once(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 6, max_tokens=20)
    agent.step(request)
    before = time.monotonic()
    assert agent.finishes(request).first_token_at < before


# --- KV that was lost on the way ---------------------------------------------------------------------------------------


def test_a_growth_that_cannot_keep_the_kv_decodes_again_and_says_so(polly: Callable[..., Talker]) -> None:
    agent = polly(window=256, room=32)
    agent.says("x" * 9, max_tokens=11)
    answer = agent.says("y" * 5, max_tokens=50, to=KvPlace.TOKENS)
    assert answer.text == "abcdefghij" * 5
    assert agent.growths == 2
    assert cost(answer) == (6, 19, 31 + 63)
    assert answer.prefill_s_per_token is not None
    lost_in_its_prompt = agent.says("y" * 60, max_tokens=1, to=KvPlace.TOKENS)
    assert cost(lost_in_its_prompt) == (135, 0, 74)


def test_lost_kv_of_a_real_model_is_recomputed_in_the_middle_of_its_answer(on_stage: Callable[..., Stage]) -> None:
    stage = on_stage(SHIPPED["coder"])
    grows, full = stage.talker("grows", window=1024, room=64), stage.talker("full", window=1024)
    first, second = grows.says("import os\n", max_tokens=200, to=KvPlace.TOKENS), full.says("import os\n", max_tokens=200)
    assert first.recomputed_tokens > 100
    assert len(first.tokens) == len(second.tokens)
    # Recomputing decodes in another grouping and may round differently; what was said before the first growth stands.
    assert first.tokens[:50] == second.tokens[:50]


def test_a_stop_is_heard_while_lost_kv_is_decoded_again(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 6, max_tokens=30)
    agent.step(request)
    agent.grows(17, to=KvPlace.TOKENS)
    answer = agent.begins_and(agent.stops, request).result(WITHIN_S)
    assert isinstance(answer, TurnOutcome)
    assert (answer.text, answer.finish_reason, answer.recomputed_tokens) == ("abcdefghij", FinishReason.CANCELLED, 0)
    assert agent.says(max_tokens=3).text == "abc"


# --- what the shell is told ----------------------------------------------------------------------------------------------


def test_the_time_to_read_a_prompt_is_told_when_there_was_enough_of_it(polly: Callable[..., Talker]) -> None:
    agent = polly(window=256, room=256)
    assert agent.says("x" * 31, max_tokens=1).prefill_s_per_token is None
    measured = agent.says("x" * 40, max_tokens=1).prefill_s_per_token
    assert measured is not None
    assert 0 < measured < 1


def test_the_bytes_of_the_kv_are_what_a_save_takes(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=64)
    assert agent.engine.state_bytes(agent.id) == 0
    agent.says("x", max_tokens=10)
    bytes = agent.engine.state_bytes(agent.id)
    assert agent.closes().saved_bytes == bytes > 0
    assert agent.engine.state_bytes(agent.id) == 0

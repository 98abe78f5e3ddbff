"""Where saved KV goes, by cost and by budget. See also: `test_state_host_memory.py`, for the moves themselves."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.core.kv_books import DISK_BYTES_PER_S, PREFILL_S_PER_TOKEN, worth_a_file
from conductor.types import AgentId, Kind, KvPlace
from tests.support.stories import Stage, model

A = AgentId("a")


def is_worth(bytes: int, tokens: int, *, prefill: float = 1e-3, disk: float = 1e6) -> bool:
    return worth_a_file(bytes, tokens, prefill_s_per_token=prefill, disk_bytes_per_s=disk)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_file_must_cost_less_than_half_its_prompt_it_is_written_and_read() -> None:
    assert is_worth(bytes=4_999, tokens=10), "2 x 4.999 ms of disk for 10 ms of prompt"
    assert not is_worth(bytes=5_000, tokens=10), "as long as computing it again: the disk is left in peace"


def test_a_faster_disk_or_a_slower_prompt_makes_more_worth_a_file() -> None:
    assert not is_worth(bytes=10_000, tokens=10)
    assert is_worth(bytes=10_000, tokens=10, disk=3e6)
    assert is_worth(bytes=10_000, tokens=10, prefill=3e-3)


def test_a_conversation_of_nothing_is_never_worth_one() -> None:
    assert not is_worth(bytes=0, tokens=0)
    assert not is_worth(bytes=1, tokens=0)


def test_before_anything_was_measured_an_8b_models_kv_is_worth_a_file_and_a_wide_one_is_not() -> None:
    def by_default(bytes_per_token: int) -> bool:
        return worth_a_file(
            bytes_per_token * 8192, 8192, prefill_s_per_token=PREFILL_S_PER_TOKEN, disk_bytes_per_s=DISK_BYTES_PER_S
        )

    assert by_default(16 << 10)
    assert not by_default(128 << 10), "8B in f16: 1 GiB for a prompt of 0.8 s, and a disk of 500 MB/s"


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20), st.floats(1e-9, 1.0), st.floats(1.0, 1e12), st.integers(1, 1 << 20))
def test_more_bytes_are_never_more_worth_and_more_tokens_never_less(
    bytes: int, tokens: int, prefill: float, disk: float, more: int
) -> None:
    worth = is_worth(bytes, tokens, prefill=prefill, disk=disk)
    assert is_worth(bytes + more, tokens, prefill=prefill, disk=disk) <= worth
    assert is_worth(bytes, tokens + more, prefill=prefill, disk=disk) >= worth


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_every_saved_byte_has_its_agent_as_holder() -> None:
    stage = Stage(cap=1000, host_bytes=1000)
    for agent in "ab":
        stage.has(agent, model(agent), context=50)
        stage.converses(agent, tokens=10)
    (saved,) = stage.state.kv_books.host.snapshot()
    assert (saved.holder, saved.kind, saved.bytes) == ("a", Kind.KV, 20)
    assert stage.state.agents[A].place is KvPlace.HOST


def random_conversations(chance: Random, *, host_bytes: int, disk_bytes: int) -> Iterator[Stage]:
    """Agents on two models talk in any order; the stage after each step of the engine."""
    stage = Stage(cap=1000, live_contexts=chance.choice([1, 2]), host_bytes=host_bytes, disk_bytes=disk_bytes)
    for agent, plan in zip("abcdef", [model("m"), model("n")] * 3, strict=True):
        stage.has(agent, plan, context=50)
    for _ in range(40):
        stage.asks(chance.choice("abcdef"))
        while stage.engine.todo and chance.random() < 0.8:
            stage.does(chance.choice(stage.engine.todo))
            yield stage
    stage.settle()
    yield stage
    stage.wind_up()


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 20, 50, 1000]), st.sampled_from([0, 20, 1000]))
def test_no_budget_is_ever_exceeded_and_with_room_for_all_nothing_is_ever_lost(
    chance: Random, host_bytes: int, disk_bytes: int
) -> None:
    for stage in random_conversations(chance, host_bytes=host_bytes, disk_bytes=disk_bytes):
        books = stage.state.kv_books
        assert books.host.allocated_bytes <= host_bytes
        assert books.disk.allocated_bytes <= disk_bytes
        if host_bytes == 1000:
            spoke = [agent for agent in stage.state.agents.values() if agent.tokens]
            assert all(agent.place in (KvPlace.SLOT, KvPlace.HOST) for agent in spoke)


@pytest.mark.parametrize(("host_bytes", "disk_bytes"), [(0, 0), (0, 1000)])
def test_without_host_memory_everybody_still_has_their_turns(host_bytes: int, disk_bytes: int) -> None:
    for stage in random_conversations(Random(1), host_bytes=host_bytes, disk_bytes=disk_bytes):
        places = {agent.place for agent in stage.state.agents.values() if agent.seat is None}
        assert places <= {KvPlace.TOKENS, KvPlace.DISK if disk_bytes else KvPlace.TOKENS}
    assert all(turn.endings for turn in stage.turns.values())

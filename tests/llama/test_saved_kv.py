"""Saved KV: wherever it was and whatever became of it, the session goes on as its tokens say. At the engine's level."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conductor.backend.turn import TurnOutcome
from conductor.errors import ConfigError
from conductor.types import KvPlace
from tests.support.growing import Stage, Talker, stage
from tests.support.talk import SHIPPED

pytestmark = pytest.mark.usefixtures("samplers_are_closed")

OnStage = Callable[..., Stage]
PROMPTS = ("import os\nimport sys\n\n", "def read(path):\n", "def write(path, text):\n")


@pytest.fixture
def coder(on_stage: OnStage) -> Stage:
    return on_stage(SHIPPED["coder"])


def blob_of(agent: Talker) -> Any:
    return agent.engine._saved._blobs[agent.id]


def away(agent: Talker, to: KvPlace = KvPlace.HOST) -> int:
    """Bytes saved."""
    closed = agent.closes(to)
    assert closed.place is to
    return closed.saved_bytes


def conversation(agent: Talker, between: Callable[[Talker], None] = lambda agent: None) -> list[TurnOutcome]:
    """Three turns, and what happens between them."""
    turns = []
    for prompt in PROMPTS:
        turns.append(agent.says(prompt, max_tokens=32, temperature=1.0, seed=7))
        between(agent)
    return turns


def said(turns: list[TurnOutcome]) -> list[tuple[int, ...]]:
    return [turn.tokens for turn in turns]


# --- from place to place ----------------------------------------------------------------------------------------------


def to_host(agent: Talker) -> None:
    bytes = away(agent)
    assert agent.opens().restored_bytes == bytes > 0


def to_disk(agent: Talker) -> None:
    bytes = away(agent, KvPlace.DISK)
    assert (agent.engine.host_memory().used_bytes, agent.engine.host_memory().disk_used_bytes) == (0, bytes)
    assert agent.opens().restored_bytes == bytes


def to_host_and_on_to_disk(agent: Talker) -> None:
    bytes = away(agent)
    assert agent.engine.move_kv(agent.id).place is KvPlace.DISK
    assert (agent.engine.host_memory().used_bytes, agent.engine.host_memory().disk_used_bytes) == (0, bytes)
    assert agent.opens().restored_bytes == bytes


@pytest.mark.parametrize("between", [to_host, to_disk, to_host_and_on_to_disk])
@pytest.mark.parametrize("name", SHIPPED)
def test_where_the_kv_was_meanwhile_is_invisible(on_stage: OnStage, name: str, between: Callable[[Talker], None]) -> None:
    stage = on_stage(SHIPPED[name])
    travels, stays = stage.talker("travels", window=512), stage.talker("stays", window=512)
    assert said(conversation(travels, between)) == said(conversation(stays))
    assert (stage.memory.used_bytes, stage.memory.disk_used_bytes, stage.memory.dropped, stage.memory.damaged) == (0, 0, 0, 0)
    assert stage.memory.moved_to_disk == 3 * (between is to_host_and_on_to_disk)


def test_a_turn_that_stands_still_may_wait_on_disk(coder: Stage) -> None:
    grows, full = coder.talker("grows", window=512, room=64), coder.talker("full", window=512)
    request = grows.request(PROMPTS[0], max_tokens=200, temperature=1.0, seed=7)
    grows.step(request)
    away(grows)
    assert grows.engine.move_kv(grows.id).place is KvPlace.DISK
    grows.room = 512
    grows.opens()
    assert grows.finishes(request).tokens == full.finishes(request).tokens


# --- what cannot be kept ------------------------------------------------------------------------------------------------


def lost(agent: Talker) -> None:
    agent.closes(KvPlace.TOKENS)
    assert agent.cached == 0
    assert agent.opens().restored_bytes == 0


def flip_a_byte(agent: Talker) -> None:
    away(agent)
    flip(agent)
    assert agent.opens().restored_bytes == 0


def flip(agent: Talker) -> None:
    arena = agent.engine._saved._store._arena._memory
    blob = blob_of(agent)
    arena[blob.at.offset + blob.bytes // 2] ^= 1


def flip_a_byte_on_disk(agent: Talker) -> None:
    away(agent, KvPlace.DISK)
    path = blob_of(agent).at.path
    raw = np.fromfile(path, np.uint8)
    raw[raw.size // 2] ^= 1
    raw.tofile(path)
    assert agent.opens().restored_bytes == 0


def cut_the_file(agent: Talker) -> None:
    away(agent, KvPlace.DISK)
    path = blob_of(agent).at.path
    path.write_bytes(path.read_bytes()[:-1])
    assert agent.opens().restored_bytes == 0


def saved_in_another_layout(agent: Talker) -> None:
    """f16 is what everybody else has, and the next turn's context must be theirs again."""
    away(agent)
    assert agent.opens(kv_type="f32").restored_bytes == 0
    lost(agent)


@pytest.mark.parametrize("damage", [flip_a_byte, flip_a_byte_on_disk, cut_the_file, saved_in_another_layout])
def test_damaged_kv_is_dropped_and_the_session_recomputed(coder: Stage, damage: Callable[[Talker], None]) -> None:
    harmed, witness = coder.talker("harmed", window=512), coder.talker("witness", window=512)
    turns, expected = conversation(harmed, damage), conversation(witness, lost)
    assert said(turns) == said(expected)
    assert [turn.recomputed_tokens for turn in turns] == [turn.recomputed_tokens for turn in expected]
    assert turns[1].recomputed_tokens > 0
    assert coder.memory.damaged == 3


def test_a_damaged_kv_is_recomputed_in_the_middle_of_a_turn(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=16)
    request = agent.request("x" * 6, max_tokens=20)
    agent.step(request)
    away(agent)
    flip(agent)
    agent.room = 64
    agent.opens()
    answer = agent.finishes(request)
    assert (answer.text, answer.recomputed_tokens) == ("abcdefghij" * 2, 15)


def test_without_host_memory_the_tokens_are_kept(on_stage: OnStage) -> None:
    stage = on_stage(SHIPPED["coder"], host_budget="4KiB")
    agent, witness = stage.talker("agent", window=512), stage.talker("witness", window=512)

    def no_room(agent: Talker) -> None:
        assert agent.closes().place is KvPlace.TOKENS
        assert agent.opens().restored_bytes == 0

    assert said(conversation(agent, no_room)) == said(conversation(witness, lost))
    assert stage.memory.dropped == 6


def test_a_disk_that_is_full_drops_what_is_moved_to_it(on_stage: OnStage) -> None:
    stage = on_stage(SHIPPED["coder"], disk={"directory": "kv", "budget": "4KiB"})
    agent = stage.talker("agent", window=512)
    first = agent.says(PROMPTS[0], max_tokens=32)
    away(agent)
    assert agent.engine.move_kv(agent.id).place is KvPlace.TOKENS
    assert agent.cached == 0
    assert (stage.memory.used_bytes, stage.memory.dropped, stage.memory.moved_to_disk) == (0, 1, 0)
    assert agent.opens().restored_bytes == 0
    assert agent.says(PROMPTS[1], max_tokens=1).recomputed_tokens == first.prompt_tokens + len(first.tokens) - 1


@pytest.mark.parametrize("to", [KvPlace.HOST, KvPlace.DISK])
def test_kv_that_is_dropped_frees_its_place_at_once(coder: Stage, to: KvPlace) -> None:
    agent = coder.talker("agent", window=512)
    agent.says(PROMPTS[0], max_tokens=32)
    away(agent, to)
    agent.engine.drop_kv(agent.id)
    assert agent.cached == 0
    agent.engine.drop_kv(agent.id)  # there is nothing any more
    assert (coder.memory.used_bytes, coder.memory.disk_used_bytes, coder.memory.dropped) == (0, 0, 1)
    agent.opens()
    assert agent.says(PROMPTS[1], max_tokens=1).recomputed_tokens > 0


def test_kv_that_the_context_has_no_room_for_is_recomputed(coder: Stage) -> None:
    agent = coder.talker("agent", window=2048)
    agent.says("x = 1\n" * 150, max_tokens=8)
    away(agent)
    agent.room = 256
    assert agent.opens().restored_bytes == 0
    assert coder.memory.dropped == 1
    agent.grows(agent.tokens + 20)
    assert agent.says(PROMPTS[1], max_tokens=8).recomputed_tokens > 0


def test_a_restore_that_fails_unforeseen_takes_no_seat_and_keeps_the_kv(coder: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = coder.talker("agent", window=512)
    agent.says(PROMPTS[0], max_tokens=8)
    away(agent)

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as broken_store:
        broken_store.setattr(agent.engine._saved._store, "read", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            agent.opens()
    assert not agent.seated
    assert agent.opens().restored_bytes > 0
    assert agent.says(PROMPTS[1], max_tokens=8).recomputed_tokens == 0


def test_a_directory_that_cannot_be_made_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"disk\.directory"), stage(SHIPPED["coder"], tmp_path, disk={"directory": "file/kv"}):
        pass


def test_an_agent_that_leaves_while_it_is_away_leaves_nothing(coder: Stage) -> None:
    for name, to in (("host", KvPlace.HOST), ("disk", KvPlace.DISK)):
        agent = coder.talker(name, window=512)
        agent.says(PROMPTS[0], max_tokens=8)
        away(agent, to)
        agent.leaves()
    assert (coder.memory.used_bytes, coder.memory.disk_used_bytes, coder.memory.dropped) == (0, 0, 0)


def test_a_session_that_has_decoded_nothing_has_nothing_to_keep(coder: Stage) -> None:
    agent = coder.talker("agent", window=512)
    assert agent.closes().place is KvPlace.TOKENS
    assert coder.memory.dropped == 0
    agent.opens()


def test_only_what_is_the_sessions_is_saved(polly: Callable[..., Talker]) -> None:
    agent = polly(window=64, room=32)
    agent.says("x", max_tokens=10)
    bytes = agent.engine.state_bytes(agent.id)
    agent.outgrows("y", max_tokens=30)
    with_the_turn = agent.engine.state_bytes(agent.id)
    agent.engine.drop_turn(agent.id)
    # The turn has decoded the session's last token with its prompt, and that stays: 11 tokens are cached instead of 10.
    assert bytes < away(agent) < bytes * 12 / 10 < with_the_turn
    agent.opens()


def test_a_disk_that_takes_its_time_keeps_no_turn_from_beginning(coder: Stage) -> None:
    agent, gate = coder.talker("agent", window=512), threading.Event()
    writing = [coder.engine._kv_threads.submit(gate.wait) for _ in range(64)]
    assert agent.says("import os\n", max_tokens=3).text
    assert not any(each.done() for each in writing)
    gate.set()

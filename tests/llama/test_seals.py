"""Seals and checks beside the copies: nobody waits for a checksum but whoever needs it, and what it finds is found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as TimedOut
from typing import Any

import pytest

from conductor.backend import kv_seal, kv_store
from conductor.types import KvPlace, PoolId
from tests.support.company import ARCHITECTURES, SPEC, prompt
from tests.support.growing import WITHIN_S, Stage

pytestmark = pytest.mark.usefixtures("samplers_are_closed")

Together = Callable[..., tuple[Stage, PoolId]]


@pytest.fixture(autouse=True)
def every_blob_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_store, "_WORTH_A_THREAD_BYTES", 0)


class Slow:
    """A checksum that takes until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()

    def __call__(self, *payloads: object, **how: object) -> int:
        self.begun.release()
        assert self.go.wait(WITHIN_S)
        return 7


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    slow = Slow()
    monkeypatch.setattr(kv_seal, "checksum", slow)
    yield slow
    slow.go.set()


def test_a_seat_is_free_and_another_sits_and_speaks_before_the_first_ones_kv_is_sealed(together: Together, slow: Slow) -> None:
    stage, pool = together("llama", 1)
    first = stage.sits("first", pool)
    first.says(prompt(1), max_tokens=5)
    assert first.closes().place is KvPlace.HOST
    assert slow.begun.acquire(timeout=WITHIN_S)
    second = stage.sits("second", pool)
    second.says(prompt(2), max_tokens=5)
    second.closes(KvPlace.TOKENS)
    back = stage.engine.take_seat(first.id, pool)
    with pytest.raises(TimedOut):
        back.result(0.05)
    slow.go.set()
    assert back.result(WITHIN_S) > 0
    assert first.says("and ", max_tokens=5).recomputed_tokens == 0


def test_kv_that_is_dropped_while_it_is_sealed_leaves_nothing(together: Together, slow: Slow) -> None:
    stage, pool = together("llama", 1)
    agent = stage.sits("agent", pool)
    agent.says(prompt(1), max_tokens=5)
    agent.closes()
    assert slow.begun.acquire(timeout=WITHIN_S)
    stage.engine.drop_kv(agent.id)
    slow.go.set()
    stage.engine._saved._store._sealers.submit(int).result(WITHIN_S)
    stage.engine._saved._store._sealers.shutdown()
    assert stage.memory.used_bytes == 0
    agent.opens()
    assert agent.says("and ", max_tokens=5).recomputed_tokens > 0


def test_a_restore_does_not_wait_for_the_check(together: Together, slow: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, pool = together("llama", 1)
    agent = stage.sits("agent", pool)
    agent.says(prompt(1), max_tokens=5)
    slow.go.set()
    agent.closes()
    assert stage.engine._saved._blobs[agent.id].seal.checksum == 7
    slow.go.clear()
    restored = threading.Event()
    store, inner = stage.engine._saved._store, stage.engine._saved._store.read

    def read(blob: object, label: object, use: Callable[[object], object], **options: object) -> object:
        return inner(blob, label, lambda state: (use(state), restored.set())[0], **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "read", read)
    back = stage.engine.take_seat(agent.id, pool)
    assert restored.wait(WITHIN_S)
    assert not back.done()
    slow.go.set()
    assert back.result(WITHIN_S) > 0


@pytest.mark.parametrize("damage", [0x01, 0x80, 0xFF])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damage_is_found_wherever_it_is_and_the_answer_is_as_recomputed(
    together: Together, architecture: str, damage: int
) -> None:
    """Of what llama.cpp was given meanwhile nothing stays: a NaN, or a position below zero, would go on to count."""
    stage, pool = together(architecture, 3)
    agent, beside = (stage.sits(name, pool) for name in ("agent", "beside"))
    witness = stage.talker("witness", **SPEC)
    beside.says(prompt(1), max_tokens=9)
    for n, share in enumerate((0.0, 0.002, 0.01, 0.1, 0.5, 0.9, 0.999)):
        for talker in (agent, witness):
            talker.says(prompt(2), max_tokens=9, reset=True)
        agent.closes()
        blob = stage.engine._saved._blobs[agent.id]
        start, end = blob.seal.parts[n % len(blob.seal.parts)]
        at = blob.at.offset + start + 7 + int(share * (end - start - 12)) // 8 * 8
        stage.engine._saved._store._arena._memory[at : at + 4] ^= damage
        assert agent.opens().restored_bytes == 0
        assert stage.memory.damaged == n + 1
        witness.closes(KvPlace.TOKENS)
        witness.opens()
        said = [talker.says("and ", max_tokens=20) for talker in (agent, witness)]
        assert (said[0].tokens, said[0].recomputed_tokens) == (said[1].tokens, said[1].recomputed_tokens)
    alone = stage.talker("alone", **SPEC)
    alone.says(prompt(1), max_tokens=9)
    assert beside.says("and ", max_tokens=20).recomputed_tokens == 0
    assert beside.conversation.tokens[-20:] == list(alone.says("and ", max_tokens=20).tokens)


def test_turns_in_company_survive_swaps_that_are_sealed_behind_them(together: Together) -> None:
    stage, pool = together("jamba", 2)
    agents = [stage.sits(name, pool) for name in ("a", "b")]
    witnesses = [stage.talker(f"witness {n}", **SPEC) for n in range(2)]
    for round in range(3):
        for n, (agent, witness) in enumerate(zip(agents, witnesses, strict=True)):
            assert agent.says(prompt(n + round), max_tokens=9).tokens == witness.says(prompt(n + round), max_tokens=9).tokens
        for agent in agents:
            agent.closes()
        for agent in reversed(agents):
            assert agent.opens().restored_bytes > 0


def test_a_slow_disk_holds_up_nobody_who_decodes(together: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, pool = together("llama", 2)
    leaves, stays = (stage.sits(name, pool) for name in ("leaves", "stays"))
    leaves.says(prompt(1), max_tokens=5)
    writing, go, disk = threading.Event(), threading.Event(), stage.engine._saved._store._files
    save = disk.save

    def slowly(*arguments: Any) -> bool:
        writing.set()
        return go.wait(WITHIN_S) and save(*arguments)

    monkeypatch.setattr(disk, "save", slowly)
    left = stage.engine.leave_seat(leaves.id, to=KvPlace.DISK)
    assert writing.wait(WITHIN_S)
    assert len(stays.says(prompt(2), max_tokens=20).tokens) == 20
    assert not left.done()
    go.set()
    assert left.result(WITHIN_S).place is KvPlace.DISK
    assert leaves.opens().restored_bytes > 0
    assert leaves.says("and ", max_tokens=5).recomputed_tokens == 0

"""What lies beneath the store: places that move as little as they need to, a gate that lets everybody through, and checksums."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
import xxhash

from conductor.backend import kv_seal
from conductor.backend.gate import Gate
from conductor.backend.kv_arena import KvArena, Span
from conductor.backend.kv_seal import checksum
from conductor.errors import InternalError
from tests.support.eventually import eventually


def places(arena: KvArena, *sizes: int) -> list[Span]:
    """One after another from the start."""
    spans = [arena.take(size) for size in sizes]
    assert None not in spans
    return [span for span in spans if span is not None]


# --- places -------------------------------------------------------------------------------------------------------------


def test_when_all_is_free_there_is_one_hole_as_large_as_the_arena() -> None:
    arena = KvArena(np.zeros(1000, np.uint8))
    spans = places(arena, *[100] * 10)
    assert arena.take(1) is None
    for n in (3, 1, 9, 0, 5, 2, 8, 4, 7, 6):
        arena.drop(spans[n])
        arena.check()
    assert arena.take(1000) is not None


def test_only_the_neighbours_move_that_make_the_room_with_the_fewest_bytes() -> None:
    memory = np.zeros(1000, np.uint8)
    arena = KvArena(memory)
    a, hole_1, large, hole_2, small, hole_3, b = places(arena, 100, 100, 300, 100, 50, 100, 250)
    for span, number in ((a, 1), (large, 2), (small, 3), (b, 4)):
        with arena.open(span) as bytes:
            bytes[:] = number
    for span in (hole_1, hole_2, hole_3):
        arena.drop(span)
    taken = arena.take(200)
    assert taken is not None
    assert (a.offset, large.offset, small.offset, taken.offset, b.offset) == (0, 200, 500, 550, 750)
    assert [int(memory[span.offset]) for span in (a, large, small, b)] == [1, 2, 3, 4]
    arena.check()


def test_a_place_that_overlaps_where_it_moves_to_arrives_whole() -> None:
    memory = np.zeros(1000, np.uint8)
    arena = KvArena(memory)
    hole, span = places(arena, 100, 800)
    with arena.open(span) as bytes:
        bytes[:] = pattern = np.arange(800) % 251
    arena.drop(hole)
    assert arena.take(200) is not None
    assert span.offset == 0
    assert (memory[:800] == pattern).all()


def test_a_place_is_free_when_the_last_of_its_holders_dropped_it() -> None:
    arena = KvArena(np.zeros(100, np.uint8))
    [span] = places(arena, 100)
    arena.hold(span)
    arena.drop(span)
    assert arena.used_bytes == 100
    arena.drop(span)
    assert arena.used_bytes == 0
    for act in (arena.drop, arena.hold):
        with pytest.raises(InternalError):
            act(span)


def test_room_that_is_being_made_is_for_whom_it_is_made() -> None:
    arena = KvArena(np.zeros(1000, np.uint8))
    hole, span = places(arena, 500, 300)
    arena.drop(hole)
    with ThreadPoolExecutor(2) as pool:
        with arena.open(span):
            first = pool.submit(arena.take, 700)
            eventually(lambda: arena._gate.waiting == 1, 5)
            latecomer = pool.submit(arena.take, 50)
            assert not wait([latecomer], timeout=0.05).done, "there is a hole for it, and yet it is behind the first"
        taken = first.result(5)
        assert taken is not None
        assert latecomer.result(5) is None
    assert (span.offset, taken.offset, arena.used_bytes) == (0, 300, 1000)


def test_overlapping_places_are_found_by_the_check() -> None:
    arena = KvArena(np.zeros(100, np.uint8))
    first, second = places(arena, 40, 40)
    second.offset = 39
    with pytest.raises(InternalError, match="broken at 40"):
        arena.check()
    first.offset, second.offset = 61, 0
    with pytest.raises(InternalError, match="end at 101"):
        arena.check()


# --- the gate -----------------------------------------------------------------------------------------------------------


def test_who_waits_enters_before_the_next_one_is_alone() -> None:
    gate = Gate()
    order: list[str] = []

    def enter(name: str) -> None:
        with gate.inside():
            order.append(name)

    def be_alone(name: str) -> None:
        with gate.alone():
            order.append(name)

    with ThreadPoolExecutor(3) as pool:
        with gate.inside():
            waiting = []
            for act, name in ((be_alone, "alone"), (enter, "newcomer"), (be_alone, "alone")):
                waiting.append(pool.submit(act, name))
                eventually(lambda: gate.waiting == len(waiting), 5)
            order.append("first")
        for future in waiting:
            future.result(5)
    assert order == ["first", "alone", "newcomer", "alone"]
    assert gate.waiting == 0


def test_many_are_inside_together_and_one_alone_is_really_alone() -> None:
    gate = Gate()
    inside: set[int] = set()
    alone: set[int] = set()

    def enter(n: int) -> None:
        for _ in range(200):
            with gate.inside():
                inside.add(n)
                assert not alone
                inside.discard(n)

    def be_alone(n: int) -> None:
        for _ in range(200):
            with gate.alone():
                alone.add(n)
                assert not inside
                assert alone == {n}
                alone.discard(n)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(act, n) for n, act in enumerate((enter, be_alone) * 3)]:
            future.result(20)


@pytest.mark.parametrize("first", ["inside", "alone"])
@pytest.mark.parametrize("second", ["inside", "alone"])
def test_a_thread_that_would_wait_for_itself_is_told(first: str, second: str) -> None:
    gate = Gate()
    with getattr(gate, first)(), pytest.raises(InternalError), getattr(gate, second)():
        pass
    with gate.alone():
        pass


# --- checksums ----------------------------------------------------------------------------------------------------------


def test_threads_find_the_same_checksum_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = np.arange((kv_seal._PARALLEL_BYTES + 12345) // 8, dtype=np.uint64).view(np.uint8)
    monkeypatch.setattr(kv_seal, "_THREADS", 3)
    helped = threading.Event()

    def between() -> None:
        if threading.current_thread() is threading.main_thread():
            assert helped.wait(60), "nobody helps"
        else:
            helped.set()

    with kv_seal.start_helpers("helper") as helpers:
        together = checksum(payload, helpers=helpers, between=between)
    assert checksum(payload) == together


def test_a_checksum_is_that_of_the_chunks_checksums_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_seal, "_CHUNK_BYTES", 4)
    payload = np.frombuffer(b"onlymanychunks!", np.uint8)
    parts = (b"only", b"many", b"chun", b"ks!")
    assert checksum(payload) == xxhash.xxh3_64_intdigest(b"".join(map(xxhash.xxh3_64_digest, parts)))
    assert checksum(np.frombuffer(b"manyonlychunks!", np.uint8)) != checksum(payload)

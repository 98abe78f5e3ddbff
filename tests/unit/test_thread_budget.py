"""Threads of the CPU, shared: never more than there are, first come, first served."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from conductor.backend.thread_budget import ThreadBudget
from conductor.errors import InternalError
from tests.support.eventually import eventually


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as workers:
        yield workers


def waiting(budget: ThreadBudget) -> int:
    return len(budget._waiting)


def test_who_finds_enough_does_not_wait() -> None:
    budget = ThreadBudget(4)
    for threads in (1, 3):
        budget.acquire(threads)
    assert not budget.contended
    for threads in (1, 3):
        budget.release(threads)


def test_more_than_there_are_is_a_mistake_and_so_is_giving_back_what_nobody_took() -> None:
    budget = ThreadBudget(2)
    with pytest.raises(InternalError, match="3 threads asked for, of 2"):
        budget.acquire(3)
    with pytest.raises(InternalError, match="3 threads given back, of 2"):
        budget.release(1)


def test_they_come_in_the_order_in_which_they_asked_and_a_small_wish_passes_no_large_one(workers: ThreadPoolExecutor) -> None:
    budget, order = ThreadBudget(4), list[int]()

    def asks(threads: int) -> None:
        budget.acquire(threads)
        order.append(threads)

    budget.acquire(4)
    for n, threads in enumerate((3, 1, 2)):
        workers.submit(asks, threads)
        eventually(lambda n=n: waiting(budget) == n + 1, 5)  # type: ignore[misc]
    assert budget.contended
    budget.release(2)
    assert (order, waiting(budget)) == ([], 3), "two are free, and the first wants three"
    budget.release(2)
    eventually(lambda: sorted(order) == [1, 3], 5)
    assert waiting(budget) == 1
    assert budget.contended
    budget.release(3)
    eventually(lambda: len(order) == 3, 5)
    assert not budget.contended
    budget.release(1)
    budget.release(2)


def test_who_gives_back_and_asks_again_stands_behind_those_who_wait(workers: ThreadPoolExecutor) -> None:
    budget, order = ThreadBudget(1), list[str]()

    def works(name: str) -> None:
        budget.acquire(1)
        order.append(name)
        budget.release(1)

    budget.acquire(1)
    other = workers.submit(works, "other")
    eventually(lambda: budget.contended, 5)
    budget.release(1)
    budget.acquire(1)
    order.append("again")
    budget.release(1)
    other.result(5)
    assert order == ["other", "again"]


def test_at_random_there_are_never_more_in_use_than_there_are(workers: ThreadPoolExecutor) -> None:
    budget, used, most, lock = ThreadBudget(5), [0], [0], threading.Lock()

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(200):
            threads = chance.randint(1, 5)
            budget.acquire(threads)
            with lock:
                used[0] += threads
                most[0] = max(most[0], used[0])
            with lock:
                used[0] -= threads
            budget.release(threads)

    for worker in [workers.submit(work, seed) for seed in range(8)]:
        worker.result(30)
    assert (used[0], budget.contended) == (0, False)
    assert 0 < most[0] <= 5

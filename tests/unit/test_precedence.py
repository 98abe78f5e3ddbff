"""Who can wait waits for whoever is waited for."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TimedOut

import pytest

from conductor.backend.precedence import Precedence


def test_with_nobody_first_nobody_gives_way() -> None:
    Precedence().give_way()


def test_who_gives_way_goes_on_when_the_last_of_those_before_it_is_done() -> None:
    precedence, first_goes, second_goes = Precedence(), threading.Event(), threading.Event()

    def first(goes: threading.Event) -> None:
        with precedence.first():
            assert goes.wait(5)

    with ThreadPoolExecutor(3) as threads:
        firsts = [threads.submit(first, goes) for goes in (first_goes, second_goes)]
        while precedence._first < 2:
            threading.Event().wait(0.001)
        gives_way = threads.submit(precedence.give_way)
        first_goes.set()
        firsts[0].result(5)
        with pytest.raises(TimedOut):
            gives_way.result(0.05)
        second_goes.set()
        gives_way.result(5)


def test_an_error_of_whoever_was_first_holds_nobody_up() -> None:
    precedence = Precedence()
    with pytest.raises(ZeroDivisionError), precedence.first():
        raise ZeroDivisionError
    precedence.give_way()

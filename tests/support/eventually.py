"""The one way tests wait: for a fact, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(predicate: Callable[[], T], within_s: float, *, every_s: float = 0.01) -> T:
    """The first truthy value of `predicate`; AssertionError with its last value if `within_s` pass without one."""
    deadline = time.monotonic() + within_s
    while not (value := predicate()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {within_s} s; last value: {value!r}")
        time.sleep(every_s)
    return value

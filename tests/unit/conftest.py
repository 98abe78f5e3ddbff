"""`given(cap=…)`: stages for stories about the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.stories import Stage, stages


@pytest.fixture
def given() -> Iterator[Callable[..., Stage]]:
    with stages() as raise_the_curtain:
        yield raise_the_curtain

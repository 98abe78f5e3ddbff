"""`given(cap=…)`: stages for stories about the policy; `store` and its `disk`: places for saved KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conductor.backend.kv_disk import KvDisk
from conductor.backend.kv_store import KvStore
from tests.support.blobs import DISK_BUDGET, store_on
from tests.support.stories import Stage, stages


@pytest.fixture
def given() -> Iterator[Callable[..., Stage]]:
    with stages() as raise_the_curtain:
        yield raise_the_curtain


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[KvDisk]:
    disk = KvDisk(tmp_path, budget_bytes=DISK_BUDGET)
    yield disk
    disk.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def store(disk: KvDisk) -> Iterator[KvStore]:
    """Whatever a story does to it, in the end its books are in order."""
    store = store_on(disk)
    yield store
    store.check()

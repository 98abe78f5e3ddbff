"""An engine without a conductor, for stories in which the test is the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from conductor.backend import turn_run
from conductor.backend.llama import Sampler
from conductor.types import DecodeRequest, PoolId
from tests.conftest import Start
from tests.support.company import SPEC
from tests.support.growing import Stage, Talker, stage
from tests.support.larger import Begin, begins, write_large
from tests.support.parrot import write_parrot
from tests.support.tiny_gguf import write_tiny_gguf

OnStage = Callable[..., Stage]
DISK = {"directory": "kv", "budget": "16MiB"}


@pytest.fixture
def samplers_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class CountedSampler(Sampler):
        alive = 0

        def __init__(self, request: DecodeRequest, seed: int) -> None:
            super().__init__(request, seed)
            CountedSampler.alive += 1

        def close(self) -> None:
            assert self.chain, "a sampler closed twice"
            super().close()
            CountedSampler.alive -= 1

    monkeypatch.setattr(turn_run, "Sampler", CountedSampler)
    yield
    assert CountedSampler.alive == 0


@pytest.fixture
def on_stage(tmp_path: Path) -> Iterator[OnStage]:
    """`on_stage(path)` begins with a disk of its own; at the end nothing of it is left."""
    with ExitStack() as stages:
        yield lambda path, **options: stages.enter_context(stage(path, tmp_path, **{"disk": DISK} | options))
    assert [file for file in tmp_path.glob("kv/**/*") if file.is_file()] == []


@pytest.fixture(scope="session")
def large_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.fixture
def begin(start: Start, large_models: dict[str, Path]) -> Begin:
    """A conductor on a host device of fewer bytes than its models have."""
    return begins(start, large_models)


@pytest.fixture
def tiny(on_stage: OnStage, tmp_path: Path) -> Callable[..., Stage]:
    """Six layers, so that one of gemma3's does not slide."""

    def begin(architecture: str = "llama", *, seed: int = 5, **options: Any) -> Stage:
        path = tmp_path / f"{architecture}.gguf"
        return on_stage(write_tiny_gguf(path, architecture=architecture, sliding_window=64, n_layer=6, seed=seed), **options)

    return begin


@pytest.fixture
def together(tiny: Callable[..., Stage]) -> Callable[..., tuple[Stage, PoolId]]:
    """A stage, and a pool on it."""

    def begin(architecture: str = "llama", slots: int = 6) -> tuple[Stage, PoolId]:
        stage = tiny(architecture)
        return stage, stage.pool(slots, **SPEC)

    return begin


@pytest.fixture
def polly(on_stage: OnStage, tmp_path: Path) -> Callable[..., Talker]:
    def says(text: str = "abcdefghij", *, window: int, room: int, ends: bool = False) -> Talker:
        return on_stage(write_parrot(tmp_path / "parrot.gguf", text, ends=ends)).talker("polly", window=window, room=room)

    return says

"""A real Ray, one for the session, with its default timing. The environment is set before anything imports ray."""

from __future__ import annotations

import os

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_metrics_report_interval_ms="1000")

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

import actors
from actors._ray_private import advertise_resource
from tests.support.conducting import Conduct, Conductor, config_of
from tests.support.parrot import write_parrot


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=1,  # in Ray's books only: conductors of tests are on the host device
        namespace="test",
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def vram_resource(ray_session: None) -> Iterator[str]:
    """The name of a resource that no other test uses and no node advertises yet."""
    name = f"vram_{uuid.uuid4().hex[:8]}"
    yield name
    advertise_resource(ray.get_runtime_context().get_node_id(), name, 0)


@pytest.fixture
def conduct(vram_resource: str, tmp_path: Path) -> Iterator[Conduct]:
    """`conduct(models={key: path}, …)`: starts it; at the end its books are checked, and it is stopped."""
    started: list[Conductor] = []

    def begin(models: Mapping[str, Path | dict[str, Any]] | None = None, **options: Any) -> Conductor:
        conductor = Conductor(config_of(vram_resource, tmp_path, models or {}, **options))
        started.append(conductor)
        return conductor

    yield begin
    for conductor in started:
        conductor.call("check")
        actors.stop(conductor.handle)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that never ends its turn."""
    return write_parrot(tmp_path / "endless.gguf", "abcdefghij", ends=False)

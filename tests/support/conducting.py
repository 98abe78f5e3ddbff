"""A conductor in Ray as tests talk to it, each with a name, a namespace and a resource of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

import actors
from conductor.config import Config, parse_config
from conductor.types import Status

#: The promise to users: a dead agent's memory is given back within two seconds.
WITHIN_S = 2.0


class Conductor:
    """A conductor of the test's own, as a test talks to it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.handle = actors.connect(config)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return ray.get(getattr(self.handle, method).remote(*arguments, **options))

    def status(self) -> Status:
        status: Status = self.call("status")
        assert status.ledger.allocated_bytes == sum(reserved.bytes for reserved in status.ledger.reservations)
        return status

    def is_busy(self, agent: str) -> bool:
        return any(known.busy for known in self.call("list") if known.id == agent)

    def is_empty(self) -> bool:
        status = self.status()
        return (status.agents, status.models, status.ledger.allocated_bytes, status.host_memory.used_bytes) == ((), (), 0, 0)

    def free_mib(self) -> float:
        """As anybody on the cluster sees it."""
        return ray.available_resources().get(self.config.ray.resource, 0.0)


Conduct = Callable[..., Conductor]


def config_of(resource: str, directory: Path, models: Mapping[str, Path | dict[str, Any]], **options: Any) -> Config:
    return parse_config(document_of(resource, directory, models, **options), source="test.yaml", directory=directory)


def document_of(resource: str, directory: Path, models: Mapping[str, Path | dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The configuration as it stands in a file."""
    return {
        "device": {"kind": "host", "host_bytes": "64MiB"},
        "host_budget": "8MiB",
        "threads": 1,
        "model_dirs": [str(directory)],
        "models": {key: {"window": 512, **_options(model)} for key, model in models.items()},
        "ray": {"namespace": f"ns-{resource}", "name": f"conductor-{resource}", "resource": resource},
        **options,
    }


def _options(model: Path | dict[str, Any]) -> dict[str, Any]:
    return model if isinstance(model, dict) else {"path": str(model)}

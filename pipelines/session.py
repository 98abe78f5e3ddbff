"""The running conductor, for the length of a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

import actors
from actors import service
from conductor.config import Config, load_config
from conductor.errors import NotRunning
from pipelines.console import errors


def settings(config: Path | None) -> Config:
    """What the command was given, else what the service was started with, else the built-in configuration."""
    running = service.running()
    return load_config(config or (running.config if running else None))


@contextlib.contextmanager
def connected(config: Config) -> Iterator[Any]:
    """The conductor's handle; Ray is left at the end. Raises NotRunning, ServiceFailed."""
    try:
        yield find(config)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def session(config: Path | None, *, as_json: bool = False) -> Iterator[Any]:
    """`connected`, and errors become messages."""
    with errors(as_json=as_json), connected(settings(config)) as conductor:
        yield conductor


def find(config: Config) -> Any:
    """The conductor's handle. Raises NotRunning, ServiceFailed."""
    if service.users_address() is None and service.running() is None:
        raise NotRunning
    actors.join_ray()
    handle = actors.find(config)
    if handle is None:
        raise NotRunning
    return handle

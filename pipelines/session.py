"""The running conductor, for the length of a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import actors
from actors import service
from conductor.errors import NotRunning
from pipelines.console import errors

if TYPE_CHECKING:
    from conductor.config import Config


def settings(config: Path | None) -> Config:
    """What the command was given, else what the service was started with, else the built-in configuration."""
    from conductor.config import load_config

    running = service.running()
    return load_config(config or (running.config if running else None))


def refuse_unless_there_is_ray() -> None:
    """Raises NotRunning where no conductor can be, without loading Ray."""
    if service.users_address() is None and service.running() is None:
        raise NotRunning


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """In the Ray where a conductor may run; it is left at the end. Raises NotRunning, ServiceFailed."""
    refuse_unless_there_is_ray()
    import ray

    try:
        actors.join_ray()
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def connected(config: Config) -> Iterator[Any]:
    """The conductor's handle; Ray is left at the end. Raises NotRunning, ServiceFailed."""
    with joined():
        handle = actors.find(config)
        if handle is None:
            raise NotRunning
        yield handle


@contextlib.contextmanager
def session(config: Path | None, *, as_json: bool = False) -> Iterator[Any]:
    """`connected`, and errors become messages."""
    with errors(as_json=as_json), connected(settings(config)) as conductor:
        yield conductor


def result_of(reference: Any) -> Any:
    """Of a call that may take long; whoever does not wait for it (Ctrl-C) ends it."""
    import ray

    try:
        return ray.get(reference)
    except BaseException:
        ray.cancel(reference)
        ray.wait([reference], timeout=2)  # the message is on its way: this process must not end before
        raise

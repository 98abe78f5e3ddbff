"""The process that asks a conductor how things are, for whoever watches for long.

A process of its own, because Ray may be stopped and started while somebody watches: connecting to one that just ends can take
minutes, and a process whose Ray has gone is ended by it. Here either costs a lookout, and the next one takes its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from conductor.errors import ConductorError, ServiceFailed
from conductor.happenings import HistoryEntry
from conductor.types import Status
from pipelines.session import connected, settings

#: how long the conductor may take: one that decodes answers in milliseconds
_ANSWER_WITHIN_S = 5.0
#: how long a lookout may take for its first answer, importing and connecting included, and for each later one
_FIRST_WITHIN_S, _NEXT_WITHIN_S = 30.0, _ANSWER_WITHIN_S + 3.0
_END_WITHIN_S = 3.0

Sight: TypeAlias = "tuple[Status, tuple[HistoryEntry, ...]]"


class Lookout:
    """`config`: as the commands take it. Close it."""

    def __init__(self, config: Path | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_keep, args=(theirs, config), name="lookout", daemon=True)
        self._process.start()
        theirs.close()
        self._within_s = _FIRST_WITHIN_S

    def look(self, since: int) -> Sight:
        """The status, and the history after the entry of that number. Raises ServiceFailed, NotRunning, ConfigError."""
        try:
            self._pipe.send(since)
            if not self._pipe.poll(self._within_s):
                raise ServiceFailed(f"Ray did not answer within {self._within_s:.0f} s")
            seen: Sight | ConductorError = self._pipe.recv()
        except (EOFError, OSError):
            raise ServiceFailed("the connection to Ray was lost") from None
        if isinstance(seen, ConductorError):
            raise seen
        self._within_s = _NEXT_WITHIN_S
        return seen

    def kill(self) -> None:
        """From another thread: whoever looks is told that the connection was lost."""
        with contextlib.suppress(ValueError):  # it is closed already
            self._process.kill()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(_END_WITHIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        with contextlib.suppress(ValueError):  # somebody else took note of its end, as Ray does in a process that joined it
            self._process.close()


def _keep(pipe: Connection[Any, int], config: Path | None) -> None:
    """Until whoever asks is gone, or something is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever watches; its end is told by the pipe
    from ray.exceptions import RayError

    with contextlib.suppress(EOFError, OSError):
        since = pipe.recv()
        try:
            with connected(settings(config)) as handle:
                while True:
                    pipe.send(_sight(handle, since))
                    since = pipe.recv()
        except (ConductorError, RayError, TimeoutError) as error:
            pipe.send(_told(error))


def _sight(handle: Any, since: int) -> Sight:
    import ray

    status, news = ray.get([handle.status.remote(), handle.history.remote(since)], timeout=_ANSWER_WITHIN_S)
    return status, news


def _told(error: BaseException) -> ConductorError:
    from ray.exceptions import GetTimeoutError

    from actors.connection import own

    error = own(error)
    if isinstance(error, ConductorError):
        return error
    if isinstance(error, GetTimeoutError):
        return ServiceFailed(f"the conductor did not answer within {_ANSWER_WITHIN_S:.0f} s")
    return ServiceFailed(f"the conductor does not answer ({type(error).__name__})")

"""Programs that serve on loopback for as long as a command runs: started, waited for, watched, and ended with it.

Does not cover which programs or what they are told (`monitor`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conductor.errors import ServiceFailed

_READY_WITHIN_S = 60.0
_END_WITHIN_S = 15.0


@dataclass(frozen=True, slots=True)
class Server:
    """One program, installed or not."""

    name: str
    program: str | None  #: where it is; None: not installed
    arguments: tuple[str, ...]
    environment: dict[str, str]  #: beside what is inherited
    url: str
    ready: str  #: the path that answers once it serves
    log: Path

    @property
    def command(self) -> tuple[str, ...]:
        return (self.program or self.name, *self.arguments)


@contextlib.contextmanager
def serving(servers: tuple[Server, ...], stop: threading.Event) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Their processes by name, once they answer; ended, and waited for, at the end. Raises ServiceFailed."""
    with contextlib.ExitStack() as ends:
        processes = {}
        for server in servers:
            processes[server.name] = _start(server)
            ends.callback(_end, processes[server.name])
        for server in servers:
            _await_ready(server, processes[server.name], stop)
        yield processes


def watch(servers: tuple[Server, ...], processes: dict[str, subprocess.Popen[bytes]], stop: threading.Event) -> None:
    """Until it is to stop. Raises ServiceFailed if one ends by itself."""
    while not stop.wait(0.5):
        for server in servers:
            _refuse_the_dead(server, processes[server.name])


def _start(server: Server) -> subprocess.Popen[bytes]:
    server.log.parent.mkdir(parents=True, exist_ok=True)
    with server.log.open("wb") as output:
        try:
            return subprocess.Popen(
                server.command,
                cwd=server.log.parent,
                env=os.environ | server.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which ends them in order
            )
        except OSError as error:
            raise ServiceFailed(f"{server.name} cannot be started: {error.strerror or error}") from None


def _await_ready(server: Server, process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while not answers(server.url + server.ready):
        _refuse_the_dead(server, process)
        if time.monotonic() > deadline:
            raise ServiceFailed(f"{server.name} does not answer at {server.url}; the end of {server.log}:\n{_tail(server.log)}")
        if stop.wait(0.1):
            return


def answers(url: str) -> bool:
    """Whether a request to this address, past any proxy, is answered with success."""
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except (OSError, ValueError):  # HTTPError and URLError among them
        return False


def _refuse_the_dead(server: Server, process: subprocess.Popen[bytes]) -> None:
    if (code := process.poll()) is not None:
        raise ServiceFailed(f"{server.name} ended (exit code {code}); the end of {server.log}:\n{_tail(server.log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:])


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Set at Ctrl-C, SIGTERM, or when the terminal goes."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def port_for(asked: int, option: str) -> int:
    """The port, or a free one for 0. Raises ServiceFailed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", asked))
        except OSError as error:
            raise ServiceFailed(f"port {asked}: {error.strerror}; name another with {option}, 0 takes a free one") from None
        return int(probe.getsockname()[1])

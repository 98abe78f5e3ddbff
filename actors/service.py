"""A Ray of our own that outlives the command that started it: `conductor up`, and how others find it.

One process, `ray start --head --block`, is started and its pid kept beside its address in a file; ending that process
ends its Ray and nothing else. It asks for a token, which lies beside the file, readable by this user only.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from actors._ray_private import authenticate
from conductor.errors import ServiceFailed

#: the environment variable that moves the file, for instance for a second service
ENVIRONMENT = "CONDUCTOR_RUNTIME_DIR"
#: what `conductor env` exports beside RAY_ADDRESS, with the same value: by it our address is told from the user's own
OUR_ADDRESS = "CONDUCTOR_RAY_ADDRESS"
#: Ray's own choices
_DASHBOARD_PORT, _DASHBOARD_AGENT_PORT = 8265, 52365
_START_WITHIN_S = 60.0
_STOP_WITHIN_S = 20.0
#: On SIGTERM Ray otherwise waits 30 s for actors to leave a node that is going away; ours has no other to go to.
_AT_ONCE = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}


@dataclass(frozen=True, slots=True)
class Service:
    address: str  #: as `ray.init` takes it
    pid: int
    started_at: float  #: the process's start, so that a later process of the same pid is not taken for it
    config: str | None  #: the configuration file it was started with, resolved; None: the built-in one
    environment: dict[str, str]  #: what its clients need to be let in


def runtime_directory() -> Path:
    """Where the service's file and log are: $CONDUCTOR_RUNTIME_DIR, else the user's runtime directory, else a temporary one."""
    if chosen := os.environ.get(ENVIRONMENT):
        return Path(chosen)
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "vram-conductor"
    return Path(tempfile.gettempdir()) / f"vram-conductor-{os.getuid()}"


def running() -> Service | None:
    """The service that `up` started, if it still lives. Raises ServiceFailed if its file could be somebody else's."""
    _refuse_foreign(runtime_directory())
    try:
        service = Service(**json.loads(_file().read_text("utf-8")))
        environment = {name: value for name, value in service.environment.items() if name.startswith("RAY_AUTH_")}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return replace(service, environment=environment) if _process(service) is not None else None


def users_address() -> str | None:
    """$RAY_ADDRESS if it is the user's own: neither what `conductor env` exported nor where the running service is.

    A shell keeps what `conductor env` exported, longer than the service lives. So what is stale of it is forgotten here,
    in this process's environment: an address where our service is no more, and our token (`running` knows today's).
    """
    service = running()
    address, stale = os.environ.get("RAY_ADDRESS") or None, []
    if address and address == os.environ.get(OUR_ADDRESS) and (service is None or service.address != address):
        stale += ["RAY_ADDRESS", OUR_ADDRESS]
    if Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "/")).parent == runtime_directory():
        stale += ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"]
    for name in stale:
        os.environ.pop(name, None)
    if stale:
        authenticate({})  # Ray read them if it was imported
    if "RAY_ADDRESS" in stale or (service is not None and service.address == address):
        return None
    return address


def start(config: str | None) -> Service:
    """Start a Ray that stays, or return the one that runs. `config`: None, or a resolved path.

    Raises ServiceFailed: with the end of Ray's log, or because a service runs with another configuration.
    """
    directory = runtime_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _refuse_foreign(directory)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        service = running()
        if service is None:
            return _start(directory, config)
    if config not in (None, service.config):
        with_what = service.config or "the built-in configuration"
        raise ServiceFailed(f"a conductor is already running with {with_what}; run `conductor down` first")
    return service


def _start(directory: Path, config: str | None) -> Service:
    users_address()  # for what it forgets
    environment = _authentication(directory)
    port = _free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block",
        f"--port={port}", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={_this_port_or_another(_DASHBOARD_PORT)}",
        f"--dashboard-agent-listen-port={_this_port_or_another(_DASHBOARD_AGENT_PORT)}",
    ]  # fmt: skip
    log = directory / "ray.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | environment | _AT_ONCE,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await_start(process, log)
        service = Service(f"127.0.0.1:{port}", process.pid, psutil.Process(process.pid).create_time(), config, environment)
        _file().write_text(json.dumps(asdict(service)), "utf-8")
    except BaseException:  # Ctrl-C too: a Ray that is in no file would never be stopped
        process.terminate()
        raise
    return service


def _await_start(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_WITHIN_S
    while "Ray runtime started" not in log.read_text("utf-8", "replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceFailed(f"Ray did not start; the end of {log}:\n{_tail(log)}")
        time.sleep(0.1)


def stop(service: Service) -> None:
    """End the service's Ray and wait for it. Raises ServiceFailed if it will not go."""
    process = _process(service)
    if process is not None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_WITHIN_S)
        except psutil.TimeoutExpired:
            raise ServiceFailed(f"Ray (pid {service.pid}) did not end within {_STOP_WITHIN_S:.0f} s") from None
    _file().unlink(missing_ok=True)
    (runtime_directory() / "token").unlink(missing_ok=True)


def _authentication(directory: Path) -> dict[str, str]:
    """A token of the service's own, unless the user has said how Ray is to authenticate."""
    if "RAY_AUTH_MODE" in os.environ:
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}
    token = directory / "token"
    token.unlink(missing_ok=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32), "utf-8")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def _refuse_foreign(directory: Path) -> None:
    """In a directory for everybody, /tmp, somebody else may have made ours, and would say where our Ray is."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ServiceFailed(f"{directory} must be a directory of yours that nobody else can enter: remove it, or chmod 700")


def _file() -> Path:
    return runtime_directory() / "service.json"


def _process(service: Service) -> psutil.Process | None:
    try:
        process = psutil.Process(service.pid)
        alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() == service.started_at
    except psutil.NoSuchProcess:
        return None
    return process if alive else None


def _this_port_or_another(port: int) -> int:
    """Where a port is taken, as by another Ray, Ray starts without what listens there: `ray list` needs one, `ray logs` both."""
    try:
        return _free_port(port)
    except OSError:
        return _free_port()


def _free_port(port: int = 0) -> int:
    """`port` itself unless it is 0. Raises OSError if it is taken at any of this machine's addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("0.0.0.0", port))
        return int(probe.getsockname()[1])


def _tail(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:])

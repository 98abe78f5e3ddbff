"""What a process believes of its environment and of the service's file."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from actors import service
from actors._ray_private import authenticate
from actors.service import Service
from conductor.errors import ServiceFailed

OURS = "127.0.0.1:1234"


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory with nothing in it, in an environment that says nothing of Ray."""
    monkeypatch.setenv("CONDUCTOR_RUNTIME_DIR", str(tmp_path / "run"))
    for name in ("RAY_ADDRESS", "CONDUCTOR_RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what the test makes of it is undone, and
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ["RAY_AUTH_MODE"])
    (tmp_path / "run").mkdir(mode=0o700)
    yield tmp_path / "run"
    monkeypatch.undo()
    authenticate({})


def serve(runtime: Path, **environment: str) -> None:
    """This process stands for Ray's."""
    running = Service(OURS, os.getpid(), psutil.Process().create_time(), None, environment)
    (runtime / "service.json").write_text(json.dumps(asdict(running)))


def export(**environment: str) -> None:
    os.environ.update(environment)


def test_an_address_that_the_user_gave_is_the_users(runtime: Path) -> None:
    assert service.users_address() is None
    export(RAY_ADDRESS="10.0.0.1:6379", CONDUCTOR_RAY_ADDRESS=OURS, RAY_AUTH_TOKEN_PATH="/elsewhere/token")
    assert service.users_address() == "10.0.0.1:6379"
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("disabled", "/elsewhere/token")


def test_what_env_exported_is_forgotten_when_its_service_is_gone(runtime: Path) -> None:
    export(RAY_ADDRESS=OURS, CONDUCTOR_RAY_ADDRESS=OURS, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(runtime / "token"))
    assert service.users_address() is None
    assert not {"RAY_ADDRESS", "CONDUCTOR_RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()


def test_the_running_services_address_is_nobody_elses_whoever_set_it(runtime: Path) -> None:
    serve(runtime)
    export(RAY_ADDRESS=OURS)
    assert service.users_address() is None
    assert os.environ["RAY_ADDRESS"] == OURS


def test_a_directory_that_others_can_enter_is_not_trusted(runtime: Path) -> None:
    serve(runtime)
    assert service.running() is not None
    runtime.chmod(0o770)
    for look in (service.running, service.users_address, lambda: service.start(None)):
        with pytest.raises(ServiceFailed, match="nobody else can enter"):
            look()


def test_a_service_passes_on_how_to_be_let_in_and_nothing_else(runtime: Path) -> None:
    serve(runtime, RAY_AUTH_MODE="token", LD_PRELOAD="/tmp/evil.so")
    running = service.running()
    assert running is not None
    assert running.environment == {"RAY_AUTH_MODE": "token"}


def test_where_a_port_is_taken_at_any_address_another_is_chosen() -> None:
    """Ray would start without its dashboard, and `ray list` and `ray logs` would find nothing."""
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        port = somebody.getsockname()[1]
        somebody.listen()
        assert service._this_port_or_another(port) not in (0, port)
    assert service._this_port_or_another(port) == port

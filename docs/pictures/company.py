"""What the pictures show: a Ray and a conductor on a slice of RAM, three shipped models, and agents that talk.

Agents are Ray actors, as a program's would be. Ray's dashboard is on, open to this machine's loopback for as long as it takes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml

import actors
from conductor.config import load_config
from conductor.errors import AdmissionRefused, ConductorError
from tests.support.conducting import Conductor
from tests.support.talk import SHIPPED

#: (id, model, service class)
AGENTS = (("ada", "coder", "shared"), ("bob", "reviewer", "shared"), ("cem", "documenter", "best_effort"),
          ("dee", "coder", "guaranteed"))  # fmt: skip
_CONFIG = {
    "models": {name: {"path": str(path), "window": 2048} for name, path in SHIPPED.items()},
    "device": {"kind": "host", "host_bytes": "64MiB"},
    "host_budget": "32MiB",
    "live_contexts": 2,
    "threads": 1,
}
_TASKS = (
    "Write a Python function `add(a, b)` that returns the sum of two numbers.",
    "Write a Python function `is_even(n)` that checks whether a number is even.",
    "Write a Python function `count_words(text)` that returns the number of words.",
)
_WAITS_S = 20.0


@dataclass(frozen=True, slots=True)
class Scene:
    """A conductor at work; `config` and `environment` lead other programs to it."""

    conductor: Conductor
    config: Path
    dashboard_url: str
    environment: dict[str, str]


@contextlib.contextmanager
def at_work() -> Iterator[Scene]:
    options: dict[str, Any] = {"num_cpus": 4, "log_to_driver": False, "object_store_memory": 80 << 20}
    started = ray.init(address="local", include_dashboard=True, dashboard_port=0, logging_level="ERROR", **options)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder, "pictures.yaml")
            config.write_text(yaml.safe_dump(_CONFIG), "utf-8")
            conductor = Conductor(load_config(config))
            os.environ["RAY_ADDRESS"] = started.address_info["gcs_address"]
            environment = os.environ | {"CONDUCTOR_RUNTIME_DIR": folder}
            with _talking(conductor):
                yield Scene(conductor, config, f"http://{started.dashboard_url}", environment)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _talking(conductor: Conductor) -> Iterator[None]:
    handles = [
        actors.spawn_agent(agent, model, conductor=conductor.handle, window=1024, service_class=promised)
        for agent, model, promised in AGENTS
    ]
    conductor.call("reserve", "embedder", 6 << 20)
    enough = threading.Event()
    threads = [threading.Thread(target=_talk, args=(handle, 1.5 + 1.1 * n, enough)) for n, handle in enumerate(handles)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def _talk(agent: Any, rest_s: float, enough: threading.Event) -> None:
    for task in itertools.cycle(_TASKS):
        with contextlib.suppress(ConductorError):
            ray.get(agent.ask.remote(task, fresh=True, max_tokens=160))
        if enough.wait(rest_s):
            return


@contextlib.contextmanager
def short_of_room(conductor: Conductor) -> Iterator[None]:
    """One registration has been refused, another one waits."""
    with contextlib.suppress(AdmissionRefused):
        conductor.call("register", "eve", "coder", window=60_000, service_class="guaranteed")
    room = conductor.status().ledger
    late = conductor.handle.reserve.remote("trainer", room.max_bytes - room.allocated_bytes - (1 << 20))
    waits = conductor.handle.register.remote("fay", "reviewer", window=2048, service_class="guaranteed", wait_s=_WAITS_S)
    yield
    conductor.call("release", ray.get(late))
    with contextlib.suppress(AdmissionRefused):  # there may be room now, or none in time
        ray.get(waits)
        conductor.call("unregister", "fay")

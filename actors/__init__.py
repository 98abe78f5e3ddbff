"""Everything that imports Ray: the conductor's actor, agents as actors, the mirror of the ledger in Ray's resources.

import actors
conductor = actors.connect()
agent = actors.spawn_agent("ada", "coder")

What is public here is imported on its first use: `import actors` alone loads no Ray, and only the conductor's own process loads
llama.cpp.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.agent import AgentActor, spawn_agent
    from actors.conductor_actor import GpuConductor
    from actors.connection import connect, find, join_ray, stop
    from actors.deaths import Owner
    from actors.streams import stream

__all__ = ["AgentActor", "GpuConductor", "Owner", "connect", "find", "join_ray", "spawn_agent", "stop", "stream"]

_MODULES = {
    "AgentActor": "agent", "spawn_agent": "agent", "GpuConductor": "conductor_actor", "Owner": "deaths", "stream": "streams",
    "connect": "connection", "find": "connection", "join_ray": "connection", "stop": "connection",
}  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

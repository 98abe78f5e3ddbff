"""Everything that imports Ray: the conductor's actor, agents as actors, the mirror of the ledger in Ray's resources.

import actors
conductor = actors.connect()
agent = actors.spawn_agent("ada", "coder")
"""

from actors.agent import AgentActor, spawn_agent
from actors.conductor_actor import GpuConductor
from actors.connection import connect, find, join_ray, stop
from actors.deaths import Owner
from actors.streams import stream

__all__ = ["AgentActor", "GpuConductor", "Owner", "connect", "find", "join_ray", "spawn_agent", "stop", "stream"]

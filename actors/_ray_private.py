"""Every use of Ray's private interfaces, one small function each: the place to look at after an upgrade of Ray.

All verified on Ray 2.60.0. Each may raise anything on another version; callers fall back and say so.
The blocking ones cost 0.3 to 2 ms and belong in a thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NodeResource:
    """What the GCS believes of one custom resource on one node; up to 100 ms behind the node after a release."""

    total: float
    free: float


def node_resource(node_id: str, resource: str) -> NodeResource | None:
    """None if the node does not advertise `resource`. Blocking. Verified on 2.60.0.

    The public `ray.cluster_resources()` sums over nodes and `ray.nodes()` misses what was advertised later.
    """
    from ray._private.state import state

    total = state.total_resources_per_node().get(node_id, {}).get(resource)
    if total is None:
        return None
    free = state.available_resources_per_node()[node_id].get(resource, 0.0)  # type: ignore[no-untyped-call]
    return NodeResource(float(total), float(free))  # an exhausted resource is absent


def advertise_resource(node_id: str, resource: str, total: float) -> None:
    """Set a running node's total; 0 withdraws it, and less than is in use becomes what is in use. Blocking. Verified on 2.60.0.

    A request, seen by `node_resource` within 100 ms. Lost if the raylet restarts.
    """
    from ray._private.worker import global_worker

    worker: Any = global_worker
    worker.gcs_client.resize_raylet_resource_instances(node_id, {resource: float(total)})


def log_directory() -> str:
    """Where this node keeps its logs, and its dashboard and `ray logs` look for them. Verified on 2.60.0."""
    from ray._private.worker import global_worker

    worker: Any = global_worker
    return str(worker.node.get_logs_dir_path())


def worker_death(worker_id: str) -> str | None:
    """Why a worker (or driver) is dead, or None if it lives or the GCS does not know it. Blocking. Verified on 2.60.0."""
    import ray
    from ray._private.state import state
    from ray.core.generated import common_pb2, gcs_pb2

    raw = state._connect_and_get_accessor().get_worker_info(ray.WorkerID(bytes.fromhex(worker_id)))
    if raw is None:
        return None
    row = gcs_pb2.WorkerTableData.FromString(raw)  # type: ignore[attr-defined]
    return None if row.is_alive else str(common_pb2.WorkerExitType.Name(row.exit_type)).lower()  # type: ignore[attr-defined]


def authenticate(environment: Mapping[str, str]) -> None:
    """Set RAY_AUTH_* variables, also where Ray has been imported already, before `ray.init`. Verified on 2.60.0.

    Ray reads its configuration once, on import; a cluster that asks for a token is otherwise out of reach.
    """
    os.environ.update(environment)
    if "ray._raylet" not in sys.modules:
        return  # it will read them
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


async def worker_deaths() -> AsyncIterator[str]:
    """Worker ids (hex) as they die, drivers included, 10 ms later. Ends when the GCS goes away. Verified on 2.60.0."""
    from ray._private.gcs_pubsub import GcsAioWorkerDeltaSubscriber

    async for worker_id, _ in _published(GcsAioWorkerDeltaSubscriber):
        yield worker_id


async def node_deaths() -> AsyncIterator[str]:
    """Node ids (hex) as they die; workers lost with a node are not told one by one. Verified on 2.60.0."""
    from ray._private.gcs_pubsub import GcsAioNodeInfoSubscriber
    from ray.core.generated import gcs_pb2

    async for node_id, info in _published(GcsAioNodeInfoSubscriber):
        if info.state == gcs_pb2.GcsNodeInfo.DEAD:  # type: ignore[attr-defined]
            yield node_id


async def _published(subscriber_type: Any) -> AsyncIterator[tuple[str, Any]]:
    """(key in hex, message) of one GCS channel.

    Ends on an empty poll: without a timeout that is how Ray reports an unreachable GCS, and a restarted one has
    forgotten its subscribers.
    """
    import ray

    subscriber = subscriber_type(address=ray.get_runtime_context().gcs_address)
    await subscriber.subscribe()
    try:
        while batch := await subscriber.poll(batch_size=500):
            for key, message in batch:
                yield key.hex(), message
    finally:
        await subscriber.close()

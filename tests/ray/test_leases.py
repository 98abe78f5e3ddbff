"""The mirror in a real detached actor on a real Ray with default timing."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import get_placement_group, placement_group, placement_group_table, remove_placement_group

from actors import _ray_private
from actors.leases import Lease, LeaseMirror
from conductor.errors import InternalError
from conductor.types import MirrorState, MirrorStatus, ReservationId
from conductor.units import MIB
from tests.support.eventually import eventually

TOTAL_MIB = 24_000


@ray.remote(num_cpus=0, max_concurrency=100)
class MirrorActor:
    """What the conductor does with its mirror, without the conductor."""

    async def start(self, resource: str, *, private_api: bool = True) -> MirrorStatus:
        if not private_api:
            _ray_private.advertise_resource = _gone  # type: ignore[assignment]
        self._mirror = LeaseMirror(resource, "e1-")
        await self._mirror.start(TOTAL_MIB)
        return await self._mirror.status()

    async def want(self, leases: dict[ReservationId, Lease]) -> float:
        started = time.perf_counter()
        self._mirror.want(leases)
        return time.perf_counter() - started

    async def settled(self, timeout_s: float) -> bool:
        return await self._mirror.settled(timeout_s)

    async def status(self) -> MirrorStatus:
        return await self._mirror.status()

    async def stop(self) -> None:
        await self._mirror.stop()


def _gone(node_id: str, resource: str, total: float) -> None:
    raise AttributeError("resize_raylet_resource_instances")


class Mirror:
    """The actor as a test talks to it."""

    def __init__(self, resource: str) -> None:
        self.resource = resource
        self.actor: Any = MirrorActor.options(name=f"mirror-{uuid.uuid4().hex[:8]}", lifetime="detached").remote()

    def start(self, **how: bool) -> MirrorStatus:
        return ray.get(self.actor.start.remote(self.resource, **how))

    def want(self, **mib: float) -> float:
        """Returns the seconds that the call held the actor's event loop."""
        leases = {ReservationId(id): Lease(f"agent {id}", int(size * MIB)) for id, size in mib.items()}
        return ray.get(self.actor.want.remote(leases))

    def status(self) -> MirrorStatus:
        return ray.get(self.actor.status.remote())

    def settles(self, within_s: float = 2.0) -> bool:
        return ray.get(self.actor.settled.remote(within_s))

    def stop(self) -> None:
        ray.get(self.actor.stop.remote())

    def group(self, id: str) -> Any:
        return get_placement_group(f"vram:agent-{id}:e1-{id}")

    def free_mib(self) -> float:
        """As anybody on the cluster sees it."""
        return ray.available_resources().get(self.resource, 0.0)


@pytest.fixture
def unstarted(vram_resource: str) -> Iterator[Mirror]:
    mirror = Mirror(vram_resource)
    yield mirror
    ray.kill(mirror.actor)


@pytest.fixture
def mirror(unstarted: Mirror) -> Mirror:
    assert unstarted.start().state is MirrorState.EQUAL
    return unstarted


def test_a_resource_that_no_node_advertises_is_advertised(unstarted: Mirror) -> None:
    assert unstarted.resource not in ray.cluster_resources()
    status = unstarted.start()
    assert (status.state, status.total_mib, status.used_mib) == (MirrorState.EQUAL, TOTAL_MIB, 0)
    assert ray.cluster_resources()[unstarted.resource] == TOTAL_MIB


def test_a_resource_advertised_in_another_size_is_corrected(unstarted: Mirror) -> None:
    _ray_private.advertise_resource(ray.get_runtime_context().get_node_id(), unstarted.resource, 7)
    eventually(lambda: ray.cluster_resources().get(unstarted.resource) == 7, within_s=2)
    assert unstarted.start().total_mib == TOTAL_MIB


def test_a_ray_that_cannot_change_a_running_node_is_unmirrored_and_says_what_to_do(unstarted: Mirror) -> None:
    status = unstarted.start(private_api=False)
    assert status.state is MirrorState.UNMIRRORED
    assert f"--resources='{{\"{unstarted.resource}\": {TOTAL_MIB}}}'" in status.note
    unstarted.want(a=100)
    assert not unstarted.settles()
    assert unstarted.status().ledger_mib == 100


@pytest.mark.slow
def test_an_unmirrored_mirror_takes_up_its_work_once_the_node_advertises(unstarted: Mirror) -> None:
    unstarted.start(private_api=False)
    unstarted.want(a=100)
    _ray_private.advertise_resource(ray.get_runtime_context().get_node_id(), unstarted.resource, TOTAL_MIB)
    eventually(lambda: unstarted.status().state is MirrorState.EQUAL, within_s=5)
    assert unstarted.free_mib() == TOTAL_MIB - 100


def test_fifty_leases_show_in_ray_to_the_grain(mirror: Mirror) -> None:
    sizes = {f"r{n}": 300 + n / 3 for n in range(50)}
    held_loop_s = mirror.want(**sizes)
    assert mirror.settles()
    whole_grains_mib = sum(int(int(size * MIB) * 10_000 / MIB) / 10_000 for size in sizes.values())
    assert mirror.free_mib() == pytest.approx(TOTAL_MIB - whole_grains_mib, abs=0.001)
    assert held_loop_s < 0.005


def test_a_group_is_named_after_its_lease(mirror: Mirror) -> None:
    mirror.want(r7=1234.5678)
    assert mirror.settles()
    row = placement_group_table(mirror.group("r7"))
    assert row["name"] == "vram:agent-r7:e1-r7"
    assert row["bundles"][0][mirror.resource] == pytest.approx(1234.5677, abs=0.0002)


def test_a_lease_that_changes_size_is_replaced(mirror: Mirror) -> None:
    mirror.want(a=100, b=200)
    assert mirror.settles()
    untouched = mirror.group("b").id
    mirror.want(a=5000, b=200)
    assert mirror.settles()
    assert mirror.free_mib() == TOTAL_MIB - 5200
    assert mirror.group("b").id == untouched


def test_a_full_node_changes_hands_within_a_second_or_two(mirror: Mirror) -> None:
    mirror.want(a=TOTAL_MIB)
    assert mirror.settles()
    mirror.want(b=TOTAL_MIB)
    assert mirror.settles(within_s=2)
    assert mirror.free_mib() == 0
    assert placement_group_table(mirror.group("b"))["state"] == "CREATED"


def test_a_lease_grows_into_the_last_free_bytes(mirror: Mirror) -> None:
    mirror.want(a=TOTAL_MIB / 2, b=TOTAL_MIB / 2)
    assert mirror.settles()
    mirror.want(a=TOTAL_MIB - 1, b=1)
    assert mirror.settles(within_s=2)


def test_when_all_is_released_everything_is_back(mirror: Mirror) -> None:
    mirror.want(**{f"r{n}": 400 for n in range(50)})
    assert mirror.settles()
    mirror.want()
    assert mirror.settles()
    assert mirror.free_mib() == TOTAL_MIB


def test_a_burst_of_changes_ends_in_the_last_of_them(mirror: Mirror) -> None:
    for n in range(100):
        mirror.want(a=100 + n, **{f"r{n}": 50})
    assert mirror.settles()
    assert mirror.free_mib() == TOTAL_MIB - 199 - 50


def test_a_lease_too_small_for_ray_to_count_has_no_group(mirror: Mirror) -> None:
    mirror.want(tiny=100 / MIB, nothing=0)
    assert mirror.settles()
    with pytest.raises(ValueError):
        mirror.group("tiny")
    assert mirror.free_mib() == TOTAL_MIB


def test_a_negative_lease_cannot_be_made() -> None:
    with pytest.raises(InternalError):
        Lease("agent", -1)


def test_a_group_removed_behind_the_mirrors_back_is_restored(mirror: Mirror) -> None:
    mirror.want(a=100, b=200)
    assert mirror.settles()
    remove_placement_group(mirror.group("a"))
    eventually(lambda: mirror.status().state is MirrorState.BEHIND, within_s=2)
    eventually(lambda: mirror.status().state is MirrorState.EQUAL, within_s=5)
    assert placement_group_table(mirror.group("a"))["state"] == "CREATED"


def test_when_the_actor_is_killed_its_groups_go(mirror: Mirror) -> None:
    mirror.want(a=10_000, b=10_000)
    assert mirror.settles()
    ray.kill(mirror.actor)
    eventually(lambda: mirror.free_mib() == TOTAL_MIB, within_s=2)


def test_a_stopped_mirror_leaves_neither_groups_nor_resource(mirror: Mirror) -> None:
    mirror.want(a=10_000)
    assert mirror.settles()
    mirror.stop()
    eventually(lambda: mirror.resource not in ray.cluster_resources(), within_s=2)
    with pytest.raises(ValueError):
        mirror.group("a")


def test_other_work_on_the_resource_shows_as_behind_with_its_size(mirror: Mirror) -> None:
    mirror.want(a=1000)
    assert mirror.settles()
    stranger = placement_group([{mirror.resource: 500}])
    try:
        eventually(lambda: "holds 500.0000 MiB" in mirror.status().note, within_s=2)
        assert mirror.status().state is MirrorState.BEHIND
    finally:
        remove_placement_group(stranger)
    assert mirror.settles()


def test_a_lease_that_others_leave_no_room_for_waits_and_comes_when_they_go(mirror: Mirror) -> None:
    stranger = placement_group([{mirror.resource: TOTAL_MIB}])
    assert stranger.wait(5)
    mirror.want(a=1000)
    eventually(lambda: "1 leases wait" in mirror.status().note, within_s=3)
    remove_placement_group(stranger)
    assert mirror.settles()

"""Ray's books of one custom resource on one node: what is advertised, and a placement group for each lease.

Covers the blocking calls, and the order that keeps Ray's figures right. Does not cover when to make them (`leases`)
or what may be booked (the ledger).

A placement group is the only holder that costs no process. Those made by a detached actor vanish with it, restarts
included, exactly as the device's memory does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from actors import _ray_private
from actors._ray_private import NodeResource
from conductor.errors import InternalError
from conductor.types import ReservationId

#: Ray counts in ten-thousandths. All sums here are whole numbers of them.
GRAINS_PER_MIB = 10_000

#: A change of the total is seen within one raylet report (100 ms); beyond this it was clamped or lost.
_ADVERTISED_WITHIN_S = 1.0
#: A release shows in Ray's view with the node's next report.
_REPORTED_WITHIN_S = 0.1
#: A group is there 2 ms after it was asked for. Ray retries one that it found no room for after about 1 s, a new one at once.
_LOOK_AT_EACH_AFTER_S = 0.1
_PENDING_PATIENCE_S = 2.0
_VERIFY_EVERY_S = 2.0
#: Ray's own figures lose a grain here and there on their way through floats.
_SLACK_GRAINS = 100


class NotAdvertised(Exception):
    """The node does not offer the resource in the size wanted, and could not be made to."""


@dataclass(frozen=True, slots=True)
class Target:
    """A group as it should be."""

    name: str
    grains: int


@dataclass(frozen=True, slots=True)
class Progress:
    missing: int  #: targets without a group that Ray has confirmed
    held_mib: float  #: confirmed


@dataclass(slots=True)
class _Group:
    target: Target
    handle: PlacementGroup
    confirmed: bool = False
    asked_at: float = field(default_factory=time.monotonic)


class RayBooks:
    """Every method blocks. All but `read` are called from one thread at a time.

    `_groups` is what this object asked Ray for and has not taken back, so a pass that fails half-way is safe to repeat.
    """

    def __init__(self, resource: str, node_id: str) -> None:
        self._resource, self._node_id = resource, node_id
        self._groups: dict[ReservationId, _Group] = {}
        self._total_before: float | None = None  #: what the node advertised before we changed it
        self._verified_at = self._removed_at = -math.inf

    def read(self) -> NodeResource | None:
        """Ray's own view; None if the node does not advertise the resource. Safe from any thread."""
        return _ray_private.node_resource(self._node_id, self._resource)

    def advertise(self, total_mib: int) -> None:
        """Make the node offer exactly `total_mib`. Raises NotAdvertised."""
        try:
            before = self.read()
        except (AttributeError, ImportError) as error:
            raise NotAdvertised(f"this Ray's figures cannot be read ({error})") from error
        if before is not None and before.total == total_mib:
            return
        try:
            _ray_private.advertise_resource(self._node_id, self._resource, total_mib)
        except Exception as error:
            raise NotAdvertised(f"this Ray cannot change a running node ({type(error).__name__}: {error})") from error
        if self._total_before is None:
            self._total_before = before.total if before else 0.0
        if not self._sees_total(total_mib):
            raise NotAdvertised(f"the node went on advertising {self.read()}")

    def reconcile(self, targets: Mapping[ReservationId, Target]) -> Progress:
        """One step towards `targets`; call again until nothing is missing. Frees first, so that no sum ever exceeds the total."""
        self._remove_unwanted(targets)
        self._confirm_pending()
        if time.monotonic() - self._verified_at >= _VERIFY_EVERY_S:
            self._forget_vanished()
            self._verified_at = time.monotonic()
        if targets.keys() - self._groups.keys():
            self._create_missing(targets)
            self._confirm_pending()
        held = sum(group.target.grains for group in self._groups.values() if group.confirmed)
        missing = len(targets) - sum(group.confirmed for group in self._groups.values())
        return Progress(missing, held / GRAINS_PER_MIB)

    def close(self) -> None:
        """Remove every group and advertise what was advertised before."""
        self._remove_unwanted({})
        if self._total_before is not None:
            _ray_private.advertise_resource(self._node_id, self._resource, self._total_before)
            if not self._sees_total(self._total_before):  # clamped: our groups were still on their way out
                _ray_private.advertise_resource(self._node_id, self._resource, self._total_before)
            self._total_before = None

    def _sees_total(self, total_mib: float) -> bool:
        deadline = time.monotonic() + _ADVERTISED_WITHIN_S
        while time.monotonic() < deadline:
            now = self.read()
            if (now.total if now else 0.0) == total_mib:
                return True
            time.sleep(0.005)
        return False

    def _remove_unwanted(self, targets: Mapping[ReservationId, Target]) -> None:
        for id, group in list(self._groups.items()):
            if targets.get(id) != group.target:
                self._remove(id)

    def _confirm_pending(self) -> None:
        pending = {id: group for id, group in self._groups.items() if not group.confirmed}
        if pending and self._all_show(pending.values()):
            for group in pending.values():
                group.confirmed = True
            return
        for id, group in pending.items():
            age_s = time.monotonic() - group.asked_at
            if age_s > _LOOK_AT_EACH_AFTER_S:
                self._confirm_or_give_up(id, group, age_s)

    def _confirm_or_give_up(self, id: ReservationId, group: _Group, age_s: float) -> None:
        state, refused = _state_of(group.handle)
        if state == "CREATED":
            group.confirmed = True
        elif state == "REMOVED" or refused or age_s > _PENDING_PATIENCE_S:
            self._remove(id)

    def _all_show(self, pending: Collection[_Group]) -> bool:
        """One look at the sum instead of one at each group, which takes half a second for fifty on a busy machine.

        Somebody else's work of exactly that size would deceive it until the groups are next verified.
        """
        if time.monotonic() - self._removed_at < _REPORTED_WITHIN_S:
            return False  # what was freed may still be counted
        view = self.read()
        asked = sum(group.target.grains for group in self._groups.values())
        telling = all(group.target.grains > 2 * _SLACK_GRAINS for group in pending)
        return telling and view is not None and abs(_grains(view.total - view.free) - asked) <= _SLACK_GRAINS

    def _forget_vanished(self) -> None:
        for id, group in list(self._groups.items()):
            if group.confirmed and _state_of(group.handle)[0] != "CREATED":
                self._remove(id)

    def _create_missing(self, targets: Mapping[ReservationId, Target]) -> None:
        """Ask only for what Ray's own view has room for: a group refused because that view is stale waits a second."""
        room = self._room_grains()
        for id, target in targets.items():
            if id not in self._groups and target.grains <= room:
                self._groups[id] = _Group(target, self._create(target))
                room -= target.grains

    def _room_grains(self) -> int:
        view = self.read()
        free = _grains(view.free) if view else 0
        unseen = sum(group.target.grains for group in self._groups.values() if not group.confirmed)
        return free - unseen + _SLACK_GRAINS

    def _create(self, target: Target) -> PlacementGroup:
        if target.grains <= 0:  # Ray 2.60 accepts a negative bundle and adds it to the node's capacity
            raise InternalError(f"a placement group of {target.grains} grains for {target.name}")
        try:
            handle: PlacementGroup = placement_group(
                [{self._resource: _quantity(target.grains)}],
                strategy="STRICT_PACK",
                name=target.name,
                lifetime=None,
                bundle_label_selector=[{"ray.io/node-id": self._node_id}],
            )
        except ray.exceptions.RayError:
            _remove_by_name(target.name)  # a call that failed here may have succeeded there
            raise
        return handle

    def _remove(self, id: ReservationId) -> None:
        remove_placement_group(self._groups[id].handle)
        del self._groups[id]
        self._removed_at = time.monotonic()


def _grains(mib: float) -> int:
    return round(mib * GRAINS_PER_MIB)


def _quantity(grains: int) -> float:
    """MiB as Ray wants them: it multiplies and truncates, so 0.0003 would become two grains."""
    mib = grains / GRAINS_PER_MIB
    return mib if int(mib * GRAINS_PER_MIB) == grains else math.nextafter(mib, math.inf)


def _state_of(handle: PlacementGroup) -> tuple[str, bool]:
    """(state, whether Ray found no room for it)."""
    row = placement_group_table(handle)
    if not row:
        return "REMOVED", False
    return row["state"], row["stats"]["scheduling_state"] in ("NO_RESOURCES", "INFEASIBLE")


def _remove_by_name(name: str) -> None:
    try:
        stray = get_placement_group(name)
    except ValueError:
        return
    remove_placement_group(stray)

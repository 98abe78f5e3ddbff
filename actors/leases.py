"""Keeps Ray's resource accounting equal to the ledger.

The ledger decides alone; Ray is told afterwards, in the background, never on the way of an admission. Covers when
Ray is told and how the two compare. Does not cover the calls themselves (`ray_books`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import ray

from actors._ray_private import NodeResource
from actors.naming import lease_name
from actors.ray_books import GRAINS_PER_MIB, NotAdvertised, Progress, RayBooks, Target
from conductor.errors import InternalError
from conductor.types import MirrorState, MirrorStatus, ReservationId
from conductor.units import MIB

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Changes of one decision arrive together; one pass for all of them.
_COALESCE_S = 0.02
#: Pauses between passes: while Ray has to catch up, while it fails, and when all is well.
_CATCH_UP_S = (0.01, 0.25)
_TROUBLE_S = (0.1, 2.0)
_IDLE_S = 2.0
_GROWTH = 1.5
#: Age at which Ray's figures are read again, and how long a status waits for that.
_FRESH_S = 0.05
_READ_WITHIN_S = 0.25
#: Raylets report each 100 ms; a difference older than this has another cause.
_REPORTED_WITHIN_S = 0.5
_TOLERANCE_MIB = 0.01


@dataclass(frozen=True, slots=True)
class Lease:
    """What one reservation shows in Ray: `label` for people, `bytes` for the books."""

    label: str
    bytes: int

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise InternalError(f"a lease of {self.bytes} bytes for {self.label}")


class LeaseMirror:
    """One placement group on this node for each lease, kept so by a background task.

    Belongs to a detached actor and to its event loop: the groups vanish with the actor. Two threads make the blocking
    calls: one changes, one reads figures, so that `status` never waits for a change.

    `prefix` tells this mirror's group names from those of its namespace-mates and of its own earlier lives.
    """

    def __init__(self, resource: str, prefix: str) -> None:
        self._resource, self._prefix = resource, prefix
        self._books = RayBooks(resource, ray.get_runtime_context().get_node_id())
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="mirror-changes")
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="mirror-reads")
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._total_mib = 0

        self._leases: dict[ReservationId, Lease] = {}
        #: of `want`: the latest, the one the last pass was for, and the latest that Ray holds whole
        self._version, self._tried_version, self._mirrored_version = 0, -1, -1
        self._changed_at = time.monotonic()
        self._progress = Progress(missing=0, held_mib=0.0)
        self._unmirrored: str | None = "not started"
        self._trouble: str | None = None

        self._figures: NodeResource | None = None
        self._figures_at = 0.0
        self._reading: asyncio.Future[NodeResource | None] | None = None

    async def start(self, total_mib: int) -> None:
        """Advertise `total_mib` on this node unless it is, and begin. Never raises for what Ray cannot do: see `status`."""
        if self._task is not None:
            raise InternalError("the mirror was started twice")
        self._total_mib = total_mib
        await self._pass(0.0)
        self._task = asyncio.create_task(self._run())

    def raise_total(self, total_mib: int) -> None:
        """Advertise so much from the next pass on, if it is more than before: strangers gave memory back."""
        if total_mib > self._total_mib:
            self._total_mib = total_mib
            self._wake.set()

    async def stop(self) -> None:
        """Remove every group; withdraw the resource if this mirror advertised it. Idempotent."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._task, self._unmirrored = None, "stopped"
        try:
            await self._in(self._changes, self._books.close)  # after the pass that may still be under way there
        except Exception:  # stopping goes on
            _log.exception("Ray kept some of the groups on %s; they go when this actor does", self._resource)

    def want(self, leases: Mapping[ReservationId, Lease]) -> None:
        """The whole desired state, after every change of the ledger. Only records and wakes: microseconds."""
        if self._leases == leases:
            return
        self._leases = dict(leases)
        self._version += 1
        self._changed_at = time.monotonic()
        self._wake.set()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until Ray's figures equal the ledger's. False if they did not in time, or cannot because unmirrored."""
        deadline = time.monotonic() + timeout_s
        while (state := (await self.status()).state) is MirrorState.BEHIND:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return state is MirrorState.EQUAL

    async def status(self) -> MirrorStatus:
        """Ray's figures, at most 50 ms old when Ray answers, beside the ledger's."""
        figures = None if self._unmirrored else await self._fresh_figures()
        ledger_mib = sum(lease.bytes for lease in self._leases.values()) / MIB
        total_mib, used_mib = (figures.total, figures.total - figures.free) if figures else (0.0, 0.0)
        state, note = self._compare(figures, ledger_mib)
        return MirrorStatus(state, self._resource, total_mib, round(used_mib, 4), round(ledger_mib, 4), note)

    def _compare(self, figures: NodeResource | None, ledger_mib: float) -> tuple[MirrorState, str]:
        if self._unmirrored:
            return MirrorState.UNMIRRORED, self._unmirrored
        if self._trouble or figures is None:
            return MirrorState.BEHIND, self._trouble or "Ray has not told its figures yet"
        used_mib = figures.total - figures.free
        tolerance_mib = _TOLERANCE_MIB + len(self._leases) / GRAINS_PER_MIB
        agree = abs(used_mib - ledger_mib) <= tolerance_mib and figures.total == self._total_mib
        if agree and self._mirrored_version == self._version:
            return MirrorState.EQUAL, ""
        return MirrorState.BEHIND, self._why_behind(figures, tolerance_mib)

    def _why_behind(self, figures: NodeResource, tolerance_mib: float) -> str:
        if time.monotonic() - self._changed_at < _REPORTED_WITHIN_S:
            return "catching up"
        reasons = []
        if figures.total != self._total_mib:
            reasons.append(f"the node advertises {figures.total:g} MiB instead of {self._total_mib}")
        foreign_mib = figures.total - figures.free - self._progress.held_mib
        if foreign_mib > tolerance_mib:
            reasons.append(f"other Ray work on this node holds {foreign_mib:.4f} MiB of {self._resource}")
        if self._progress.missing:
            reasons.append(f"{self._progress.missing} leases wait for Ray to make room")
        return "; ".join(reasons) or "catching up"

    async def _run(self) -> None:
        pause_s = _IDLE_S
        while True:
            wanted_anew = await self._rest(pause_s)
            pause_s = await self._pass(0.0 if wanted_anew else pause_s)

    async def _rest(self, pause_s: float) -> bool:
        """Sleep, less if `want` is called. True if it was, once that call's companions have had time to arrive."""
        alarm = asyncio.get_running_loop().call_later(pause_s, self._wake.set)
        await self._wake.wait()
        alarm.cancel()
        wanted_anew = self._version != self._tried_version
        if wanted_anew:
            await asyncio.sleep(_COALESCE_S)
        self._wake.clear()
        return wanted_anew

    async def _pass(self, last_pause_s: float) -> float:
        """One step towards the latest `want`; returns the pause before the next."""
        version, leases = self._version, self._leases
        self._tried_version = version
        try:
            progress = await self._in(self._changes, lambda: self._step(leases))
        except NotAdvertised as error:
            self._unmirrored = (
                f"{error}; start the node with --resources='{{\"{self._resource}\": {self._total_mib}}}' to see leases in Ray"
            )
            return _IDLE_S
        except Exception as error:  # Ray or its GCS is unwell: the ledger goes on without it
            self._note_trouble(error)
            return _next_pause(last_pause_s, _TROUBLE_S)
        self._unmirrored = self._trouble = None
        if progress != self._progress:
            self._progress, self._changed_at = progress, time.monotonic()
        if progress.missing:
            return _next_pause(last_pause_s, _CATCH_UP_S)
        self._mirrored_version = version
        return _IDLE_S

    def _step(self, leases: Mapping[ReservationId, Lease]) -> Progress:
        """In the thread for changes."""
        self._books.advertise(self._total_mib)
        return self._books.reconcile(self._targets(leases))

    def _targets(self, leases: Mapping[ReservationId, Lease]) -> dict[ReservationId, Target]:
        """Rounded down, so that the sum never exceeds the total; what rounds to nothing has no group."""
        return {
            id: Target(lease_name(lease.label, f"{self._prefix}{id}"), grains)
            for id, lease in leases.items()
            if (grains := lease.bytes * GRAINS_PER_MIB // MIB) > 0
        }

    def _note_trouble(self, error: Exception) -> None:
        trouble = f"retrying after {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if trouble != self._trouble:
            _log.warning("mirror of %s: %s", self._resource, trouble, exc_info=error)
        self._trouble = trouble

    async def _fresh_figures(self) -> NodeResource | None:
        """Ray's figures, read again when old; the last known if Ray is slow to answer."""
        if time.monotonic() - self._figures_at > _FRESH_S:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._in(self._reads, self._books.read))
                self._reading.add_done_callback(self._keep_figures)
            await asyncio.wait({self._reading}, timeout=_READ_WITHIN_S)
        return self._figures

    def _keep_figures(self, reading: asyncio.Future[NodeResource | None]) -> None:
        self._reading = None
        if reading.cancelled():
            return
        if (error := reading.exception()) is not None:
            _log.debug("no figures of %s", self._resource, exc_info=error)
            self._figures = None
            return
        self._figures, self._figures_at = reading.result(), time.monotonic()

    @staticmethod
    async def _in(thread: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(thread, call)


def _next_pause(last_s: float, bounds_s: tuple[float, float]) -> float:
    shortest_s, longest_s = bounds_s
    return min(max(last_s * _GROWTH, shortest_s), longest_s)

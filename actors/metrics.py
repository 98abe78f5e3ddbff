"""What Prometheus hears of the conductor, through Ray. docs/metrics.md lists it, and a test holds the two together.

Covers what each figure is made of, and when Ray is told: once a second, in the background, from the status and from what the
history has new. A call only adds to a few sums here, so it is neither slowed nor made to fail. Does not cover the names
(`metric_names`) or how Ray hands the figures on (docs/metrics.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter as Sums
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Protocol

from actors.metric_names import Figure, beginnings
from conductor.errors import AdmissionRefused, ConductorError, WindowRefused
from conductor.happenings import Happening, HistoryEntry
from conductor.types import Admission, DecodeResult, Kind, KvPlace, MirrorState, ModelKey, ModelState, ServiceClass, Status
from conductor.units import MIB

_log = logging.getLogger(__name__)

#: observations kept for a Ray that does not take them; the oldest go first
_OBSERVATIONS = 100_000
#: how the history says of a swap that it began in host memory, and not in a slot
_ON_TO_DISK = "from host memory to disk"


class Sink(Protocol):
    """Where the figures go: to Ray, or to a test."""

    def begin(self, figure: Figure) -> None: ...

    def set(self, figure: Figure, value: float) -> None: ...

    def add(self, figure: Figure, more: int) -> None: ...

    def observe(self, figure: Figure, value: float) -> None: ...


class Metrics:
    """Belongs to the conductor's event loop.

    `period_s`: a gauge that is not set again vanishes after two of Ray's reports, and there may be one each second.
    """

    def __init__(self, sink: Sink, period_s: float = 1.0) -> None:
        self._sink, self._period_s = sink, period_s
        self._totals: Sums[Figure] = Sums()  #: since the start
        self._told: Sums[Figure] = Sums()  #: of these, what Ray knows
        self._observed: deque[tuple[Figure, float]] = deque(maxlen=_OBSERVATIONS)  #: what Ray does not know yet
        self._read = 0  #: the number of the history's last entry that was counted
        self._parked: set[ModelKey] = set()  #: models whose next load brings them back
        self._complaints: set[type[Exception]] = set()

    async def run(
        self,
        status: Callable[[], Awaitable[Status]],
        history: Callable[[int], Awaitable[tuple[HistoryEntry, ...]]],
    ) -> None:
        """Tell Ray how things are and what was counted, again and again, until cancelled."""
        with self._harmless():
            for figure in beginnings():
                self._sink.begin(figure)
        while True:
            with self._harmless():
                entries = await history(self._read)
                now = await status()
                self._count(entries, now)
                self._tell(now)
            await asyncio.sleep(self._period_s)

    def _tell(self, status: Status) -> None:
        memory = status.host_memory
        fates = {"kv_moved_to_disk": memory.moved_to_disk, "kv_dropped": memory.dropped, "kv_damaged": memory.damaged}
        for name, total in fates.items():
            self._totals[name, ()] = total
        for figure, value in gauges_of(status).items():
            self._sink.set(figure, value)
        for figure, total in self._totals.items():
            if more := total - self._told[figure]:
                self._sink.add(figure, more)
                self._told[figure] = total
        while self._observed:
            self._sink.observe(*self._observed[0])
            self._observed.popleft()

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._observed.append(((name, labels), max(0.0, value)))

    # --- what the history has new -------------------------------------------------------------------------------------

    def _count(self, entries: Iterable[HistoryEntry], status: Status) -> None:
        errors = {model.key: model.estimate_error for model in status.models}
        for entry in entries:
            self._read = entry.number
            match entry.kind:
                case Happening.SWAPPED_OUT:
                    self._swapped("on_to_disk" if entry.text == _ON_TO_DISK else "out", entry)
                case Happening.SWAPPED_IN:
                    self._swapped("in", entry)
                case Happening.LOADED if entry.model is not None:
                    self._loaded(entry.model, entry, errors.get(entry.model))
                case Happening.PARKED if entry.model is not None:
                    self._parked.add(entry.model)
                    self._totals["parks", (entry.model,)] += 1
                    if entry.ms is not None:
                        self._observe("park_seconds", entry.ms / 1000)
                case Happening.UNLOADED if entry.model is not None:
                    self._parked.discard(entry.model)
                case _:
                    pass

    def _swapped(self, direction: str, entry: HistoryEntry) -> None:
        self._totals["swaps", (direction,)] += 1
        self._totals["swap_bytes", (direction,)] += entry.bytes or 0
        if entry.ms is not None:
            self._observe("swap_seconds", entry.ms / 1000, direction)

    def _loaded(self, model: ModelKey, entry: HistoryEntry, error: float | None) -> None:
        origin = "parked" if model in self._parked else "file"
        self._parked.discard(model)
        self._totals["loads", (model, origin)] += 1
        if entry.ms is not None:
            self._observe("load_seconds", entry.ms / 1000, origin)
        if error is not None:
            self._observe("estimate_miss_ratio", abs(error))

    # --- what calls count -------------------------------------------------------------------------------------------

    def admitted(self, admission: Admission) -> None:
        with self._harmless():
            self._totals["admissions", (admission.service_class.value,)] += 1
            self._observe("queue_seconds", admission.waited_s, "register")

    def ended(self, turn: DecodeResult) -> None:
        with self._harmless():
            self._totals["turns", (turn.finish_reason.value,)] += 1
            self._totals["tokens", ("prompt",)] += turn.prompt_tokens
            self._totals["tokens", ("reused",)] += turn.prompt_tokens_reused
            self._totals["tokens", ("prefix",)] += turn.prefix_tokens_reused
            self._totals["tokens", ("generated",)] += turn.generated_tokens
            self._totals["recomputed_tokens", ()] += turn.recomputed_tokens
            self._totals["window_growths", ()] += turn.window_growths
            self._totals["pauses", ()] += turn.pauses
            self._observe("turn_seconds", turn.elapsed_ms / 1000)
            self._observe("queue_seconds", turn.queue_ms / 1000, "turn")
            if turn.generated_tokens:
                self._observe("time_to_first_token_seconds", turn.time_to_first_token_ms / 1000)
            if turn.generated_tokens > 1:
                after_ms = turn.elapsed_ms - turn.time_to_first_token_ms
                self._observe("mean_inter_token_seconds", after_ms / 1000 / (turn.generated_tokens - 1))
                self._observe("longest_stall_seconds", turn.longest_stall_ms / 1000)

    @contextlib.contextmanager
    def errors_of(self, call: str) -> Iterator[None]:
        """Count the error that the call ends with, if it does; it goes on to the caller."""
        try:
            yield
        except ConductorError as error:
            with self._harmless():
                self._totals["errors", (call, type(error).__name__)] += 1
                if isinstance(error, (AdmissionRefused, WindowRefused)):
                    self._totals["refusals", (call, error.refusal.code.value)] += 1
            raise

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What goes wrong with figures is logged, once for each kind of error, and hurts nobody."""
        try:
            yield
        except Exception as error:
            if type(error) not in self._complaints:
                self._complaints.add(type(error))
                _log.warning("metrics are not complete", exc_info=True)


def gauges_of(status: Status) -> dict[Figure, float]:
    """The gauges' values. What nobody has at this moment is told as zero, so that it does not vanish."""
    device, memory = status.device, status.host_memory
    figures: defaultdict[Figure, float] = defaultdict(float)
    figures.update({("booked_bytes", (kind.value,)): 0 for kind in Kind if kind is not Kind.KV})
    figures.update({("agents", (promised.value, place.value)): 0 for promised in ServiceClass for place in KvPlace})
    figures.update({("waiting", (call,)): 0 for call in ("register", "turn")})
    figures.update({("models", (state.value,)): 0 for state in ModelState})
    for model in status.models:
        figures["models", (model.state.value,)] += 1
        figures["pools", (model.key,)] = 0
        figures["home_bytes", (model.key,)] = model.weights.home_bytes if model.weights else 0
        figures["link_share", (model.key,)] = model.weights.link_share if model.weights else 0
        figures.update({("slots", (model.key, state)): 0 for state in ("busy", "idle", "free")})
    for pool in status.pools:
        figures["pools", (pool.model,)] += 1
        figures["slots", (pool.model, "busy")] += pool.running
        figures["slots", (pool.model, "idle")] += pool.seated - pool.running
        figures["slots", (pool.model, "free")] += pool.slots - pool.seated
    for reserved in status.ledger.reservations:
        figures["booked_bytes", (reserved.kind.value,)] += reserved.bytes
    for agent in status.agents:
        figures["agents", (agent.service_class.value, agent.kv.value)] += 1
    for waiting in status.waiting:
        figures["waiting", (waiting.what,)] += 1
    errors = {model.key: model.estimate_error for model in status.models if model.estimate_error is not None}
    return {
        **figures,
        **_mirror(status),
        **{("estimate_error_ratio", (key,)): error for key, error in errors.items()},
        ("cap_bytes", ()): status.ledger.max_bytes,
        ("device_total_bytes", ()): device.total_bytes,
        ("device_used_bytes", ()): device.total_bytes - device.free_bytes,
        ("device_free_bytes", ()): device.free_bytes,
        ("device_others_bytes", ()): device.others_bytes,
        ("drift_bytes", ()): device.drift_bytes,
        ("kv_bytes", ("host",)): memory.used_bytes,
        ("kv_bytes", ("disk",)): memory.disk_used_bytes,
        ("kv_budget_bytes", ("host",)): memory.budget_bytes,
        ("kv_budget_bytes", ("disk",)): memory.disk_budget_bytes,
    }


def _mirror(status: Status) -> dict[Figure, float]:
    """Of a ledger that Ray does not mirror there is a state, and nothing to compare."""
    mirror = status.mirror
    states: dict[Figure, float] = {("mirror_state", (state.value,)): float(state is mirror.state) for state in MirrorState}
    if mirror.state is MirrorState.UNMIRRORED:
        return states
    booked_bytes, ledger_bytes = mirror.used_mib * MIB, mirror.ledger_mib * MIB
    return {
        **states,
        ("mirror_booked_bytes", ()): booked_bytes,
        ("mirror_difference_bytes", ()): booked_bytes - ledger_bytes,
    }
